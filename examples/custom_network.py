"""
Your own network: features extractor, LSTM, layers and optimizer, on CartPole without velocities, a task that needs memory:

    python examples/custom_network.py [timesteps]
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_a3c import A3C

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
folder = Path("logs/custom_network")
folder.mkdir(parents=True, exist_ok=True)


class Extractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box, features_dim: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(
            nn.Linear(observation_space.shape[0], features_dim), nn.LayerNorm(features_dim), nn.ELU()
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


def position_and_angle(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    space = spaces.Box(-5.0, 5.0, (2,))
    return gym.wrappers.TransformObservation(env, lambda obs: obs[::2], space)


env = make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=position_and_angle)
policy_kwargs = dict(
    features_extractor_class=Extractor,
    features_extractor_kwargs=dict(features_dim=32),
    lstm_hidden_size=64,
    net_arch=dict(pi=[32], vf=[32]),  # between the LSTM and the heads
    activation_fn=nn.ELU,
    optimizer_class=th.optim.AdamW,
    optimizer_kwargs=dict(weight_decay=1e-4),
)
model = A3C(
    "MlpLstmPolicy",
    env,
    learning_rate=lambda progress: 3e-3 * progress,
    n_steps=32,
    gae_lambda=0.95,
    ent_coef=0.0,
    max_grad_norm=10.0,
    policy_kwargs=policy_kwargs,
    seed=0,
    verbose=1,
    envs_per_update=4,  # fewer and larger batches
)
print(model.policy)
model.learn(timesteps)
model.save(folder / "model.zip")
env.close()

test_env = make_vec_env("CartPole-v1", n_envs=4, seed=1000, wrapper_class=position_and_angle)
mean, std = evaluate_policy(model, test_env, n_eval_episodes=20)
print(f"Return of 20 episodes: {mean:.1f} +- {std:.1f}")
test_env.close()
