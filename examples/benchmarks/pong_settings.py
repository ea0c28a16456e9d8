"""
One run of the search for the settings that learn Pong soonest:

    python examples/benchmarks/pong_settings.py --learning-rate 2e-4 --ent-coef 0.01
    python examples/benchmarks/pong_settings.py --learning-rate 2e-4 --ent-coef 0.01 --seconds 15

Saves the logged curve (``progress.csv``), checkpoints and the final model to ``logs/pong_settings/<settings>/``. Options
that are not given are A3C's defaults. Timesteps are decisions of the agent; returns are those of training
episodes. With ``--resume`` and more ``--timesteps`` it continues from the final model, with the curve in a folder
``from_<timesteps>``. With ``--start-from`` it begins with what another run has learned, to see how these settings
go on. With ``--seconds`` it only prints the steps per second, and saves nothing.
"""

import argparse
from pathlib import Path
from typing import Any

import torch as th
from measuring import Clock
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.workers.learning_rate import FULL_RATE

ENV = "PongNoFrameskip-v4"
SEARCHED = (
    "n_workers",
    "n_envs",
    "frame_stack",
    "n_steps",
    "envs_per_update",
    "learning_rate",
    "anneal",
    "warm_up",
    "gamma",
    "gae_lambda",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "beta1",
    "beta2",
    "eps",
    "amsgrad",
    "rms_prop",
    "bfloat16",
    "filter_scale",
    "seed",
)


def new_model(settings: argparse.Namespace, env: VecEnv) -> A3C:
    """Untrained."""

    def learning_rate(progress_remaining: float) -> float:
        """Rises over the first ``warm_up`` timesteps; with ``anneal`` it falls linearly to 0."""
        done = (1.0 - progress_remaining) * settings.timesteps
        rise = min(1.0, (done + 1) / (settings.warm_up + 1))
        rate: float = (settings.learning_rate or FULL_RATE) * rise * (progress_remaining if settings.anneal else 1.0)
        return rate

    policy_kwargs: dict[str, Any] = {}
    if settings.bfloat16:
        policy_kwargs["features_extractor_kwargs"] = dict(dtype=th.bfloat16)
    if not settings.rms_prop:
        policy_kwargs["optimizer_kwargs"] = dict(
            betas=(settings.beta1, settings.beta2), eps=settings.eps, amsgrad=settings.amsgrad
        )
    model = A3C(
        "CnnLstmPolicy",
        env,
        learning_rate=learning_rate if settings.learning_rate or settings.anneal or settings.warm_up else None,
        n_workers=settings.n_workers,
        n_steps=settings.n_steps,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        envs_per_update=settings.envs_per_update,
        use_rms_prop=settings.rms_prop,
        policy_kwargs=policy_kwargs,
        seed=settings.seed,
    )
    with th.no_grad():
        next(model.policy.features_extractor.parameters()).mul_(settings.filter_scale)  # of the first layer
    return model


def new_env(settings: argparse.Namespace, **kwargs: Any) -> VecEnv:
    """With as many frames in each observation as the settings say."""
    env: VecEnv = make_ale_vec_env(ENV, settings.n_envs, settings.seed, **kwargs)
    return VecFrameStack(env, settings.frame_stack) if settings.frame_stack > 1 else env


def train(settings: argparse.Namespace, folder: Path) -> None:
    """Train, and leave everything in the folder."""
    monitor_kwargs = {"override_existing": not settings.resume}
    env = new_env(settings, monitor_dir=str(folder), monitor_kwargs=monitor_kwargs)
    if settings.resume:
        model = A3C.load(folder / "model", env)
        model.set_random_seed(settings.seed + model.num_timesteps)  # not the episodes of the beginning again
    else:
        model = new_model(settings, env)
        if settings.start_from:
            model.set_parameters(settings.start_from)
            for group in model.policy.optimizer.param_groups:
                group.update(model.policy.optimizer.defaults)  # of these settings, not of those that were saved
    curve = folder / f"from_{model.num_timesteps}" if settings.resume else folder
    model.set_logger(configure(str(curve), ["csv", "stdout"]))
    checkpoints = CheckpointCallback(100_000 // settings.n_envs, str(folder / "checkpoints"))
    remaining = settings.timesteps - model.num_timesteps
    model.learn(remaining, checkpoints, log_interval=20, reset_num_timesteps=not settings.resume)
    model.save(folder / "model")
    env.close()


def main() -> None:
    """Train, or measure the speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-workers", type=int, help="default: one for each core")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--frame-stack", type=int, default=1, help="frames in each observation")
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--envs-per-update", type=int, default=4)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--anneal", action="store_true", help="let the learning rate fall linearly to 0")
    parser.add_argument("--warm-up", type=int, default=0, help="timesteps over which the learning rate rises")
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--gae-lambda", type=float, default=1.0)
    parser.add_argument("--ent-coef", type=float, default=0.003)
    parser.add_argument("--vf-coef", type=float, default=0.5)
    parser.add_argument("--max-grad-norm", type=float, default=40.0)
    parser.add_argument("--beta1", type=float, default=0.9, help="of Adam")
    parser.add_argument("--beta2", type=float, default=0.99, help="of Adam")
    parser.add_argument("--eps", type=float, default=1e-8, help="of Adam")
    parser.add_argument("--amsgrad", action="store_true", help="of Adam")
    parser.add_argument("--rms-prop", action="store_true", help="instead of Adam")
    parser.add_argument("--bfloat16", action="store_true", help="convolutions in lower precision")
    parser.add_argument("--filter-scale", type=float, default=1.0, help="of the initial weights of the first convolution")
    parser.add_argument("--timesteps", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-from", help="a model, for its parameters and optimizer state")
    parser.add_argument("--resume", action="store_true", help="continue from the final model")
    parser.add_argument("--seconds", type=float, help="only measure the speed, for this time")
    settings = parser.parse_args()
    given = {name: getattr(settings, name) for name in SEARCHED if getattr(settings, name) != parser.get_default(name)}
    name = "_".join(f"{key}={value}" for key, value in given.items()) or "defaults"
    if settings.start_from:
        name += f"_from_{Path(settings.start_from).stem}"
    if settings.seconds:
        clock = Clock(settings.seconds)
        new_model(settings, new_env(settings)).learn(10**9, clock)
        print(f"{name}: {clock.steps_per_second:.0f} steps/s")
    else:
        train(settings, Path("logs/pong_settings") / name)


if __name__ == "__main__":
    main()
