"""Workers start from a fork server of our own, and a start changes nothing for other users of multiprocessing."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.start import process_context
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.worker_processes import PRELOAD

pytestmark = pytest.mark.timeout(120)
START_METHODS = [name for name in multiprocessing.get_all_start_methods() if name != "fork"]
needs_fork = pytest.mark.skipif("forkserver" not in START_METHODS, reason="no fork server here")


def send_pids(channel: WorkerChannel, *_: Any) -> None:
    channel.send((os.getpid(), os.getppid()))


def start_workers(n: int = 2, **kwargs: Any) -> list[tuple[int, int]]:
    """Start workers and stop them. Returns (process id, parent's process id) of each."""
    supervisor, messages = Supervisor(send_pids, [()] * n, preload=PRELOAD, **kwargs), []
    supervisor.start()
    try:
        while not supervisor.finished:
            messages += supervisor.receive(timeout=30)
    finally:
        supervisor.stop()
    return [pids for _, pids in sorted(messages)]


def shared_state() -> dict[str, Any]:
    """What all users of multiprocessing share."""
    from multiprocessing import forkserver, resource_tracker, spawn

    assert forkserver.connect_to_new_process == forkserver._forkserver.connect_to_new_process
    return {
        "main": sys.modules["__main__"],
        "preload": list(forkserver._forkserver._preload_modules),  # type: ignore[attr-defined]
        "server": forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        "connect": forkserver.connect_to_new_process,
        "prepare": spawn.get_preparation_data,
        "ensure": forkserver.ensure_running,
        "tracker": resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
        "start method": multiprocessing.get_start_method(allow_none=True),
    }


@pytest.fixture
def my_preload() -> Iterator[list[str]]:
    """A list that a user has given to multiprocessing."""
    from multiprocessing import forkserver

    before = list(forkserver._forkserver._preload_modules)  # type: ignore[attr-defined]
    multiprocessing.set_forkserver_preload(["json", "html"])
    yield ["json", "html"]
    multiprocessing.set_forkserver_preload(before)


@needs_fork
def test_workers_have_a_fork_server_with_torch_and_others_theirs(my_preload: list[str]) -> None:
    (_, server), (_, same) = start_workers()
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    other.start()
    other.join()
    assert other.exitcode == 0
    shared_server = shared_state()["server"]
    assert shared_server not in (None, server)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert start_workers()[0][1] == server == same
        seconds.append(time.perf_counter() - began)
    assert shared_state()["server"] == shared_server
    assert "libtorch" in Path(f"/proc/{server}/maps").read_text()
    assert min(seconds) < 1


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_start_changes_nothing_for_others(start_method: str, my_preload: list[str]) -> None:
    start_workers()  # starts the server and the resource tracker, which stay
    before = shared_state()
    assert before["preload"] == my_preload
    assert len(start_workers(1, start_method=start_method)) == 1
    assert shared_state() == before


def test_a_failed_start_changes_nothing_for_others(my_preload: list[str]) -> None:
    start_workers()
    before = shared_state()
    supervisor = Supervisor(send_pids, [(), (threading.Lock(),)], preload=PRELOAD)
    with pytest.raises(TypeError, match="cannot pickle"):
        supervisor.start()
    assert shared_state() == before
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]
    assert len(start_workers()) == 2


