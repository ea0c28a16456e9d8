"""
VecNormalize: train on normalized observations and rewards, save, load the model and its statistics, evaluate:

    python examples/vec_normalize.py [timesteps]
"""

import sys
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_a3c import A3C
from sb3_a3c.resume import load_statistics

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
folder = Path("logs/vec_normalize")
folder.mkdir(parents=True, exist_ok=True)

env = VecNormalize(make_vec_env("MountainCarContinuous-v0", n_envs=8, seed=0))
# the car must swing to reach the flag: gSDE's noise lasts long enough to discover this
model = A3C(
    "MlpPolicy",
    env,
    learning_rate=1e-3,
    n_steps=100,
    ent_coef=0.0,
    use_sde=True,
    sde_sample_freq=16,
    seed=0,
    verbose=1,
)
model.learn(timesteps, log_interval=10)
model.save(folder / "model.zip")  # with the statistics of VecNormalize
env.close()

model = A3C.load(folder / "model.zip")
test_env = load_statistics(folder / "model.zip", make_vec_env("MountainCarContinuous-v0", n_envs=4, seed=1000))
test_env.training = False  # freeze the statistics
test_env.norm_reward = False  # report the environment's own rewards
mean, std = evaluate_policy(model, test_env, n_eval_episodes=20)
print(f"Return of 20 episodes: {mean:.1f} +- {std:.1f}")
test_env.close()
