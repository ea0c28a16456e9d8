"""Processes that are started, watched and stopped; and what is left of them: nothing."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch as th

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.collector import PRELOAD

Target = Any


def count(channel: WorkerChannel, n: int) -> None:
    for i in range(n):
        channel.send(i)


def add_ones(channel: WorkerChannel, shared: th.Tensor, row: int) -> None:
    shared[row] += 1
    channel.send(os.getpid())


def raise_in_one(channel: WorkerChannel, me: int) -> None:
    if me == 1:
        raise KeyError("the seventh key")
    wait_for_stop(channel)


def wait_for_stop(channel: WorkerChannel) -> None:
    channel.send(os.getpid())
    while not channel.stopped():
        time.sleep(0.001)


def never_stop(channel: WorkerChannel) -> None:
    channel.send(os.getpid())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)


def exit_silently(channel: WorkerChannel) -> None:
    channel.send("last word")
    os._exit(3)


def send_for_ever(channel: WorkerChannel) -> None:
    while not channel.stopped():
        channel.send(b"x" * 100_000)


def raise_unpicklable(channel: WorkerChannel) -> None:
    class UnpicklableError(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    raise UnpicklableError("what happened")


def raise_broken_pipe(channel: WorkerChannel) -> None:
    raise BrokenPipeError("the game server hung up")


def exit_program(channel: WorkerChannel) -> None:
    sys.exit(3)


def send_much(channel: WorkerChannel) -> None:
    channel.send("begin")
    channel.send(b"x" * 3_000_000)


def leave_a_child(channel: WorkerChannel) -> None:
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def send_then_fail(channel: WorkerChannel, n: int, how: str) -> None:
    for i in range(n):
        channel.send(i)
    if how == "raise":
        raise KeyError("late")
    if how == "die":
        os._exit(1)


@pytest.fixture
def running() -> Iterator[list[Supervisor]]:
    """Supervisors that the test started: stopped whatever happens."""
    supervisors: list[Supervisor] = []
    yield supervisors
    for supervisor in supervisors:
        supervisor.stop()


def started(running: list[Supervisor], target: Target, arguments: list[tuple[Any, ...]], **kwargs: Any) -> Supervisor:
    supervisor = Supervisor(target, arguments, preload=PRELOAD, **kwargs)
    running.append(supervisor)
    supervisor.start()
    return supervisor


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


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_every_message_arrives_in_order(running: list[Supervisor], start_method: str) -> None:
    supervisor = started(running, count, [(50,), (20,), (0,)], start_method=start_method)
    messages = receive_all(supervisor)
    for index, n in enumerate((50, 20, 0)):
        assert [message for worker, message in messages if worker == index] == list(range(n))
    assert supervisor.receive() == []  # at the end: nothing, at once


def test_tensors_in_shared_memory_stay_shared(running: list[Supervisor]) -> None:
    shared = th.zeros(2, 3).share_memory_()  # type: ignore[no-untyped-call]
    receive_all(started(running, add_ones, [(shared, 0), (shared, 1)]))
    assert shared.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_functions_that_cannot_be_imported_travel_by_value(running: list[Supervisor]) -> None:
    secret = 42
    supervisor = started(running, lambda channel: channel.send(secret), [()])
    assert receive_all(supervisor) == [(0, 42)]


def test_an_exception_keeps_its_type_and_shows_the_workers_traceback(running: list[Supervisor]) -> None:
    supervisor = started(running, raise_in_one, [(0,), (1,)])
    pids = supervisor.pids
    began = time.monotonic()
    with pytest.raises(KeyError, match="the seventh key") as caught:
        receive_all(supervisor)
    supervisor.stop()
    assert time.monotonic() - began < 5
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert 'raise KeyError("the seventh key")' in str(caught.value.__cause__)
    assert "In worker 1" in str(caught.value.__cause__)
    assert not any(is_alive(pid) for pid in pids)


def test_an_exception_that_cannot_be_pickled_is_still_told(running: list[Supervisor]) -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: what happened"):
        receive_all(started(running, raise_unpicklable, [()]))


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "C code")])
def test_a_killed_worker_is_named_with_its_signal(running: list[Supervisor], number: signal.Signals, words: str) -> None:
    supervisor = started(running, wait_for_stop, [(), ()])
    while len(supervisor.receive(timeout=30)) == 0:
        pass
    began = time.monotonic()
    os.kill(supervisor.pids[1], number)
    with pytest.raises(WorkerDiedError, match=f"Worker 1 was killed by {number.name}.*{words}"):
        receive_all(supervisor)
    supervisor.stop()
    assert time.monotonic() - began < 5


def test_a_worker_that_exits_silently_is_dead_after_its_last_word(running: list[Supervisor]) -> None:
    supervisor = started(running, exit_silently, [()])
    assert supervisor.receive(timeout=30) == [(0, "last word")]
    with pytest.raises(WorkerDiedError, match="exited with code 3"):
        supervisor.receive(timeout=30)


def test_an_exception_about_pipes_is_the_environments_own(running: list[Supervisor]) -> None:
    with pytest.raises(BrokenPipeError, match="the game server hung up"):
        receive_all(started(running, raise_broken_pipe, [()]))


def test_sys_exit_in_workers_ends_neither_the_program_nor_the_clean_up(running: list[Supervisor]) -> None:
    supervisor = started(running, exit_program, [(), (), ()])
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        receive_all(supervisor)
    pids = supervisor.pids
    supervisor.stop()
    assert not any(is_alive(pid) for pid in pids)


def test_a_worker_killed_in_mid_message_is_a_dead_worker(running: list[Supervisor]) -> None:
    supervisor = started(running, send_much, [()])
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    time.sleep(0.2)  # it waits in send now, with part of the message in the pipe
    os.kill(supervisor.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL"):
        receive_all(supervisor)


def test_a_dead_workers_child_that_holds_the_pipe_delays_nothing(running: list[Supervisor]) -> None:
    supervisor = started(running, leave_a_child, [()])
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        receive_all(supervisor)
    assert time.monotonic() - began < 4


def test_what_was_sent_before_a_failure_is_received_and_each_failure_is_raised_once(running: list[Supervisor]) -> None:
    supervisor = started(running, send_then_fail, [(30, "raise"), (20, "die"), (40, "return")])
    messages: list[tuple[int, Any]] = []
    failures: list[type[BaseException]] = []
    while not supervisor.finished:
        try:
            messages += supervisor.receive(timeout=30)
        except (KeyError, WorkerDiedError) as error:
            failures.append(type(error))
    assert sorted(messages) == [(worker, i) for worker, n in enumerate((30, 20, 40)) for i in range(n)]
    assert sorted(failures, key=str) == [KeyError, WorkerDiedError]


def test_workers_end_when_asked_to(running: list[Supervisor]) -> None:
    supervisor = started(running, wait_for_stop, [(), ()])
    assert supervisor.receive(timeout=30)
    supervisor.request_stop()
    receive_all(supervisor)
    assert supervisor.finished


def test_a_worker_that_will_not_end_is_killed(running: list[Supervisor]) -> None:
    supervisor = started(running, never_stop, [()])
    assert supervisor.receive(timeout=30)
    pids, began = supervisor.pids, time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 5
    assert not any(is_alive(pid) for pid in pids)


def test_a_worker_that_waits_for_a_reader_can_be_stopped(running: list[Supervisor]) -> None:
    supervisor = started(running, send_for_ever, [()])
    assert supervisor.receive(timeout=30)
    time.sleep(0.2)  # the pipe is full by now
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 1


def test_receive_returns_after_its_timeout(running: list[Supervisor]) -> None:
    supervisor = started(running, wait_for_stop, [()])
    assert supervisor.receive(timeout=30)
    began = time.monotonic()
    assert supervisor.receive(timeout=0.1) == []
    assert 0.09 < time.monotonic() - began < 1


@pytest.mark.slow
def test_nothing_is_left_of_50_starts(running: list[Supervisor]) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    receive_all(started(running, count, [(1,)]))  # starts the fork server, which stays
    running.pop().stop()
    before = descriptors()
    for _ in range(50):
        supervisor = started(running, count, [(1,), (1,)])
        receive_all(supervisor)
        running.pop().stop()
    del supervisor
    assert descriptors() == before
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]


def receive_until_a_death(supervisor: Supervisor) -> tuple[list[tuple[int, Any]], WorkerDiedError]:
    messages = []
    try:
        while True:
            messages += supervisor.receive(timeout=30)
    except WorkerDiedError as death:
        return messages, death


def hang(channel: WorkerChannel, seconds: float, how: str) -> None:
    channel.works()
    for _ in range(10):
        time.sleep(seconds / 10)
        if how == "beats":
            channel.works()
        elif how == "rests":
            channel.rests()
    channel.rests()
    channel.send("came through")


@pytest.mark.parametrize("others_talk", [False, True])
def test_a_worker_that_hangs_is_killed(
    others_talk: bool, running: list[Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_a3c.processes.supervisor.LOOK_SECONDS", 0.05)
    supervisor = started(running, hang_or_talk, [("hang",), ("talk" if others_talk else "sleep",)], timeout=0.5)
    began = time.monotonic()
    _, death = receive_until_a_death(supervisor)
    assert str(death).startswith("Worker 0 was killed, as it had not come further for 0.5 s.")
    assert death.worker == 0
    assert time.monotonic() - began < 5


def hang_or_talk(channel: WorkerChannel, how: str) -> None:
    if how == "hang":
        hang(channel, 60.0, "hangs")
    while not channel.stopped():
        channel.works()
        if how == "talk":
            channel.send("still here")
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["beats", "rests"])
def test_whoever_comes_further_or_rests_does_not_hang(
    how: str, running: list[Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_a3c.processes.supervisor.LOOK_SECONDS", 0.05)
    supervisor = started(running, hang, [(1.5, how)], timeout=0.75)
    assert receive_all(supervisor) == [(0, "came through")]


def test_without_a_timeout_nobody_hangs(running: list[Supervisor]) -> None:
    supervisor = started(running, hang, [(1.5, "hangs")])
    assert receive_all(supervisor) == [(0, "came through")]


@pytest.mark.parametrize("target", [send_then_fail, leave_a_child])
def test_a_dead_worker_is_replaced(target: Target, running: list[Supervisor]) -> None:
    """Also if a child of it still has its end of the pipe."""
    dying: tuple[Any, ...] = (2, "die") if target is send_then_fail else ()
    supervisor = started(running, replaceable, [(target, *dying), (send_then_fail, 0, "wait")])
    messages, death = receive_until_a_death(supervisor)
    assert messages == [(0, i) for i in range(2)][: len(dying)]
    assert death.worker == 0
    supervisor.replace(0, (send_then_fail, 3, "return"))
    assert not supervisor.finished
    assert len(set(supervisor.pids)) == 2
    supervisor.request_stop()
    assert [message for worker, message in receive_all(supervisor) if worker == 0] == [0, 1, 2]


def replaceable(channel: WorkerChannel, target: Target, *arguments: Any) -> None:
    target(channel, *arguments)
    while arguments == (0, "wait") and not channel.stopped():
        time.sleep(0.01)


def test_whoever_stood_still_with_the_main_process_does_not_hang(running: list[Supervisor]) -> None:
    """As after Ctrl-Z: when all go on, the heartbeats are old, but nobody has had the time for a new one."""
    supervisor = started(running, hang, [(1.5, "beats")], timeout=0.75)
    supervisor._heartbeats[0] = 1
    supervisor._next_look -= 1000.0
    assert supervisor.receive(timeout=0.0) == []
    assert receive_all(supervisor) == [(0, "came through")]
