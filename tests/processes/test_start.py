"""How workers start: from a fork server of their own, whoever else uses multiprocessing, and nothing changes for others."""

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.start import prepared_start, process_context
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.collector import PRELOAD

pytestmark = pytest.mark.timeout(120)
needs_fork = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork server here")


def say_hello(channel: WorkerChannel, *_: Any) -> None:
    channel.send((os.getpid(), os.getppid()))


def run(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def hello(**kwargs: Any) -> list[tuple[int, int]]:
    """Start two workers: (process id, parent's process id) of each."""
    supervisor, messages = Supervisor(say_hello, [(), ()], preload=PRELOAD, **kwargs), []
    supervisor.start()
    try:
        while not supervisor.finished:
            messages += supervisor.receive(timeout=30)
    finally:
        supervisor.stop()
    return [pids for _, pids in sorted(messages)]


def others_world() -> dict[str, Any]:
    """What other users of multiprocessing share with us."""
    from multiprocessing import forkserver, resource_tracker

    assert forkserver.connect_to_new_process == forkserver._forkserver.connect_to_new_process
    return {
        "main": sys.modules["__main__"],
        "preload": list(forkserver._forkserver._preload_modules),  # type: ignore[attr-defined]
        "server": forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        "connect": forkserver.connect_to_new_process,
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


# --- a fork server of our own ---------------------------------------------------------------------------------------

OTHERS_FIRST = """
import multiprocessing, os, time
from multiprocessing import forkserver
from pathlib import Path

class Nothing:
    def __call__(self):
        pass

def imported_torch(pid):
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

def say_hello(channel):
    channel.send((os.getppid(), imported_torch(os.getppid())))

def start_workers():
    supervisor, messages, began = Supervisor(say_hello, [(), ()], preload=PRELOAD), [], time.perf_counter()
    supervisor.start()
    while not supervisor.finished:
        messages += supervisor.receive(timeout=30)
    seconds = time.perf_counter() - began
    supervisor.stop()
    return seconds, {message for _, message in messages}

if __name__ == "__main__":
    other = multiprocessing.get_context("forkserver").Process(target=Nothing())
    other.start()
    other.join()
    shared_server = forkserver._forkserver._forkserver_pid
    from sb3_a3c.workers.collector import PRELOAD
    from sb3_a3c.processes.supervisor import Supervisor

    (first_seconds, first), *later = [start_workers() for _ in range(4)]
    ((server, has_torch),) = first
    print("torch in the shared server:", imported_torch(shared_server))
    print("torch in the workers' server:", has_torch)
    print("one server for all:", all(parents == first for _, parents in later))
    print("another than the shared one:", server != shared_server == forkserver._forkserver._forkserver_pid)
    print("seconds:", min(seconds for seconds, _ in later))
"""


@needs_fork
def test_workers_start_from_a_server_with_torch_though_others_have_started_one_without(tmp_path: Path) -> None:
    output = run(OTHERS_FIRST, tmp_path)
    assert "torch in the shared server: False" in output
    assert "torch in the workers' server: True" in output
    assert "one server for all: True" in output
    assert "another than the shared one: True" in output
    seconds = float(output.split("seconds:")[1])
    print(f"two workers start, say hello and end within {seconds:.2f} s (the fastest of three times)")
    assert seconds < 1


@needs_fork
def test_others_use_their_own_fork_server_before_and_after(my_preload: list[str]) -> None:
    (_, server), (_, same) = hello()
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    other.start()
    other.join()
    assert other.exitcode == 0
    shared_server = others_world()["server"]
    assert shared_server not in (None, server)
    assert hello()[0][1] == server == same
    assert others_world()["server"] == shared_server


# --- what is left alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", multiprocessing.get_all_start_methods()[1:])
def test_a_start_changes_nothing_for_others(start_method: str, my_preload: list[str]) -> None:
    hello()  # starts the server and the resource tracker, which stay
    before = others_world()
    assert before["preload"] == my_preload
    assert len(hello(start_method=start_method)) == 2
    assert others_world() == before


@pytest.mark.parametrize("start_method", multiprocessing.get_all_start_methods()[1:])
def test_a_failed_start_changes_nothing_for_others(start_method: str, my_preload: list[str]) -> None:
    hello()
    before = others_world()
    supervisor = Supervisor(say_hello, [(), (threading.Lock(),)], start_method, PRELOAD)
    with pytest.raises(TypeError, match="cannot pickle"):
        supervisor.start()
    assert others_world() == before
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]
    assert len(hello()) == 2


def test_the_main_module_is_away_only_while_processes_start() -> None:
    main = sys.modules["__main__"]
    assert hasattr(main, "__file__")
    with prepared_start(process_context("spawn"), ()):
        stand_in = sys.modules["__main__"]
    assert sys.modules["__main__"] is main
    assert stand_in is not main
    assert stand_in.__name__ == "__main__"
    assert (getattr(stand_in, "__file__", None), stand_in.__spec__) == (None, None)
    with pytest.raises(KeyError), prepared_start(process_context("spawn"), ()):
        raise KeyError
    assert sys.modules["__main__"] is main


def test_several_threads_may_start_workers_at_once() -> None:
    hello()
    before, results = others_world(), []
    threads = [threading.Thread(target=lambda: results.append(hello())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 4
    pids = {pid for workers in results for pid, _ in workers}
    assert len(pids) == 8
    assert others_world() == before


def test_the_platforms_best_start_method_is_taken_unless_one_is_named() -> None:
    available = multiprocessing.get_all_start_methods()
    assert process_context(None).get_start_method() == ("forkserver" if "forkserver" in available else "spawn")
    for name in available[1:]:
        assert process_context(name).get_start_method() == name


# --- forked processes -----------------------------------------------------------------------------------------------

FORK = """
import os
import torch
torch.set_num_threads(1)  # a forked process hangs in torch if its parent has used torch's threads
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

def train(name):
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_workers=2, n_steps=5, take_turns=True)
    servers = set()
    def note(local_variables, _):
        servers.update(parents(local_variables["self"]._collector._workers.pids))
        return True
    model.learn(100, callback=note)
    print(name, os.getpid(), "steps", model.num_timesteps, "updates", model._n_updates, "server", *servers, flush=True)

def parents(pids):
    for pid in pids:
        try:
            yield int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
        except FileNotFoundError:
            pass

train("parent")
child = os.fork()
if child == 0:
    code = 1
    try:
        train("child")
        train("child")
        code = 0
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
assert status == 0, status
train("parent")
"""


@needs_fork
def test_a_process_forked_after_a_training_can_train_too(tmp_path: Path) -> None:
    lines = re.findall(r"(\w+) (\d+) steps (\d+) updates (\d+) server (\d+)\n", run(FORK, tmp_path))
    assert [name for name, *_ in lines] == ["parent", "child", "child", "parent"]
    assert {(steps, updates) for _, _, steps, updates, _ in lines} == {("100", "20")}
    servers = [(pid, server) for _, pid, _, _, server in lines]
    assert servers[0] == servers[3]  # one for each process, which stays
    assert servers[1] == servers[2]
    assert len({server for _, server in servers}) == 2
