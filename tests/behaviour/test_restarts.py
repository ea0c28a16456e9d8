"""Workers that die or hang are replaced, and training continues; these tests kill real processes."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

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
from sb3_a3c.actor_learner.report import Report
from tests.toy_envs import Countdown

N_STEPS = 5
WORKER_0 = r"Worker 0( on host-\d)?"  #: with ``--on-hosts`` messages name the host
REPLACED = pytest.mark.filterwarnings("ignore:Worker .( on host-.)? was killed")


class Called(Countdown):
    n_calls = 0

    def called(self) -> int:
        self.n_calls += 1
        return self.n_calls


class Fatal(Countdown):
    """Ends its process, or hangs, at the first step at which the file exists; deletes the file."""

    def __init__(self, file: Path, how: signal.Signals | str) -> None:
        super().__init__()
        self.file, self.how = file, how

    def step(self, action: Any) -> Any:
        try:
            self.file.unlink()
        except FileNotFoundError:
            return super().step(action)
        if isinstance(self.how, signal.Signals):
            os.kill(os.getpid(), self.how)
        time.sleep(60 if self.how == "hang" else 0)
        os._exit(3)


class Seen(BaseCallback):
    """Collects the infos; kills a worker at each of the calls ``kill_at``, in turn of those in the step."""

    def __init__(self, kill_at: set[int] | None = None) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []
        self.killed: dict[int, int] = {}  # process ids, each with the index of one of its environments
        self.kill_at = kill_at or set()

    def _on_step(self) -> bool:
        self.infos += self.locals["infos"]
        self.n_restarts = self.model._collector.n_restarts  # type: ignore[attr-defined]
        if self.n_calls in self.kill_at:
            # each environment's worker is that of its last step that is known
            env_of = {info["pid"]: info["env_index"] for info in self.locals["infos"] if info["pid"] not in self.killed}
            victim = list(env_of)[len(self.killed) % len(env_of)]
            self.killed[victim] = env_of[victim]
            os.kill(victim, signal.SIGKILL)
        return True


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.processes.heartbeats.LOOK_SECONDS", 0.05)


def countdowns(n_envs: int = 4) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(Countdown())] * n_envs)


def workers() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


def segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}


@REPLACED
def test_training_continues_to_its_end_and_counts_exactly() -> None:
    before, files = segments(), len(os.listdir("/proc/self/fd"))
    total, seen = 4000, Seen(kill_at={100, 500})
    model = A3C("MlpPolicy", countdowns(), n_steps=N_STEPS, n_workers=2, seed=1)
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
def test_a_replacement_has_its_own_seeds() -> None:
    streams: dict[tuple[int, int], list[float]] = {}

    class KillInTurn(Seen):
        def _on_step(self) -> bool:
            super()._on_step()
            for info in self.locals["infos"]:
                streams.setdefault((info["pid"], info["env_index"]), []).append(info["number"])
            n_seen = sum(len(stream) >= 5 for stream in streams.values())
            self.kill_at = {self.n_calls + 1} if n_seen == 2 + len(self.killed) < 4 else set()
            return n_seen < 4

    A3C("MlpPolicy", countdowns(2), n_steps=N_STEPS, n_workers=2, seed=1).learn(10**9, callback=KillInTurn())
    first = [tuple(stream[:5]) for stream in streams.values()]
    assert len(set(first)) == len(first) == 4


def test_each_restart_is_a_warning_and_logged() -> None:
    message = r"^Worker \d( on host-\d)? was killed by SIGKILL.* It was replaced: restart \d of at most 10\.$"
    model = A3C("MlpPolicy", countdowns(), n_steps=N_STEPS, n_workers=2)
    logger = configure(None, [])
    logged: list[Any] = []
    logger.record = lambda key, value, exclude=None: logged.append(value) if "restarts" in key else None  # type: ignore[method-assign]
    model.set_logger(logger)
    with pytest.warns(UserWarning, match=message) as warned:
        model.learn(2000, callback=Seen(kill_at={50, 150}), log_interval=10)
    assert [str(warning.message).split("restart ")[1][0] for warning in warned] == ["1", "2"]
    assert logged[0] == 1 and logged[-1] == 2 and sorted(logged) == logged


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, f"{WORKER_0} was killed by SIGKILL"),
        (signal.SIGTERM, f"{WORKER_0} was killed by SIGTERM"),
        (signal.SIGSEGV, f"{WORKER_0} was killed by SIGSEGV. Most likely C code"),
        ("os._exit", f"{WORKER_0} exited with code 3"),
        ("hang", rf"{WORKER_0} was killed because it made no progress for 0\.5 s"),
    ],
)
def test_each_kind_of_death(how: signal.Signals | str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    env = DummyVecEnv([lambda: Fatal(file, how)])
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=1, max_worker_restarts=1, worker_timeout=0.5)
    with pytest.warns(UserWarning, match=f"^{message}"):
        model.learn(100)
    assert 100 <= model.num_timesteps <= 105
    assert not workers()


@REPLACED
@pytest.mark.parametrize("max_worker_restarts", [0, 2])
def test_max_worker_restarts(max_worker_restarts: int) -> None:
    class AlwaysDies(Countdown):
        def step(self, action: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    model = A3C("MlpPolicy", DummyVecEnv([AlwaysDies]), n_workers=1, max_worker_restarts=max_worker_restarts)
    with pytest.raises(WorkerDiedError, match=f"{WORKER_0} was killed by SIGKILL") as raised:
        model.learn(100)
    if max_worker_restarts:
        assert raised.value.__notes__ == ["2 workers were replaced before: max_worker_restarts is used up."]
    assert model.num_timesteps == 0
    assert not workers()


def test_no_shared_memory_stays_after_a_death() -> None:
    """Although the exception's traceback still refers to what `learn` has used, and nothing is collected as garbage."""

    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/torch_" in line]

    gc.collect()
    before = mapped()
    gc.disable()
    try:
        with pytest.raises(WorkerDiedError) as raised:
            A3C("MlpPolicy", countdowns(), n_workers=2, max_worker_restarts=0).learn(10_000, callback=Seen(kill_at={5}))
        assert set(mapped()) <= set(before)
        del raised
    finally:
        gc.enable()


