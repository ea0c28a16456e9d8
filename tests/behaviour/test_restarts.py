"""Workers that die or hang are replaced: real processes, really killed, and nothing is left of them."""

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_a3c import A3C, WorkerDiedError

N_STEPS = 5
REPLACED = pytest.mark.filterwarnings("ignore:Worker . was killed")


class Counting(gym.Env[Any, Any]):
    """Observes how many steps it has made; its episodes are ten steps long. Numbers that its seed makes are in the infos."""

    observation_space = spaces.Box(0, 10, (1,), dtype=np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        info = {"pid": os.getpid(), "number": float(self.np_random.random())}
        return self._obs(), 1.0, self.n == 10, False, info

    def _obs(self) -> Any:
        return np.array([self.n], dtype=np.float32)


class Called(Counting):
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.n_calls = 0

    def called(self) -> int:
        self.n_calls += 1
        return self.n_calls


class Fatal(Counting):
    """Does something terrible at its first step after a file has gone."""

    def __init__(self, file: Path, number: int) -> None:
        self.file = file
        self.number = number

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        try:
            self.file.unlink()
        except FileNotFoundError:
            return super().step(action)
        if self.number > 0:
            os.kill(os.getpid(), self.number)
        time.sleep(60 if self.number == 0 else 0)
        os._exit(3)


class Seen(BaseCallback):
    """What a callback sees, and whom it kills."""

    def __init__(self, kill_at: set[int] | None = None) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []
        self.killed: list[int] = []
        self.kill_at = kill_at or set()

    def _on_step(self) -> bool:
        self.infos += self.locals["infos"]
        self.n_restarts = self.model._collector.n_restarts  # type: ignore[attr-defined]
        if self.n_calls in self.kill_at:
            pids = self.model._collector._workers.pids  # type: ignore[attr-defined]
            victim = pids[len(self.killed) % len(pids)]
            self.killed.append(victim)
            os.kill(victim, signal.SIGKILL)
        return True


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.processes.supervisor.LOOK_SECONDS", 0.05)


def counting(n_envs: int = 4) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(Counting())] * n_envs)


def workers() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}


@REPLACED
def test_training_goes_on_to_its_end_and_counts_exactly() -> None:
    before, files = segments(), len(os.listdir("/proc/self/fd"))
    total, seen = 4000, Seen(kill_at={100, 500})
    model = A3C("MlpPolicy", counting(), n_steps=N_STEPS, n_workers=2, seed=1)
    model.learn(total, callback=seen)
    assert len(seen.killed) == 2
    assert total <= model.num_timesteps <= total + 2 * N_STEPS * 2
    assert len(seen.infos) == model.num_timesteps // 4 * 4
    assert len({info["pid"] for info in seen.infos}) >= 4
    assert model.policy.optimizer.state_dict()["state"][0]["step"] > 0
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert not workers()
    assert segments() <= before
    assert len(os.listdir("/proc/self/fd")) <= files + 3


@REPLACED
@pytest.mark.timeout(60)
def test_a_replacement_has_new_episodes_and_seeds_of_its_own() -> None:
    streams: dict[tuple[int, int], list[float]] = {}

    class KillOneAfterTheOther(Seen):
        def _on_step(self) -> bool:
            super()._on_step()
            for info in self.locals["infos"]:
                streams.setdefault((info["pid"], info["env_index"]), []).append(info["number"])
            n_seen = sum(len(stream) >= 5 for stream in streams.values())
            self.kill_at = {self.n_calls + 1} if n_seen == 2 + len(self.killed) < 4 else set()
            return n_seen < 4

    A3C("MlpPolicy", counting(2), n_steps=N_STEPS, n_workers=2, seed=1).learn(10**9, callback=KillOneAfterTheOther())
    first = [tuple(stream[:5]) for stream in streams.values()]
    assert len(set(first)) == len(first) == 4


