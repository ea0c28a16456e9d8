"""Steps out of workers: all of them, each once, in order, and with random state and threads left alone."""

import random
import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C
from sb3_a3c.collector import HogwildCollector


class StepCounter(gym.Wrapper[Any, Any, Any, Any]):
    """Puts into each info how many steps this environment has made."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.n_steps = 0

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.n_steps += 1
        return obs, reward, terminated, truncated, {**info, "n_steps": self.n_steps}


def counting_env(n_envs: int) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, wrapper_class=StepCounter)


def make_collector(env: VecEnv, n_workers: int | None, total_steps: int, **settings: Any) -> HogwildCollector:
    model = A3C("MlpPolicy", env, n_workers=None, **settings)
    seeds: list[int | None] = [None] * env.num_envs
    return HogwildCollector(
        model.policy,
        env,
        env.reset(),  # type: ignore[arg-type]
        model._settings(),
        n_workers,
        seed=0,
        env_seeds=seeds,
        env_options=[{}] * env.num_envs,
        steps_before=0,
        total_steps=total_steps,
    )


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_every_transition_is_seen_once_and_in_order(n_workers: int) -> None:
    collector = make_collector(counting_env(5), n_workers, 400, n_steps=8)
    seen: dict[int, list[int]] = {i: [] for i in range(5)}
    n_seen = 0
    try:
        while (step := collector.next_step()) is not None:
            assert step.rewards.shape == step.dones.shape == step.actions.shape == (5,)
            n_seen += 5
            for info in step.infos:
                seen[info["env_index"]].append(info["n_steps"])
        infos, dones = collector.drain()
    finally:
        collector.stop()
    for info in infos:
        seen[info["env_index"]].append(info["n_steps"])
    assert len(infos) == len(dones) < 5
    assert 400 <= n_seen + len(infos) < 400 + 5 * 8  # at most one rollout too many for each worker
    for steps in seen.values():
        assert steps == list(range(1, len(steps) + 1))


def test_in_this_process_the_outside_keeps_its_random_state_and_threads() -> None:
    def outside() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist(), th.get_num_threads()  # type: ignore[index]

    before = th.get_num_threads()
    th.set_num_threads(2)
    try:
        env = counting_env(2)
        env.reset()
        random.seed(1), np.random.seed(2), th.manual_seed(3)
        model_free = outside()
        collector = make_collector(env, 0, 1000)
        random.seed(1), np.random.seed(2), th.manual_seed(3)
        for _ in range(30):
            assert collector.next_step() is not None
        assert outside() == model_free
        collector.stop()
    finally:
        th.set_num_threads(before)


def test_environments_that_cannot_be_sent_stay_in_this_process_with_one_warning() -> None:
    env = counting_env(2)
    env.envs[0].unwrapped.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"A3C trains in this process, as with n_workers=0.*can't be sent") as caught:
        collector = make_collector(env, None, 100)
    assert len(caught) == 1
    assert collector.next_step() is not None
    collector.stop()
    with pytest.raises(ValueError, match=r"can't be sent to worker processes.*n_workers=0"):
        make_collector(env, 2, 100)


def test_statistics_cover_all_that_was_learned() -> None:
    collector = make_collector(counting_env(4), 2, 400, n_steps=10)
    while collector.next_step() is not None:
        pass
    collector.stop()
    statistics = collector.statistics.pop()
    assert statistics["train/skipped_updates"] == 0
    assert 0 <= statistics["train/staleness"] < 20
    assert -0.7 < statistics["train/entropy_loss"] < -0.6  # a new policy is nearly uniform: log 2
    assert sum(value for key, value in statistics.items() if key.startswith("time/")) == pytest.approx(1.0)
    assert collector.store.n_updates == 20  # 400 transitions, 2 environments of 10 steps in each update
