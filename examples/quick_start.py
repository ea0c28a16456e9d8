"""
Train on CartPole, save, load, evaluate, and act in your own loop:

    python examples/quick_start.py [timesteps]
"""

import sys
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_a3c import A3C

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
folder = Path("logs/quick_start")
folder.mkdir(parents=True, exist_ok=True)

env = make_vec_env("CartPole-v1", n_envs=8, seed=0)  # divided among the workers, one for each core
model = A3C("MlpPolicy", env, learning_rate=1e-3, seed=0, verbose=1)
model.learn(timesteps)
model.save(folder / "model.zip")
env.close()

model = A3C.load(folder / "model.zip")
env = make_vec_env("CartPole-v1", n_envs=4, seed=1000)
mean, std = evaluate_policy(model, env, n_eval_episodes=20)
print(f"Return of 20 episodes: {mean:.1f} +- {std:.1f}")
env.close()

game = gym.make("CartPole-v1")  # render_mode="human" to watch it (pip install pygame)
obs, info = game.reset(seed=0)
steps, over = 0, False
while not over:
    action, state = model.predict(obs, deterministic=True)  # with an LSTM, pass the state: predict(obs, state, …)
    obs, reward, terminated, truncated, info = game.step(action)
    steps, over = steps + 1, terminated or truncated
print(f"One more episode: {steps} steps")
game.close()
