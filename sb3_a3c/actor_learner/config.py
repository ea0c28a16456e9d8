"""A worker's configuration, and the part of it that may change while the worker runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hyperparams:
    """The hyper-parameters of a worker; the names are those of :class:`sb3_a3c.A3C`. A callback may change them."""

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
    trainable: tuple[bool, ...]  #: of each parameter of the policy whether it learns (``requires_grad``)


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker gets at its start, beside its environments and the store."""

    index: int
    seed: int
    env_indices: tuple[int, ...]  #: which of the user's environments are this worker's
    policy: bytes  #: pickled
    hyperparams: Hyperparams
    report_obs: bool  #: whether a callback can see observations
