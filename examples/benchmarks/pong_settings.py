"""
One run of the search for the settings that learn Pong soonest:

    python examples/benchmarks/pong_settings.py --learning-rate 2e-4 --envs-per-update 4

Leaves the logged curve (``progress.csv``), checkpoints and the final model in ``logs/pong_settings/<settings>/``. What is
not given is as in ``train_atari.py``. Timesteps are decisions of the agent; the score is that of training.
"""

import argparse
from pathlib import Path

import ale_py
import gymnasium as gym
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import configure

from sb3_a3c import A3C

gym.register_envs(ale_py)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--n-envs", type=int, default=16)
parser.add_argument("--n-steps", type=int, default=20)
parser.add_argument("--envs-per-update", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--anneal", action="store_true", help="let the learning rate fall linearly to 0")
parser.add_argument("--rms-prop", action="store_true", help="instead of Adam")
parser.add_argument("--timesteps", type=int, default=2_000_000)
parser.add_argument("--seed", type=int, default=1)
arguments = parser.parse_args()

rate = arguments.learning_rate
given = [f"{name}={value}" for name, value in vars(arguments).items() if value != parser.get_default(name)]
folder = Path("logs/pong_settings") / ("_".join(given) or "defaults")
env = make_atari_env("PongNoFrameskip-v4", arguments.n_envs, seed=arguments.seed, monitor_dir=str(folder))
model = A3C(
    "CnnLstmPolicy",
    env,
    learning_rate=(lambda progress: rate * progress) if arguments.anneal else rate,
    n_steps=arguments.n_steps,
    envs_per_update=arguments.envs_per_update,
    use_rms_prop=arguments.rms_prop,
    seed=arguments.seed,
)
model.set_logger(configure(str(folder), ["csv", "stdout"]))
checkpoints = CheckpointCallback(100_000 // arguments.n_envs, str(folder / "checkpoints"))
model.learn(arguments.timesteps, checkpoints, log_interval=20)
model.save(folder / "model")
env.close()