@REPLACED
def test_a_replacement_answers_the_call_during_which_its_predecessor_died() -> None:
    """The other workers are called once."""

    class Calls(Seen):
        calls: ClassVar[list[list[int]]] = []

        def _on_step(self) -> bool:
            super()._on_step()
            if self.n_calls in self.kill_at:
                self.calls.append(self.training_env.env_method("called"))
            return True

    seen = Calls(kill_at={50, 100, 150})
    model = A3C("MlpPolicy", DummyVecEnv([Called] * 4), n_steps=N_STEPS, n_workers=2)
    model.learn(2000, callback=seen)
    counts, expected = [0] * 4, []
    for env_index in seen.killed.values():  # its worker's two environments are new, and have not been called before
        counts = [1 if i // 2 == env_index // 2 else count + 1 for i, count in enumerate(counts)]
        expected.append(counts)
    assert seen.calls == expected
    assert seen.n_restarts == len(expected) == 3
    assert 2000 <= model.num_timesteps <= 2000 + 2 * N_STEPS * 2


@REPLACED
def test_vec_normalize_keeps_its_statistics() -> None:
    env = VecNormalize(countdowns(), norm_reward=False)
    seen = Seen(kill_at={100, 200})
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2)
    model.learn(2000, callback=seen)
    statistics: Any = env.obs_rms
    assert len(seen.killed) == 2
    assert 2000 <= statistics.count <= 2000 + 100  # without what the killed workers had not reported
    assert statistics.mean[0] == pytest.approx(4.5, abs=0.3)


@REPLACED
def test_a_replacement_has_the_current_hyperparameters() -> None:
    lengths: list[int] = []  # of the rollouts

    class Shorten(Seen):
        def _on_rollout_start(self) -> None:
            if not lengths:  # nothing has been received yet
                assembler = self.model._collector._assembler  # type: ignore[attr-defined]
                self.add, assembler.add = assembler.add, self.record

        def _on_step(self) -> bool:
            if self.n_calls == 20:
                self.model.n_steps = 3  # type: ignore[attr-defined]
            return super()._on_step()

        def record(self, report: Report) -> None:
            lengths.append(len(report.rewards))
            self.add(report)

    seen = Shorten(kill_at={100})
    A3C("MlpPolicy", countdowns(2), n_steps=N_STEPS, n_workers=1).learn(1000, callback=seen)
    assert len({info["pid"] for info in seen.infos}) == 2
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) == {N_STEPS, 3}


