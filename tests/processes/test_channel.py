"""Messages, requests, answers and exceptions between the main process and a worker."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)
Start = Callable[..., Supervisor]

MEGABYTES = 5_000_000  # a pipe holds 64 KiB

# --- targets: messages are functions of the channel -----------------------------------------------------------------


def run_messages(channel: WorkerChannel) -> None:
    while not channel.stopped():
        channel.serve(lambda message: message(channel), block=True)


def run_one_message(channel: WorkerChannel) -> None:
    channel.serve(lambda message: message(channel), block=True)


def serve_thrice(channel: WorkerChannel) -> None:
    """Send what ``serve`` returned: for an empty inbox, when woken, and for a message."""
    handled: list[Any] = []
    for block in (False, True, True):
        channel.send((channel.serve(handled.append, block), list(handled)))


# --- messages -------------------------------------------------------------------------------------------------------


def send(what: Any, channel: WorkerChannel) -> None:
    channel.send(what)


def answer(what: Any, channel: WorkerChannel) -> Any:
    return what


def get_pid(channel: WorkerChannel) -> int:
    return os.getpid()


def send_and_answer(data: bytes, channel: WorkerChannel) -> tuple[int, bytes]:
    channel.send(data)
    return len(data), data


def fail(channel: WorkerChannel) -> None:
    raise KeyError("the seventh key")


def die(channel: WorkerChannel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def answer_once_exists(path: Path, what: Any, channel: WorkerChannel) -> Any:
    while not path.exists():
        time.sleep(0.01)
    return what


class Point(NamedTuple):
    x: int
    y: int


class NotLoadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def receive(supervisor: Supervisor, n: int) -> list[tuple[int, Any]]:
    messages: list[tuple[int, Any]] = []
    while len(messages) < n:
        new = supervisor.receive(timeout=30)
        assert new, "no message within 30 s"
        messages += new
    return messages


# --- messages and answers -------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_and_are_kept_during_requests(start: Start) -> None:
    supervisor = start(run_messages, 3)
    for k in range(200):
        for worker in range(3):
            supervisor.send(worker, partial(send, (worker, k)))
    assert supervisor.ask({w: partial(answer, 10 * w) for w in (2, 0)}) == {2: 20, 0: 0}
    for worker in (2, 0):
        supervisor.send(worker, partial(send, "late"))
    messages = receive(supervisor, 3 * 200 + 2)
    for worker in range(3):
        own = [message for sender, message in messages if sender == worker]
        assert own == [(worker, k) for k in range(200)] + ["late"] * (worker != 1)
    assert supervisor.ask({}) == {}
    pids = supervisor.ask(dict.fromkeys(range(3), get_pid))
    assert list(pids.values()) == supervisor.pids
    assert supervisor.receive(timeout=0) == []


def test_serve_waits_only_if_it_is_to_block(start: Start) -> None:
    supervisor = start(serve_thrice)
    assert receive(supervisor, 1) == [(0, (False, []))]
    assert supervisor.receive(timeout=0.2) == []
    supervisor.send(0, None)  # wakes the worker, and is not handled
    assert receive(supervisor, 1) == [(0, (True, []))]
    supervisor.send(0, "message")
    assert receive(supervisor, 1) == [(0, (True, ["message"]))]


def test_request_stop_wakes_waiting_workers(start: Start) -> None:
    supervisor = start(run_messages, 2)
    supervisor.ask({0: get_pid, 1: get_pid})
    time.sleep(0.1)  # both wait in serve now
    began = time.monotonic()
    supervisor.request_stop()
    while not supervisor.finished:
        assert supervisor.receive(timeout=10) == []
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_requests_and_answers_larger_than_a_pipe(full: bool, start: Start) -> None:
    supervisor, data = start(run_messages, 2), b"x" * MEGABYTES
    if full:
        for worker in range(2):
            supervisor.send(worker, partial(send, data))
        time.sleep(0.3)  # both wait in send now, because the main process does not read
    answers = supervisor.ask({w: partial(send_and_answer, data) for w in range(2)})
    assert answers == {0: (MEGABYTES, data), 1: (MEGABYTES, data)}
    messages = receive(supervisor, 4 if full else 2)
    assert sorted(worker for worker, _ in messages) == ([0, 0, 1, 1] if full else [0, 1])
    assert all(message == data for _, message in messages)


def test_module_and_local_classes_keep_their_type(start: Start) -> None:
    class Local(NamedTuple):
        number: int

    supervisor = start(run_messages)
    for sent in (Point(1, 2), Local(3)):
        received = supervisor.ask({0: partial(answer, sent)})[0]
        assert type(received) is type(sent)  # so that isinstance and match know it
        assert received == sent


# --- exceptions -----------------------------------------------------------------------------------------------------


def test_exception_instead_of_an_answer(start: Start) -> None:
    supervisor = start(run_messages, 2)
    pids = supervisor.pids
    with pytest.raises(KeyError, match="the seventh key") as caught:
        supervisor.ask({0: get_pid, 1: fail})
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    for words in ("In worker 1", "test_channel.py", "in fail", "the seventh key"):
        assert words in str(caught.value.__cause__)
    assert supervisor.ask({0: get_pid, 1: get_pid}) == dict(enumerate(pids))


def test_exception_without_a_request_ends_the_worker(start: Start) -> None:
    supervisor = start(run_messages)
    supervisor.send(0, fail)
    with pytest.raises(KeyError, match="the seventh key") as caught:
        supervisor.ask({0: get_pid})
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    with pytest.raises(KeyError, match="the seventh key"):
        supervisor.receive()  # a caller that ignored it there gets it here
    with pytest.raises(RuntimeError, match="Worker 0 has ended"):
        supervisor.ask({0: get_pid})


def test_answers_that_cannot_be_pickled_are_exceptions(start: Start) -> None:
    supervisor = start(run_messages, 2)
    with pytest.raises(TypeError, match="cannot pickle"):
        supervisor.ask({0: lambda channel: threading.Lock(), 1: partial(answer, "old")})
    with pytest.raises(ValueError, match="not a number"):
        supervisor.ask({0: lambda channel: NotLoadable(), 1: partial(answer, "old")})
    assert supervisor.ask({0: partial(answer, "new"), 1: partial(answer, "new")}) == {0: "new", 1: "new"}


def test_asking_an_ended_worker(start: Start) -> None:
    supervisor = start(run_one_message, 2)
    assert supervisor.ask({0: partial(answer, "answer")}) == {0: "answer"}
    for _ in range(2):  # the first time it may be about to end
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="Worker 0 has ended and can't answer any more"):
            supervisor.ask({0: get_pid})
        assert time.monotonic() - began < 3
    assert supervisor.ask({1: partial(answer, "answer")}) == {1: "answer"}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_asking_a_killed_worker(when: str, start: Start) -> None:
    supervisor = start(run_messages, 2)
    assert supervisor.ask({0: partial(answer, "a"), 1: partial(answer, "b")}) == {0: "a", 1: "b"}
    if when == "before":
        os.kill(supervisor.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        supervisor.ask({0: partial(answer, "old"), 1: partial(answer, "old") if when == "before" else die})
    assert time.monotonic() - began < 3
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        supervisor.receive()
    assert supervisor.ask({0: partial(answer, "new")}) == {0: "new"}


def test_late_answers_to_an_interrupted_request_are_dropped(start: Start, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    supervisor, path = start(run_messages, 2), tmp_path / "continue"
    supervisor.ask({0: get_pid, 1: get_pid})
    handler = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            supervisor.ask({0: partial(answer_once_exists, path, "old"), 1: partial(answer, "old")})
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, handler)
    path.touch()
    assert supervisor.ask({0: partial(answer, "new"), 1: partial(answer, "new")}) == {0: "new", 1: "new"}
    assert supervisor.ask({1: partial(answer, "newest")}) == {1: "newest"}
    assert supervisor.receive(timeout=0) == []
