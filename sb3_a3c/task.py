"""What a worker is told at its start, and what of it may change while it runs."""

from dataclasses import dataclass

from stable_baselines3.common.type_aliases import Schedule


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a worker; the names are those of :class:`sb3_a3c.A3C`."""

    n_steps: int
    gamma: float
    gae_lambda: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    normalize_advantage: bool
    use_sde: bool
    sde_sample_freq: int
    envs_per_update: int
    take_turns: bool
    lr_schedule: Schedule


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker knows at its start. Units are agent steps (transitions)."""

    index: int
    seed: int
    env_indices: tuple[int, ...]  #: of the user's environments, those that are this worker's
    policy: bytes  #: pickled
    settings: Settings
    steps_before: int  #: transitions made in earlier calls of ``learn``
    total_steps: int  #: goal, ``steps_before`` included
