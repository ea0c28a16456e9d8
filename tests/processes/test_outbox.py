"""The main process never waits for a worker that does not read what is sent to it."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from sb3_a3c.errors import WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)
Start = Callable[..., Supervisor]
MEGABYTE = b"x" * 1_000_000


def hold_the_lock(channel: WorkerChannel) -> None:
    """As C code that does not give up Python's lock: no other thread of the worker runs."""
    channel.works()
    channel.send("begin")
    ctypes.PyDLL(None).sleep(60)


def rest(channel: WorkerChannel) -> None:
    channel.send("begin")
    while not channel.stopped():
        channel.serve(channel.send, block=True)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.processes.heartbeats.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("sb3_a3c.processes.heartbeats.SILENCE_SECONDS", 2.0)


def test_worker_timeout_ends_a_worker_that_holds_pythons_lock(start: Start) -> None:
    n_threads = threading.active_count()
    supervisor = start(hold_the_lock, timeout=0.5)
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    began = time.monotonic()
    for _ in range(5):
        supervisor.send(0, MEGABYTE)
    assert time.monotonic() - began < 0.2
    with pytest.raises(WorkerDiedError, match=r"Worker 0 was killed because it made no progress for 0\.5 s"):
        supervisor.ask({0: MEGABYTE})
    assert time.monotonic() - began < 4
    supervisor.stop()
    assert threading.active_count() == n_threads


def test_a_worker_that_holds_pythons_lock_can_be_stopped(start: Start) -> None:
    n_threads = threading.active_count()
    supervisor = start(hold_the_lock)
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    supervisor.send(0, MEGABYTE)
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 4
    assert threading.active_count() == n_threads


def test_a_worker_stopped_at_rest_is_killed_and_replaced(start: Start) -> None:
    """It has no heartbeat of its work, but its process is silent."""
    supervisor = start(rest, timeout=0.5)
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    assert supervisor.receive(timeout=2.5) == []
    os.kill(supervisor.pids[0], signal.SIGSTOP)
    supervisor.send(0, MEGABYTE)
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"Worker 0 was killed because it did not run for 2 s\. Was it stopped"):
        supervisor.receive(timeout=30)
    assert 0.9 < time.monotonic() - began < 6  # since its last heartbeat 2 s have passed
    supervisor.replace(0, ())
    supervisor.send(0, "message")
    messages: list[object] = []
    while len(messages) < 2:
        messages += supervisor.receive(timeout=30)
    assert messages == [(0, "begin"), (0, "message")]


def test_messages_to_a_worker_that_was_stopped_for_a_while_arrive_in_order(start: Start) -> None:
    supervisor = start(rest, timeout=60.0)
    assert supervisor.receive(timeout=30) == [(0, "begin")]
    os.kill(supervisor.pids[0], signal.SIGSTOP)
    sent = [bytes([i]) * 100_000 for i in range(20)]
    for message in sent:
        supervisor.send(0, message)
    os.kill(supervisor.pids[0], signal.SIGCONT)
    received: list[object] = []
    while len(received) < len(sent):
        received += [message for _, message in supervisor.receive(timeout=30)]
    assert received == sent
