"""The collector: its steps, statistics, threads and random state."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_a3c import A3C
from sb3_a3c.processes import machine
from sb3_a3c.processes.machine import n_cores
from sb3_a3c.workers.assignment import MAX_ROLLOUTS_WAITING, Assignment
from sb3_a3c.workers.collector import HogwildCollector
from tests.toy_envs import Countdown, StepCounter


def sleeping_env(vec_env: type[VecEnv], *seconds: float) -> VecEnv:
    def maker(seconds: float) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: StepCounter(gym.make("CartPole-v1"), seconds)

    return vec_env([maker(each) for each in seconds])  # type: ignore[call-arg,arg-type]


def cartpole(n_envs: int) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, wrapper_class=StepCounter)


def make_collector(env: VecEnv, n_workers: int | None, total_steps: int, **kwargs: Any) -> HogwildCollector:
    model = A3C("MlpPolicy", env, n_workers=None, **kwargs)
    n_envs = env.num_envs
    assignment = Assignment(env, model.policy, model._hyperparams(), n_workers, 0, [None] * n_envs, [{}] * n_envs)
    env.reset()
    return HogwildCollector(assignment, model.policy, 0, total_steps, learning_rate=model.lr_schedule)


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_every_transition_is_in_one_step_and_in_order(n_workers: int) -> None:
    collector = make_collector(cartpole(5), n_workers, 400, n_steps=8)
    seen: dict[int, list[int]] = {i: [] for i in range(5)}
    n_seen = 0
    try:
        while collector.wait_for_step():
            step = collector.take_step()
            assert step.rewards.shape == step.dones.shape == step.actions.shape == (5,)
            n_seen += 5
            for info in step.infos:
                seen[info["env_index"]].append(info["n_steps"])
        infos, dones = collector.take_leftovers()
    finally:
        collector.stop(threading.Event())
    for info in infos:
        seen[info["env_index"]].append(info["n_steps"])
    assert len(infos) == len(dones) < 5
    assert 400 <= n_seen + len(infos) < 400 + 5 * 8  # at most one rollout more for each worker
    for steps in seen.values():
        assert steps == list(range(1, len(steps) + 1))


def test_in_process_training_leaves_random_state_and_threads_alone() -> None:
    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist(), th.get_num_threads()  # type: ignore[index]

    before = th.get_num_threads()
    th.set_num_threads(2)
    try:
        env = cartpole(2)
        env.reset()
        random.seed(1), np.random.seed(2), th.manual_seed(3)
        expected = state()
        collector = make_collector(env, 0, 1000)
        random.seed(1), np.random.seed(2), th.manual_seed(3)
        for _ in range(30):
            assert collector.wait_for_step()
            collector.take_step()
        assert state() == expected
        collector.stop(threading.Event())
    finally:
        th.set_num_threads(before)


def test_environments_that_cannot_be_pickled_train_in_this_process_with_a_warning() -> None:
    env = cartpole(2)
    env.envs[0].unwrapped.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"A3C trains in this process, as with n_workers=0.*can't be sent") as caught:
        collector = make_collector(env, None, 100)
    assert len(caught) == 1
    assert collector.wait_for_step()
    collector.stop(threading.Event())
    with pytest.raises(ValueError, match=r"can't be sent to worker processes.*n_workers=0"):
        make_collector(env, 2, 100)


def test_statistics_of_all_rollouts() -> None:
    collector = make_collector(cartpole(4), 2, 400, n_steps=10)
    while collector.wait_for_step():
        collector.take_step()
    collector.take_leftovers()
    collector.stop(threading.Event())
    statistics = collector.statistics.pop()
    assert statistics["train/skipped_updates"] == 0
    assert 0 <= statistics["train/staleness"] < 20
    assert -0.7 < statistics["train/entropy_loss"] < -0.6  # a new policy is nearly uniform: -log 2
    assert sum(value for key, value in statistics.items() if key.startswith("time/")) == pytest.approx(1.0)
    assert collector.store.n_updates == 20  # 400 transitions, 2 environments of 10 steps in each update


@pytest.mark.parametrize("vec_env", [DummyVecEnv, pytest.param(SubprocVecEnv, marks=pytest.mark.slow)])
def test_fast_workers_do_not_wait_for_a_slow_one(vec_env: type[VecEnv]) -> None:
    def train(n_workers: int, *seconds: float) -> tuple[float, dict[int, list[int]], int]:
        """Steps per second of environment 0, the step numbers of each environment, and the largest backlog."""
        env = sleeping_env(vec_env, *seconds)
        times: list[float] = []
        steps: dict[int, list[int]] = {i: [] for i in range(env.num_envs)}
        backlog = 0

        def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
            nonlocal backlog
            for info in local["infos"]:
                steps[info["env_index"]].append(info["n_steps"])
                if info["env_index"] == 0:
                    times.append(info["time"])
            queues = local["self"]._collector._assembler._queues
            backlog = max(backlog, *(len(queue) for queue in queues))
            return len(times) < 300

        A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(100_000, callback=note)
        env.close()
        return (len(times) - 51) / (times[-1] - times[50]), steps, backlog

    fast, slow = 0.002, 0.02
    for _ in range(3):  # rates vary on a busy machine
        alone, _, _ = train(1, fast, fast)
        rate, steps, backlog = train(2, fast, fast, fast, slow)
        print(f"steps per second of the fast worker: {rate:.0f} beside a slow one, {alone:.0f} alone: {rate / alone:.2f}")
        if rate >= 0.9 * alone:
            break
    assert rate >= 0.9 * alone
    for numbers in steps.values():
        assert numbers == list(range(1, len(numbers) + 1))
    assert len(steps[0]) > 3 * len(steps[3]) > 0
    assert backlog <= 10 * MAX_ROLLOUTS_WAITING  # so memory stays bounded


def test_the_main_process_uses_the_cores_that_workers_leave() -> None:
    seen: set[int] = set()

    def note(_: dict[str, Any], __: dict[str, Any]) -> bool:
        seen.add(th.get_num_threads())
        return True

    before = th.get_num_threads()
    th.set_num_threads(2)
    try:
        A3C("MlpPolicy", cartpole(64), n_workers=n_cores()).learn(100, callback=note)
        assert seen == {1}
        assert th.get_num_threads() == 2
    finally:
        th.set_num_threads(before)


class Pids(BaseCallback):
    """Collects the processes that the workers are."""

    def _on_training_start(self) -> None:
        self.seen: set[int] = set()

    def _on_step(self) -> bool:
        self.seen |= {info["pid"] for info in self.locals["infos"]}
        return True


def test_default_is_a_worker_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    for quota, n_workers in ((2.9, 2), (0.5, 1)):
        monkeypatch.setattr(machine, "cpu_quota", lambda root, quota=quota: quota)
        pids = Pids()
        A3C("MlpPolicy", DummyVecEnv([Countdown] * 4), n_steps=5, n_workers=None).learn(100, pids)
        assert len(pids.seen - {os.getpid()}) == len(pids.seen) == n_workers


@pytest.mark.slow
def test_callbacks_and_reports_cost_the_main_process_little(capsys: pytest.CaptureFixture[str]) -> None:
    """On Pong, with 16 environments and one worker for each core."""
    seconds: list[tuple[float, float]] = []

    def cpu_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls in (200, 1200):
                workers: Any = self.model._collector._workers  # type: ignore[attr-defined]
                seconds.append((time.process_time(), sum(map(cpu_seconds, workers.pids))))
            return self.n_calls < 1200

    A3C("CnnLstmPolicy", make_atari_env("PongNoFrameskip-v4", n_envs=16)).learn(1e9, Look(), log_interval=10)
    (main, workers), (main_later, workers_later) = seconds
    ratio = (main_later - main) / (workers_later - workers)
    with capsys.disabled():
        print(f"\nCPU seconds of the main process over those of its workers: {100 * ratio:.1f} %")
    assert ratio <= 0.03