def test_it_is_said_each_time_and_logged() -> None:
    said = r"^Worker \d was killed by SIGKILL.* It was replaced: restart \d of at most 10\.$"
    model = A3C("MlpPolicy", counting(), n_steps=N_STEPS, n_workers=2)
    logger = configure(None, [])
    logged: list[Any] = []
    logger.record = lambda key, value, exclude=None: logged.append(value) if "restarts" in key else None  # type: ignore[method-assign]
    model.set_logger(logger)
    with pytest.warns(UserWarning, match=said) as warned:
        model.learn(2000, callback=Seen(kill_at={50, 150}), log_interval=10)
    assert [str(warning.message).split("restart ")[1][0] for warning in warned] == ["1", "2"]
    assert logged[0] == 1 and logged[-1] == 2 and sorted(logged) == logged


@REPLACED
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "Worker 0 was killed by SIGKILL"),
        (signal.SIGTERM, "Worker 0 was killed by SIGTERM"),
        (signal.SIGSEGV, "Worker 0 was killed by SIGSEGV. Most likely C code"),
        (-1, "Worker 0 exited with code 3"),
        (0, r"Worker 0 was killed, as it had not come further for 0\.5 s"),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGSEGV", "os._exit", "hang"],
)
def test_deaths_of_all_kinds(number: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    arguments: Any = dict(n_steps=N_STEPS, n_workers=1, worker_timeout=0.5)
    for max_worker_restarts in (1, 0):
        file.touch()
        model = A3C(
            "MlpPolicy", DummyVecEnv([lambda: Fatal(file, number)]), max_worker_restarts=max_worker_restarts, **arguments
        )
        if max_worker_restarts:
            with pytest.warns(UserWarning, match=f"^{message}"):
                model.learn(100)
            assert 100 <= model.num_timesteps <= 105
        else:
            with pytest.raises(WorkerDiedError, match=f"^{message}"):
                model.learn(100)
    assert not workers()


@REPLACED
def test_a_worker_that_dies_again_and_again_ends_learn(tmp_path: Path) -> None:
    class Hopeless(Counting):
        def step(self, action: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    model = A3C("MlpPolicy", DummyVecEnv([Hopeless]), n_workers=1, max_worker_restarts=2)
    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL") as raised:
        model.learn(100)
    assert raised.value.__notes__ == ["2 workers were replaced before: max_worker_restarts is used up."]
    assert model.num_timesteps == 0


@REPLACED
def test_a_call_to_the_environments_that_meets_a_death_is_answered() -> None:
    """By the new worker; the others are called once."""

    class Calls(Seen):
        calls: ClassVar[list[list[int]]] = []

        def _on_step(self) -> bool:
            go_on = super()._on_step()
            if self.n_calls in self.kill_at:
                self.calls.append(self.training_env.env_method("called"))
            return go_on

    seen = Calls(kill_at={50, 100, 150})
    model = A3C("MlpPolicy", DummyVecEnv([Called] * 4), n_steps=N_STEPS, n_workers=2)
    model.learn(2000, callback=seen)
    # worker 0, 1, 0 died: each time its two environments are new, and have not been called yet
    assert seen.calls == [[1, 1, 1, 1], [2, 2, 1, 1], [1, 1, 2, 2]]
    assert seen.n_restarts == 3
    assert 2000 <= model.num_timesteps <= 2000 + 2 * N_STEPS * 2


@REPLACED
def test_statistics_of_vec_normalize_survive() -> None:
    env = VecNormalize(counting(), norm_reward=False)
    seen = Seen(kill_at={100, 200})
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2)
    model.learn(2000, callback=seen)
    statistics: Any = env.obs_rms
    assert len(seen.killed) == 2
    assert 2000 <= statistics.count <= 2000 + 100  # and what the dead had not yet told is not in it
    assert statistics.mean[0] == pytest.approx(4.5, abs=0.3)


@REPLACED
def test_a_changed_hyper_parameter_reaches_the_replacement() -> None:
    class UpdateHyperparams(Seen):
        def _on_step(self) -> bool:
            if self.n_calls == 20:
                self.model.n_steps = 3  # type: ignore[attr-defined]
            return super()._on_step()

    seen = UpdateHyperparams(kill_at={60})
    model = A3C("MlpPolicy", counting(2), n_steps=N_STEPS, n_workers=1)
    model.learn(1000, callback=seen)
    assert model.num_timesteps >= 1000


@pytest.mark.filterwarnings("ignore:The process")  # that was in a step, and does not answer any more
def test_a_worker_with_a_subproc_vec_env_is_not_replaced() -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=SubprocVecEnv)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2)
    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL"):
        model.learn(100_000, callback=Seen(kill_at={50}))
    assert model._n_updates > 0
    with contextlib.suppress(ConnectionError, EOFError):
        env.close()


