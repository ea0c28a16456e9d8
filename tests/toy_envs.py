"""Small environments that several test files use; workers started by a fork server import them from here."""

import os
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Countdown(gym.Env[Any, Any]):
    """
    Observes the time in the episode; each step pays 1. A time limit ends the episodes.

    :param lengths: of the episodes, again from the first one after the last
    """

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)
    render_mode = None

    def __init__(self, lengths: Sequence[int] = (10,)) -> None:
        self.lengths = lengths
        self.n_episodes = self.n_steps = self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.length = self.lengths[self.n_episodes % len(self.lengths)]
        self.n_episodes, self.t = self.n_episodes + 1, 0
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The infos have the process and a number drawn from the environment's own generator."""
        self.n_steps, self.t = self.n_steps + 1, self.t + 1
        info = {"pid": os.getpid(), "number": float(self.np_random.random())}
        return self.observation(), self.reward(), False, self.t == self.length, info

    def observation(self) -> Any:
        return np.array([self.t], dtype=np.float32)

    def reward(self) -> float:
        return 1.0


class Images(gym.Env[Any, Any]):
    """Observes random images; the reward is the action. Episodes last 10 steps on average."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
    action_space = spaces.Discrete(3)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._draw(), float(action), bool(self.np_random.random() < 0.1), False, {}

    def _draw(self) -> Any:
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8)


class StepCounter(gym.Wrapper[Any, Any, Any, Any]):
    """
    Adds to each info ``n_steps``, the number of steps made so far, and the ``time`` and ``mark`` at that step.

    :param env: the environment
    :param seconds: that each step takes longer
    """

    def __init__(self, env: gym.Env[Any, Any], seconds: float = 0.0) -> None:
        super().__init__(env)
        self.seconds, self.n_steps, self.mark = seconds, 0, "new"

    def step(self, action: Any) -> Any:
        time.sleep(self.seconds)
        *step, info = super().step(action)
        self.n_steps += 1
        return *step, {**info, "n_steps": self.n_steps, "time": time.perf_counter(), "mark": self.mark}

    def add(self, number: int) -> int:
        return self.n_steps + number
