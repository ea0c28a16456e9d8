"""Worker processes are started, watched, replaced and stopped, and leave nothing behind."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch as th

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.worker_processes import PRELOAD

pytestmark = pytest.mark.timeout(60)
Start = Callable[..., Supervisor]

# --- targets --------------------------------------------------------------------------------------------------------


def send_range(channel: WorkerChannel, n: int, then: str = "return") -> None:
    for i in range(n):
        channel.send(i)
    if then == "raise":
        raise KeyError("late")
    if then == "die":
        os._exit(3)
    while then == "wait" and not channel.stopped():
        time.sleep(0.01)


def add_ones(channel: WorkerChannel, shared: th.Tensor, row: int) -> None:
    shared[row] += 1


def raise_key_error(channel: WorkerChannel) -> None:
    raise KeyError("the seventh key")


def raise_unpicklable(channel: WorkerChannel) -> None:
    class UnpicklableError(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    raise UnpicklableError("what happened")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def raise_unprintable(channel: WorkerChannel) -> None:
    raise UnprintableError


def raise_broken_pipe(channel: WorkerChannel) -> None:
    raise BrokenPipeError("the game server hung up")


def exit_program(channel: WorkerChannel) -> None:
    sys.exit(3)


def ignore_sigterm(channel: WorkerChannel) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send("ready")
    time.sleep(3600)


def send_for_ever(channel: WorkerChannel) -> None:
    while not channel.stopped():
        channel.send(b"x" * 100_000)


def send_large(channel: WorkerChannel) -> None:
    channel.send("begin")
    channel.send(b"x" * 3_000_000)


def leave_a_child(channel: WorkerChannel) -> None:
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def call(channel: WorkerChannel, target: Callable[..., None], *arguments: Any) -> None:
    target(channel, *arguments)


def work(channel: WorkerChannel, seconds: float, how: str, says_when: bool = False) -> None:
    if says_when:
        channel.send("ready")
    channel.works()
    for _ in range(10):
        time.sleep(seconds / 10)
        if how == "beats":
            channel.works()
        elif how == "rests":
            channel.rests()
    channel.rests()
    channel.send("done")


def work_until_stopped(channel: WorkerChannel, sends: bool) -> None:
    while not channel.works():
        if sends:
            channel.send("message")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def receive_all(supervisor: Supervisor) -> list[tuple[int, Any]]:
    messages = []
    while not supervisor.finished:
        messages += supervisor.receive(timeout=30)
    return messages


def receive_until_a_death(supervisor: Supervisor) -> tuple[list[tuple[int, Any]], WorkerDiedError]:
    messages = []
    try:
        while True:
            messages += supervisor.receive(timeout=30)
    except WorkerDiedError as death:
        return messages, death


# --- start and messages ---------------------------------------------------------------------------------------------


def test_tensors_in_shared_memory_stay_shared(start: Start) -> None:
    shared = th.zeros(2, 3).share_memory_()  # type: ignore[no-untyped-call]
    supervisor = start(add_ones, [(shared, 0), (shared, 1)])
    assert receive_all(supervisor) == []
    assert shared.tolist() == [[1, 1, 1], [1, 1, 1]]
    for process in supervisor._processes.values():
        process.join(30)
        assert process.exitcode == 0
    assert supervisor.receive() == []  # at the end: nothing, at once


def test_functions_that_cannot_be_imported(start: Start) -> None:
    secret = 42
    assert receive_all(start(lambda channel: channel.send(secret))) == [(0, 42)]


def test_receive_returns_after_its_timeout(start: Start) -> None:
    supervisor = start(send_range, [(1, "wait")])
    assert supervisor.receive(timeout=30)
    began = time.monotonic()
    assert supervisor.receive(timeout=0.1) == []
    assert 0.09 < time.monotonic() - began < 1


# --- exceptions and deaths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        (raise_key_error, KeyError, "the seventh key"),
        (raise_unpicklable, RuntimeError, "UnpicklableError: what happened"),
        (raise_unprintable, RuntimeError, "UnprintableError: its __str__ raised ZeroDivisionError"),
        (raise_broken_pipe, BrokenPipeError, "the game server hung up"),  # not taken for the worker's own pipe
        (exit_program, RuntimeError, "SystemExit: 3"),  # must not end the user's program
    ],
)
def test_exceptions(target: Callable[..., None], error: type[Exception], match: str, start: Start) -> None:
    supervisor = start(call, [(send_range, 0, "wait"), (target,)])
    pids, began = supervisor.pids, time.monotonic()
    with pytest.raises(error, match=match) as caught:
        receive_all(supervisor)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    for words in ("In worker 1", "test_supervisor.py", target.__name__):
        assert words in str(caught.value.__cause__)
    supervisor.stop()
    assert time.monotonic() - began < 5
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "C code")])
def test_death_by_a_signal(start: Start, number: signal.Signals, words: str) -> None:
    supervisor = start(send_range, [(1, "wait"), (1, "wait")])
    assert supervisor.receive(timeout=30)
    began = time.monotonic()
    os.kill(supervisor.pids[1], number)
    with pytest.raises(WorkerDiedError, match=f"Worker 1 was killed by {number.name}.*{words}"):
        receive_all(supervisor)
    supervisor.stop()
    assert time.monotonic() - began < 5


def test_death_in_the_middle_of_a_message(start: Start) -> None:
    supervisor = start(send_large)
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    time.sleep(0.2)  # it waits in send now, with part of the message in the pipe
    os.kill(supervisor.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL"):
        receive_all(supervisor)


def test_messages_come_before_failures_and_each_failure_is_raised_once(start: Start) -> None:
    supervisor = start(send_range, [(30, "raise"), (20, "die"), (40,)])
    messages: list[tuple[int, Any]] = []
    failures: list[str] = []
    while not supervisor.finished:
        try:
            messages += supervisor.receive(timeout=30)
        except (KeyError, WorkerDiedError) as error:
            failures.append(str(error))
    assert sorted(messages) == [(worker, i) for worker, n in enumerate((30, 20, 40)) for i in range(n)]
    assert sorted(failures) == [
        "'late'",
        "Worker 1 exited with code 3 before its function returned. Did the environment call os._exit()?",
    ]


@pytest.mark.parametrize("target", [send_range, leave_a_child])
def test_a_dead_worker_is_replaced(target: Callable[..., None], start: Start) -> None:
    """Also if a child of the dead process still has its end of the pipe open."""
    arguments: tuple[Any, ...] = (2, "die") if target is send_range else ()
    supervisor = start(call, [(target, *arguments), (send_range, 0, "wait")])
    began = time.monotonic()
    messages, death = receive_until_a_death(supervisor)
    assert time.monotonic() - began < 4
    assert messages == [(0, i) for i in range(2)][: len(arguments)]
    assert death.worker == 0
    supervisor.replace(0, (send_range, 3))
    assert not supervisor.finished
    assert len(set(supervisor.pids)) == 2
    supervisor.request_stop()
    assert [message for worker, message in receive_all(supervisor) if worker == 0] == [0, 1, 2]


# --- stop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hurries", [False, True])
def test_a_worker_that_ignores_sigterm_is_killed(hurries: bool, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.processes.process_group.STOP_SECONDS", 30.0 if hurries else 0.2)
    supervisor, hurry = start(ignore_sigterm), threading.Event()
    assert supervisor.receive(timeout=30)
    pids, began = supervisor.pids, time.monotonic()
    if hurries:
        hurry.set()
    supervisor.stop(hurry)
    assert time.monotonic() - began < 5
    assert not any(is_alive(pid) for pid in pids)


def test_a_worker_blocked_in_send_can_be_stopped(start: Start) -> None:
    supervisor = start(send_for_ever)
    assert supervisor.receive(timeout=30)
    time.sleep(0.2)  # the pipe is full by now
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 1


@pytest.mark.slow
def test_50_starts_leave_no_files_and_processes() -> None:
    def count_files_after(n_starts: int) -> int:
        for _ in range(n_starts):
            supervisor = Supervisor(send_range, [(1,), (1,)], preload=PRELOAD)
            supervisor.start()
            receive_all(supervisor)
            supervisor.stop()
        del supervisor
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    assert count_files_after(1) == count_files_after(50)  # the first start leaves the fork server
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


# --- heartbeats -----------------------------------------------------------------------------------------------------


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.processes.heartbeats.LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("others_send", [False, True])
def test_a_hung_worker_is_killed(others_send: bool, start: Start) -> None:
    supervisor = start(call, [(work, 60.0, "hangs"), (work_until_stopped, others_send)], timeout=0.5)
    began = time.monotonic()
    _, death = receive_until_a_death(supervisor)
    assert str(death).startswith("Worker 0 was killed because it made no progress for 0.5 s.")
    assert death.worker == 0
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("look_often")
def test_workers_that_make_progress_or_rest_are_not_killed(start: Start) -> None:
    supervisor = start(work, [(1.5, "beats"), (1.5, "rests")], timeout=0.75)
    assert sorted(receive_all(supervisor)) == [(0, "done"), (1, "done")]


@pytest.mark.usefixtures("look_often")
def test_without_a_timeout_no_worker_is_killed(start: Start) -> None:
    assert receive_all(start(work, [(0.5, "hangs")])) == [(0, "done")]


@pytest.mark.usefixtures("look_often")
def test_workers_stopped_with_the_main_process_are_not_killed(start: Start) -> None:
    """As by Ctrl-Z: afterwards the heartbeats are old, but the workers had no time for new ones."""
    supervisor, n_ready = start(work, [(1.5, "beats", True), (1.5, "rests", True)], timeout=0.75), 0
    while n_ready < 2:
        n_ready += len(supervisor.receive(timeout=30))
    for number, seconds in ((signal.SIGSTOP, 2.0), (signal.SIGCONT, 0.0)):
        for pid in supervisor.pids:
            os.kill(pid, number)
        time.sleep(seconds)  # this process does not look
    assert sorted(receive_all(supervisor)) == [(0, "done"), (1, "done")]