def test_waiting_is_no_hang() -> None:
    """A callback that takes its time: workers wait for credit much longer than the timeout."""

    class Slow(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls in (5, 10):
                time.sleep(1.2)
            return True

    model = A3C("MlpPolicy", counting(2), n_steps=N_STEPS, n_workers=2, worker_timeout=0.5)
    model.learn(200, callback=Slow())
    assert model.num_timesteps >= 200


def test_a_slow_reset_is_no_hang() -> None:
    class SlowStart(Counting):
        def reset(self, **kwargs: Any) -> Any:
            if not hasattr(self, "n"):
                time.sleep(1.2)
            return super().reset(**kwargs)

    model = A3C("MlpPolicy", DummyVecEnv([SlowStart]), n_steps=N_STEPS, n_workers=1, worker_timeout=0.5)
    model.learn(20)


class Suicidal(th.optim.SGD):
    """Dies in the middle of a step, once for each file in a folder."""

    def __init__(self, parameters: Any, lr: float, folder: Path) -> None:
        super().__init__(parameters, lr)
        self.param_groups[0]["folder"] = folder  # what else an optimizer has does not travel

    def step(self, closure: Any = None) -> Any:
        die_once(self.param_groups[0]["folder"])
        return super().step(closure)


class Deadly:
    """Kills the process that sends it, once for each file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        die_once(self.folder)
        return str, ()


class WithDeadlyInfos(Counting):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, {**info, "deadly": Deadly(self.folder)}


def die_once(folder: Path) -> None:
    """Only worker processes die, and not all at once."""
    if not multiprocessing.current_process().name.startswith("a3c-worker") or random.random() > 0.1:
        return
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


@REPLACED
@pytest.mark.parametrize("n_deaths", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["in the optimizer", "in pickling a report"])
def test_death_at_the_worst_moment(moment: str, n_deaths: int, tmp_path: Path) -> None:
    for i in range(n_deaths):
        (tmp_path / str(i)).touch()
    in_optimizer = moment == "in the optimizer"
    optimizer: Any = dict(optimizer_class=Suicidal, optimizer_kwargs=dict(folder=tmp_path)) if in_optimizer else {}
    env = counting() if in_optimizer else DummyVecEnv([lambda: WithDeadlyInfos(tmp_path)] * 4)
    total = 400 * n_deaths
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2, max_worker_restarts=n_deaths, policy_kwargs=optimizer)
    seen = Seen()
    model.learn(total, callback=seen)
    assert list(tmp_path.iterdir()) == []
    assert seen.n_restarts == n_deaths
    assert total <= model.num_timesteps <= total + 2 * N_STEPS * 2
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert not workers()


def test_what_is_saved_knows_how_often_workers_may_die(tmp_path: Path) -> None:
    A3C("MlpPolicy", counting(), n_workers=0, max_worker_restarts=3, worker_timeout=None).save(tmp_path / "model")
    model = A3C.load(tmp_path / "model")
    assert (model.max_worker_restarts, model.worker_timeout) == (3, None)
    assert pickle.loads(pickle.dumps(WorkerDiedError("x"))).args == ("x",)