def test_several_threads_may_start_workers_at_once() -> None:
    start_workers()
    before, results = shared_state(), []
    threads = [threading.Thread(target=lambda: results.append(start_workers())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({pid for workers in results for pid, _ in workers}) == 6
    assert shared_state() == before


def test_default_start_method() -> None:
    assert process_context(None).get_start_method() == ("forkserver" if "forkserver" in START_METHODS else "spawn")
    for name in START_METHODS:
        assert process_context(name).get_start_method() == name


@needs_fork
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_has_a_fork_server_of_its_own() -> None:
    (_, server), _ = start_workers()
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            writer.send([start_workers()[0][1] for _ in range(2)])
        finally:
            os._exit(0)
    writer.close()
    first, second = reader.recv()
    os.waitpid(child, 0)
    assert first == second != server
    assert start_workers()[0][1] == server


@pytest.mark.parametrize("n_workers", [2, None])
def test_a_module_that_trains_when_it_is_imported_starts_no_processes_in_the_workers(
    n_workers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers import it, because its environments are defined there."""
    name = f"trains_when_imported_{n_workers}"
    (tmp_path / f"{name}.py").write_text(f"""
from stable_baselines3.common.vec_env import DummyVecEnv
from sb3_a3c import A3C
from tests.toy_envs import Countdown

class E(Countdown):
    pass

A3C("MlpPolicy", DummyVecEnv([E] * 4), n_workers={n_workers}).learn(400)
""")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"An attempt .* has finished its bootstrapping phase") as raised:
        importlib.import_module(name)
    assert "if __name__ == '__main__':" in str(raised.value)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


OTHERS = """
import multiprocessing, pickle, sys, threading

class Mine:
    pass

def target():
    sys.exit(5)

errors, counts, is_over = [], [0, 0], threading.Event()

def use_main():
    try:
        while not is_over.wait(0.001):
            assert type(pickle.loads(pickle.dumps(Mine()))) is Mine
            assert sys.modules["__main__"].Mine is Mine
            counts[0] += 1
    except BaseException as error:
        errors.append(error)

def start_processes():
    try:
        while counts[1] < 2 or not is_over.wait(0.2):
            method = ("forkserver", "spawn")[counts[1] % 2]
            process = multiprocessing.get_context(method).Process(target=target)
            process.start()
            process.join()
            assert process.exitcode == 5, (method, process.exitcode)
            counts[1] += 1
    except BaseException as error:
        errors.append(error)

if __name__ == "__main__":
    from stable_baselines3.common.env_util import make_vec_env
    from sb3_a3c import A3C

    threads = [threading.Thread(target=use_main), threading.Thread(target=start_processes)]
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_workers=2, n_steps=5)
    for thread in threads:
        thread.start()
    model.learn(100)
    is_over.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert min(counts) > 0, counts
"""


@needs_fork
@pytest.mark.slow
def test_other_threads_use_the_main_module_and_start_processes_meanwhile(tmp_path: Path) -> None:
    """In a fresh interpreter, where the start of the fork server takes seconds."""
    (tmp_path / "script.py").write_text(OTHERS)
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, "")


class OfTheScript:
    """By pickle's rules it is to be imported from ``__main__``."""

    answer = 42


def test_arguments_may_be_of_classes_of_the_main_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OfTheScript, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "OfTheScript", OfTheScript, raising=False)
    supervisor = Supervisor(lambda channel, given: channel.send(given.answer), [(OfTheScript(),)], preload=PRELOAD)
    supervisor.start()
    try:
        assert supervisor.receive(timeout=30) == [(0, 42)]
    finally:
        supervisor.stop()


@needs_fork
def test_a_path_too_long_for_the_fork_servers_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("sb3_a3c.processes.start._server", None)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))  # type: ignore[attr-defined]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = shared_state()
    with pytest.raises(OSError, match=rf'its path in {tmp_path} would be too long.*TMPDIR.*start_method="spawn"'):
        start_workers(1)
    assert shared_state() == before
    assert len(start_workers(1, start_method="spawn")) == 1


def test_sigchld_ignored() -> None:
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match=r"while SIGCHLD is ignored.*signal\.SIGCHLD, signal\.SIG_DFL"):
            start_workers(1, start_method="spawn")
        if "forkserver" in START_METHODS:
            assert len(start_workers(1, start_method="forkserver")) == 1
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


FORK = """
import os
import torch
torch.set_num_threads(1)  # a forked process hangs in torch if its parent has used torch's threads
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

def train():
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_workers=2, n_steps=5, take_turns=True).learn(100)
    assert (model.num_timesteps, model._n_updates) == (100, 20)

train()
child = os.fork()
if child == 0:
    code = 1
    try:
        train()
        code = 0
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
assert status == 0, status
train()
"""


@pytest.mark.slow
@needs_fork
def test_a_process_forked_after_a_training_can_train_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FORK)
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
