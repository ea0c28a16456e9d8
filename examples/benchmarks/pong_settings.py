"""
One run of the search for the settings that learn Pong soonest:

    python examples/benchmarks/pong_settings.py --learning-rate 4e-4 --envs-per-update 8

Leaves the logged curve (``progress.csv``), checkpoints and the final model in ``logs/pong_settings/<settings>/``. What is
not given is as in ``train_atari.py``. Timesteps are decisions of the agent; the score is that of training. With
``--resume`` and more ``--timesteps`` it goes on from the final model, and the curve in a folder ``from_<timesteps>``.
"""

import argparse
from pathlib import Path

from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import configure

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n-envs", type=int, default=16)
parser.add_argument("--n-steps", type=int, default=20)
parser.add_argument("--envs-per-update", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--anneal", action="store_true", help="let the learning rate fall linearly to 0")
parser.add_argument("--rms-prop", action="store_true", help="instead of Adam")
parser.add_argument("--timesteps", type=int, default=2_000_000)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--resume", action="store_true", help="go on from the final model")
arguments = parser.parse_args()

rate = arguments.learning_rate
searched = ("n_envs", "n_steps", "envs_per_update", "learning_rate", "anneal", "rms_prop", "seed")
given = {name: getattr(arguments, name) for name in searched if getattr(arguments, name) != parser.get_default(name)}
folder = Path("logs/pong_settings") / ("_".join(f"{name}={value}" for name, value in given.items()) or "defaults")
monitor_kwargs = {"override_existing": not arguments.resume}
env = make_ale_vec_env(
    "PongNoFrameskip-v4", arguments.n_envs, arguments.seed, monitor_dir=str(folder), monitor_kwargs=monitor_kwargs
)
if arguments.resume:
    model = A3C.load(folder / "model", env)
    model.set_random_seed(arguments.seed + model.num_timesteps)  # not the episodes of the beginning again
else:
    model = A3C(
        "CnnLstmPolicy",
        env,
        learning_rate=(lambda progress: rate * progress) if arguments.anneal else rate,
        n_steps=arguments.n_steps,
        envs_per_update=arguments.envs_per_update,
        use_rms_prop=arguments.rms_prop,
        seed=arguments.seed,
    )
curve = folder / f"from_{model.num_timesteps}" if arguments.resume else folder
model.set_logger(configure(str(curve), ["csv", "stdout"]))
checkpoints = CheckpointCallback(100_000 // arguments.n_envs, str(folder / "checkpoints"))
remaining = arguments.timesteps - model.num_timesteps
model.learn(remaining, checkpoints, log_interval=20, reset_num_timesteps=not arguments.resume)
model.save(folder / "model")
env.close()
