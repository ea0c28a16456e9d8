"""
A curriculum: a callback makes your own environment harder whenever the agent has mastered it:

    python examples/curriculum.py [timesteps]
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
folder = Path("logs/curriculum")
folder.mkdir(parents=True, exist_ok=True)


class Search(gym.Env[Any, Any]):
    """Reach a goal that lies `difficulty` steps away on a grid, in at most twice as many steps, for a reward of 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(4)
    difficulty = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        x = self.np_random.integers(self.difficulty + 1)
        self.way = np.array([x, self.difficulty - x]) * self.np_random.choice([-1, 1], 2)
        self.steps_left = 2 * self.difficulty
        return self.way.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.way -= [(1, 0), (-1, 0), (0, 1), (0, -1)][action]
        self.steps_left -= 1
        found = not self.way.any()
        return self.way.astype(np.float32), float(found), found or self.steps_left == 0, False, {}


class Curriculum(BaseCallback):
    """Moves the goal one step farther away whenever nine of ten episodes reach it."""

    difficulty = 1

    def _on_step(self) -> bool:
        episodes = self.model.ep_info_buffer  # of the last 100 episodes
        assert episodes is not None
        if len(episodes) == episodes.maxlen and np.mean([episode["r"] for episode in episodes]) >= 0.9:
            self.difficulty += 1
            # set_wrapper_attr finds the environment inside Monitor; SB3's set_attr would set the attribute in Monitor
            self.training_env.env_method("set_wrapper_attr", "difficulty", self.difficulty)
            episodes.clear()  # judge by new episodes
        self.logger.record("rollout/difficulty", self.difficulty)
        return True

    def _on_training_end(self) -> None:
        print("Difficulty at the end:", self.training_env.get_attr("difficulty"))


env = make_vec_env(Search, n_envs=8, seed=0)
model = A3C("MlpPolicy", env, learning_rate=1e-3, seed=0, verbose=1)
model.learn(timesteps, Curriculum())
model.save(folder / "model.zip")
env.close()
