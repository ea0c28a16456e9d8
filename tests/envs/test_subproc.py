"""A SubprocVecEnv that was lent to workers can be used again, also when a worker died in the middle of a step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_a3c import A3C, WorkerDiedError
from sb3_a3c.envs import subproc
from sb3_a3c.workers.worker_processes import WorkerProcesses


class Slow(gym.Env[Any, Any]):
    """Observes the number of its steps, each of which takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.observation_space = spaces.Box(0, np.inf, (1,))
        self.action_space = spaces.Discrete(2)
        self.render_mode = None
        self.seconds, self.t = seconds, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        self.t += 1
        return np.full(1, self.t, dtype=np.float32), 0.0, False, False, {}


pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def env() -> Iterator[SubprocVecEnv]:
    """One for several tests, each of which has to leave it usable."""
    env = SubprocVecEnv([lambda: Slow(0.3)] * 4)
    yield env
    env.close()


def kill_second_worker(local: dict[str, Any], _: dict[str, Any]) -> bool:
    os.kill(local["self"]._collector._workers.pids[1], signal.SIGKILL)
    return True


def interrupt(*_: Any) -> bool:
    raise KeyboardInterrupt


def test_usable_after_a_worker_was_killed_in_a_step(env: SubprocVecEnv) -> None:
    model = A3C("MlpPolicy", env, n_workers=2, n_steps=2)
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        model.learn(1000, callback=kill_second_worker)
    assert env.reset().tolist() == [[0]] * 4  # type: ignore[union-attr]
    for t in range(1, 4):
        assert env.step(np.zeros(4, dtype=int))[0].tolist() == [[t]] * 4  # type: ignore[union-attr]
    assert env.get_attr("seconds") == [0.3] * 4
    model.learn(8)
    assert model.num_timesteps == 8


def test_a_worker_that_is_stopped_finishes_its_step(env: SubprocVecEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerProcesses, "stop_seconds", 0.01)
    model = A3C("MlpPolicy", env, n_workers=2, n_steps=2)
    for callback, outcome in ((lambda *_: False, nullcontext()), (interrupt, pytest.raises(KeyboardInterrupt))):
        with outcome:
            model.learn(1000, callback=callback)
        assert not any(pipe.poll() for pipe in env.remotes)
        assert env.reset().tolist() == [[0]] * 4  # type: ignore[union-attr]


def test_usable_after_ctrl_c_in_a_step_of_the_main_process(env: SubprocVecEnv) -> None:
    model = A3C("MlpPolicy", env, n_workers=0, n_steps=2)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))  # three steps take 0.9 s, the fourth until 1.2
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000)
    model.learn(8)
    assert env.reset().tolist() == [[0]] * 4  # type: ignore[union-attr]


def test_ctrl_c_interrupts_the_first_reset_in_the_main_process() -> None:
    class Reluctant(Slow):
        def reset(self, **kwargs: Any) -> Any:
            time.sleep(20)
            return super().reset(**kwargs)

    model = A3C("MlpPolicy", DummyVecEnv([lambda: Reluctant(0.0)]), n_workers=0)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_warning_if_ctrl_c_has_ended_the_processes_while_the_workers_are_idle(n_workers: int) -> None:
    env = SubprocVecEnv([lambda: Slow(0.0)] * 2)

    def wait_for_ctrl_c(local: dict[str, Any], _: dict[str, Any]) -> bool:
        time.sleep(0.5)  # the workers have no tickets any more
        for process in env.processes:  # a terminal sends it to all processes
            os.kill(process.pid, signal.SIGINT)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match=r"environments \[0, 1\] do not answer any more.*Ctrl-C.*make a new one"),
    ):
        A3C("MlpPolicy", env, n_workers=n_workers, n_steps=2).learn(1000, callback=wait_for_ctrl_c)
    for process in env.processes:
        process.join(10)
        assert process.exitcode == 0  # SB3's processes end by themselves


def test_closing_a_lent_env_leaves_the_processes_running(env: SubprocVecEnv) -> None:
    share = subproc.lend(env, [1, 2])
    assert share.num_envs == 2
    assert share.reset().shape == (2, 1)  # type: ignore[union-attr]
    share.close()
    assert all(process.is_alive() for process in env.processes)
    assert env.get_attr("t") == [0] * 4


def test_environments_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    env = SubprocVecEnv([lambda: Slow(2.0)] * 3)
    monkeypatch.setattr(subproc, "TAKE_BACK_SECONDS", 0.5)
    env.reset()
    env.remotes[2].send(("step", 0))
    env.processes[1].kill()
    env.processes[1].join()
    with pytest.warns(UserWarning, match=r"environments \[1, 2\] do not answer any more.*make a new one"):
        subproc.take_back(env, range(3))
    assert env.get_attr("t", indices=[0]) == [0]
    env.remotes = env.remotes[:1]  # close() would wait for those that are gone
    for process in env.processes[1:]:
        process.kill()
    env.close()
