"""What goes over the line between the main process and a worker process: orders, answers, exceptions and warnings."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.collector import PRELOAD

pytestmark = pytest.mark.timeout(60)

MEGABYTES = 5_000_000  # a pipe holds 64 KiB

# --- what workers run -----------------------------------------------------------------------------------------------


def obey(channel: WorkerChannel) -> None:
    """Its messages are functions of its channel."""
    while not channel.stopped():
        channel.serve(lambda order: order(channel), timeout=None)


def obey_once(channel: WorkerChannel) -> None:
    channel.serve(lambda order: order(channel), timeout=None)


def time_serving(channel: WorkerChannel) -> None:
    """Report what ``serve`` returned, and after how many seconds: at an empty inbox, when woken, and at a message."""
    handled: list[Any] = []
    for timeout in (0.0, 0.3, None, None):
        began = time.monotonic()
        result = channel.serve(handled.append, timeout=timeout)
        channel.send((result, time.monotonic() - began, list(handled)))


# --- orders ---------------------------------------------------------------------------------------------------------


def say(what: Any, channel: WorkerChannel) -> None:
    channel.send(what)


def give(what: Any, channel: WorkerChannel) -> Any:
    return what


def my_pid(channel: WorkerChannel) -> int:
    return os.getpid()


def say_much_and_give(data: bytes, channel: WorkerChannel) -> tuple[int, bytes]:
    channel.send(data)
    return len(data), data


def fail(channel: WorkerChannel) -> None:
    raise KeyError("the seventh key")


def fail_strangely(channel: WorkerChannel) -> None:
    class UnpicklableError(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    raise UnpicklableError("what happened")


def give_a_lock(channel: WorkerChannel) -> Any:
    return threading.Lock()


def die(channel: WorkerChannel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def give_when_there(path: Path, what: Any, channel: WorkerChannel) -> Any:
    while not path.exists():
        time.sleep(0.01)
    return what


def send_an_object_of_a_local_class(channel: WorkerChannel) -> None:
    class Local:
        number = 3

    channel.send(Local())


class Point(NamedTuple):
    """A class of this module"""

    x: int
    y: int


class WetPaintWarning(UserWarning):
    """A class of this module"""


def refuse_to_load() -> None:
    raise pickle.UnpicklingError("no such thing here")


class OnlyOneWay:
    """Can be pickled"""

    def __reduce__(self) -> Any:
        return refuse_to_load, ()


def give_what_cannot_be_loaded(channel: WorkerChannel) -> Any:
    return OnlyOneWay()


# --- help -----------------------------------------------------------------------------------------------------------

Start = Callable[..., Supervisor]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers, which are stopped whatever happens: ``start(2)``, or ``start(1, target)``."""
    supervisors: list[Supervisor] = []

    def started(n_workers: int, target: Callable[..., None] = obey) -> Supervisor:
        supervisor = Supervisor(target, [()] * n_workers, preload=PRELOAD)
        supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    yield started
    for supervisor in supervisors:
        supervisor.stop()


def receive(supervisor: Supervisor, n: int) -> list[tuple[int, Any]]:
    messages: list[tuple[int, Any]] = []
    while len(messages) < n:
        new = supervisor.receive(timeout=30)
        assert new, "nothing comes any more"
        messages += new
    return messages


# --- messages and answers -------------------------------------------------------------------------------------------


def test_what_is_sent_arrives_in_order_and_is_kept_while_answers_are_awaited(start: Start) -> None:
    supervisor = start(3)
    for k in range(200):
        for worker in range(3):
            supervisor.send(worker, partial(say, (worker, k)))
    assert supervisor.ask({w: partial(give, 10 * w) for w in (2, 0)}) == {2: 20, 0: 0}
    for worker in (2, 0):
        supervisor.send(worker, partial(say, "late"))
    messages = receive(supervisor, 3 * 200 + 2)
    for worker in range(3):
        mine = [message for sender, message in messages if sender == worker]
        assert mine == [(worker, k) for k in range(200)] + ["late"] * (worker != 1)
    assert supervisor.ask({}) == {}
    pids = supervisor.ask(dict.fromkeys(range(3), my_pid))
    assert list(pids.values()) == supervisor.pids
    assert supervisor.receive(timeout=0) == []


def test_serve_waits_as_long_as_told(start: Start) -> None:
    supervisor = start(1, time_serving)
    (_, (result, seconds, _)), (_, (result_later, seconds_later, handled)) = receive(supervisor, 2)
    assert (result, result_later, handled) == (False, False, [])
    assert seconds < 0.2 < 0.3 <= seconds_later < 5
    supervisor.send(0, None)  # wakes, and is nothing that the handler sees
    assert receive(supervisor, 1)[0][1][::2] == (True, [])
    supervisor.send(0, "message")
    assert receive(supervisor, 1)[0][1][::2] == (True, ["message"])


def test_who_waits_for_a_message_wakes_up_when_a_stop_is_requested(start: Start) -> None:
    supervisor = start(2)
    supervisor.ask({0: my_pid, 1: my_pid})
    time.sleep(0.1)  # both wait in serve now
    began = time.monotonic()
    supervisor.request_stop()
    while not supervisor.finished:
        assert supervisor.receive(timeout=10) == []
        assert time.monotonic() - began < 5
    with pytest.raises(RuntimeError, match="has finished"):
        supervisor.ask({0: my_pid})