@pytest.mark.filterwarnings("ignore:The process")  # which was in a step and does not answer any more
def test_a_worker_with_a_subproc_vec_env_is_not_replaced() -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=SubprocVecEnv)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2)

    def kill(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps == 100:
            os.kill(local["self"]._collector._workers.pids[0], signal.SIGKILL)
        return True

    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL"):
        model.learn(100_000, callback=kill)
    assert model._n_updates > 0
    with contextlib.suppress(ConnectionError, EOFError):
        env.close()


def test_waiting_for_a_slow_callback_is_no_hang() -> None:
    class Slow(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                time.sleep(1.0)  # the workers use up their tickets and wait
            return True

    model = A3C("MlpPolicy", countdowns(2), n_steps=N_STEPS, n_workers=2, worker_timeout=0.5)
    model.learn(200, callback=Slow())
    assert model.num_timesteps >= 200


def test_a_slow_reset_is_no_hang() -> None:
    class SlowStart(Countdown):
        def reset(self, **kwargs: Any) -> Any:
            if self.n_episodes == 0:
                time.sleep(1.0)
            return super().reset(**kwargs)

    model = A3C("MlpPolicy", DummyVecEnv([SlowStart]), n_steps=N_STEPS, n_workers=1, worker_timeout=0.5)
    model.learn(20)


class StuckInC(Countdown):
    """Observes 20,000 numbers; at its 30th step it calls C code that keeps Python's lock."""

    observation_space = spaces.Box(-np.inf, np.inf, (20_000,), np.float32)

    def __init__(self, gets_stuck: bool) -> None:
        super().__init__()
        self.gets_stuck = gets_stuck

    def observation(self) -> Any:
        return np.full(20_000, self.t, dtype=np.float32)

    def step(self, action: Any) -> Any:
        if self.gets_stuck and self.n_steps == 30:
            ctypes.PyDLL(None).sleep(60)
        return super().step(action)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ended_by", ["worker_timeout", "Ctrl-C"])
def test_a_worker_that_reads_nothing_ends(ended_by: str) -> None:
    """The statistics of VecNormalize, of which each worker is sent the others', soon fill its pipe."""
    env = VecNormalize(DummyVecEnv([lambda: StuckInC(True), lambda: StuckInC(False)]))
    timeout, error = (1.0, WorkerDiedError) if ended_by == "worker_timeout" else (None, KeyboardInterrupt)
    model = A3C(
        "MlpPolicy",
        env,
        n_steps=N_STEPS,
        n_workers=2,
        worker_timeout=timeout,
        max_worker_restarts=0,
        policy_kwargs=dict(net_arch=[4]),
    )

    def interrupt(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if ended_by == "Ctrl-C" and local["self"].num_timesteps == 200:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return True

    with pytest.raises(error):
        model.learn(10**9, callback=interrupt)
    assert model.num_timesteps >= 200
    assert not workers()


class DeadlyOptimizer(th.optim.SGD):
    """Kills its process in ``step``, once for each file in a folder."""

    def __init__(self, parameters: Any, lr: float, folder: Path) -> None:
        super().__init__(parameters, lr)
        self.param_groups[0]["folder"] = folder  # other attributes of an optimizer are not sent

    def step(self, closure: Any = None) -> Any:
        die_once(self.param_groups[0]["folder"])
        return super().step(closure)


class DeadlyInfo:
    """Kills the process that pickles it, once for each file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        die_once(self.folder)
        return str, ()


class WithDeadlyInfos(Countdown):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {**info, "deadly": DeadlyInfo(self.folder)}


def die_once(folder: Path) -> None:
    """In a worker process, with probability 0.1."""
    if not multiprocessing.current_process().name.startswith("a3c-worker") or random.random() > 0.1:
        return
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


@REPLACED
@pytest.mark.parametrize("n_deaths", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["in the optimizer", "in pickling a report"])
def test_death_in_an_update_or_while_a_report_is_sent(moment: str, n_deaths: int, tmp_path: Path) -> None:
    for i in range(n_deaths):
        (tmp_path / str(i)).touch()
    in_optimizer = moment == "in the optimizer"
    optimizer: Any = dict(optimizer_class=DeadlyOptimizer, optimizer_kwargs=dict(folder=tmp_path)) if in_optimizer else {}
    env = countdowns() if in_optimizer else DummyVecEnv([lambda: WithDeadlyInfos(tmp_path)] * 4)
    total = 400 * n_deaths
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2, max_worker_restarts=n_deaths, policy_kwargs=optimizer)
    seen = Seen()
    model.learn(total, callback=seen)
    assert list(tmp_path.iterdir()) == []
    assert seen.n_restarts == n_deaths
    assert total <= model.num_timesteps <= total + 2 * N_STEPS * 2
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    assert not workers()


def test_saved_models_have_max_worker_restarts_and_worker_timeout(tmp_path: Path) -> None:
    A3C("MlpPolicy", countdowns(), n_workers=0, max_worker_restarts=3, worker_timeout=None).save(tmp_path / "model")
    model = A3C.load(tmp_path / "model")
    assert (model.max_worker_restarts, model.worker_timeout) == (3, None)
