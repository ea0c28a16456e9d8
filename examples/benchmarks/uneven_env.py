"""
Environments whose steps differ in time: A3C, whose workers do not wait for each other, and A2C with SubprocVecEnv.

    python examples/benchmarks/uneven_env.py [--seconds 15] [--repetitions 3]

Three kinds of latency, with MlpPolicy on 16 environments: exponential with a mean of 2 ms; 2 ms, but 20 ms in one
environment; and 20 ms in each of 32 environments against 20 ms in one. The environments sleep, so they need no cores. A2C
has a ``SubprocVecEnv``; A3C has one worker for each environment, as in the paper. Rollouts of both have 20 steps. Results
are medians of alternating repetitions.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from measuring import Clock
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_a3c import A3C

N_STEPS = 20
Latency = Callable[[np.random.Generator], float]  # seconds of one step


class Slow(gym.Env[Any, Any]):
    """Nothing to learn; each step takes its time."""

    def __init__(self, latency: Latency) -> None:
        self.observation_space = spaces.Box(-1, 1, (4,))
        self.action_space = spaces.Discrete(2)
        self.render_mode = None
        self.latency = latency

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(4, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.latency(self.np_random))
        return np.zeros(4, dtype=np.float32), 0.0, False, False, {}


def exponential(generator: np.random.Generator) -> float:
    """2 ms on average."""
    return float(generator.exponential(0.002))


def fixed(seconds: float) -> Latency:
    """Always the same."""
    return lambda _: seconds


def steps_per_second(algorithm: str, latencies: list[Latency], seconds: float) -> float:
    """Of one training run."""
    make_envs: list[Callable[[], gym.Env[Any, Any]]] = [functools.partial(Slow, latency) for latency in latencies]
    env: VecEnv
    model: BaseAlgorithm
    if algorithm == "A3C":
        env = DummyVecEnv(make_envs)
        model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=env.num_envs)
    else:
        env = SubprocVecEnv(make_envs)
        model = A2C("MlpPolicy", env, n_steps=N_STEPS, device="cpu")
    clock = Clock(seconds)
    model.learn(10**9, clock)
    env.close()
    return clock.steps_per_second


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    th.set_num_threads(1)  # for A2C: the faster of one and torch's default, with so small a network
    straggler = [fixed(0.002)] * 15 + [fixed(0.02)]
    pairs: list[tuple[str, tuple[str, list[Latency]], tuple[str, list[Latency]]]] = [
        ("exponential, mean 2 ms: A3C ÷ A2C", ("A3C", [exponential] * 16), ("A2C", [exponential] * 16)),
        ("2 ms, one straggler of 20 ms: A3C ÷ A2C", ("A3C", straggler), ("A2C", straggler)),
        ("20 ms: A3C with 32 workers ÷ with 1", ("A3C", [fixed(0.02)] * 32), ("A3C", [fixed(0.02)])),
    ]
    print("| latency | steps/s | steps/s | ratio |\n|---|---|---|---|")
    for name, first, second in pairs:
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.repetitions):
            for contestant, found in zip((first, second), rates, strict=True):
                found.append(steps_per_second(*contestant, arguments.seconds))
        medians = [statistics.median(found) for found in rates]
        print(f"| {name} | {medians[0]:.0f} | {medians[1]:.0f} | {medians[0] / medians[1]:.2f} |", flush=True)


if __name__ == "__main__":  # SubprocVecEnv needs it
    main()