@pytest.mark.parametrize("loaded", [False, True], ids=["idle", "blocked"])
def test_requests_and_answers_larger_than_a_pipe_do_not_block(loaded: bool, start: Start) -> None:
    supervisor, data = start(2), b"x" * MEGABYTES
    if loaded:
        for worker in range(2):
            supervisor.send(worker, partial(say, data))
        time.sleep(0.3)  # both wait in send now, because nobody reads
    answers = supervisor.ask({w: partial(say_much_and_give, data) for w in range(2)})
    assert answers == {0: (MEGABYTES, data), 1: (MEGABYTES, data)}
    messages = receive(supervisor, 4 if loaded else 2)
    assert sorted(worker for worker, _ in messages) == ([0, 0, 1, 1] if loaded else [0, 1])
    assert all(message == data for _, message in messages)


def test_classes_of_a_module_and_of_a_function_travel(start: Start) -> None:
    class Local(NamedTuple):
        number: int

    supervisor = start(1)
    for sent in (Point(1, 2), Local(3)):
        answer = supervisor.ask({0: partial(give, sent)})[0]
        assert type(answer) is type(sent)  # so that isinstance and match know it
        assert answer == sent
    supervisor.send(0, lambda channel: channel.send(Point(3, 4)))
    supervisor.send(0, send_an_object_of_a_local_class)
    (_, point), (_, local) = receive(supervisor, 2)
    assert type(point) is Point
    assert (point, type(local).__name__, local.number) == ((3, 4), "Local", 3)


# --- exceptions -----------------------------------------------------------------------------------------------------


def test_an_exception_instead_of_an_answer_is_raised_and_the_worker_goes_on(start: Start) -> None:
    supervisor = start(2)
    pids = supervisor.pids
    with pytest.raises(KeyError, match="the seventh key") as caught:
        supervisor.ask({0: my_pid, 1: fail})
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    for words in ("In worker 1", "test_channel.py", "in fail", "the seventh key"):
        assert words in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="UnpicklableError: what happened"):
        supervisor.ask({0: fail_strangely})
    assert supervisor.ask({0: my_pid, 1: my_pid}) == dict(enumerate(pids))


def test_an_exception_at_a_message_that_wants_no_answer_ends_the_worker(start: Start) -> None:
    supervisor = start(1)
    supervisor.send(0, fail)
    with pytest.raises(KeyError, match="the seventh key") as caught:
        supervisor.ask({0: my_pid})
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    with pytest.raises(KeyError, match="the seventh key"):
        supervisor.receive()  # whoever swallowed it there can't miss it here
    with pytest.raises(RuntimeError, match="Worker 0 has finished"):
        supervisor.ask({0: my_pid})


@pytest.mark.parametrize(
    ("order", "error", "words"),
    [
        pytest.param(give_a_lock, TypeError, "cannot pickle", id="pickle"),
        pytest.param(give_what_cannot_be_loaded, pickle.UnpicklingError, "no such thing here", id="load"),
    ],
)
def test_an_answer_that_cannot_travel_is_an_exception(
    order: Callable[..., Any], error: type[Exception], words: str, start: Start
) -> None:
    supervisor = start(2)
    with pytest.raises(error, match=words):
        supervisor.ask({0: order, 1: partial(give, "old")})
    assert supervisor.ask({0: partial(give, "new"), 1: partial(give, "new")}) == {0: "new", 1: "new"}


def test_who_has_finished_cannot_be_asked(start: Start) -> None:
    supervisor = start(2, obey_once)
    assert supervisor.ask({0: partial(give, "answer")}) == {0: "answer"}
    for _ in range(2):  # the first time it may be about to end
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="Worker 0 has finished and can't answer any more"):
            supervisor.ask({0: my_pid})
        assert time.monotonic() - began < 3
    assert supervisor.ask({1: partial(give, "answer")}) == {1: "answer"}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_asking_a_killed_worker_says_so_at_once(when: str, start: Start) -> None:
    supervisor = start(2)
    assert supervisor.ask({0: partial(give, "a"), 1: partial(give, "b")}) == {0: "a", 1: "b"}
    if when == "before":
        os.kill(supervisor.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        supervisor.ask({0: partial(give, "old"), 1: partial(give, "old") if when == "before" else die})
    assert time.monotonic() - began < 3
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        supervisor.receive()
    assert supervisor.ask({0: partial(give, "new")}) == {0: "new"}


def test_late_answers_to_an_interrupted_request_are_not_those_to_the_next(start: Start, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    supervisor, path = start(2), tmp_path / "go on"
    supervisor.ask({0: my_pid, 1: my_pid})
    handler = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            supervisor.ask({0: partial(give_when_there, path, "old"), 1: partial(give, "old")})
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, handler)
    path.touch()
    assert supervisor.ask({0: partial(give, "new"), 1: partial(give, "new")}) == {0: "new", 1: "new"}
    assert supervisor.ask({1: partial(give, "newest")}) == {1: "newest"}
    assert supervisor.receive(timeout=0) == []
