"""The worker's side of the communication with the main process. See ``supervisor`` for the main process's side."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

import cloudpickle
import torch as th

from sb3_a3c.processes import start
from sb3_a3c.processes.heartbeats import BEAT_SECONDS, PROCESS, WORK

Pipe = connection.Connection  # one end of a pipe


class Returned(NamedTuple):
    """The worker's target function has returned."""


class Raised(NamedTuple):
    """The worker's target function, or its handler of requests, has raised."""

    exception: BaseException
    traceback: str


class Request(NamedTuple):
    """A message to a worker that must be answered."""

    number: int
    content: bytes


class Answer(NamedTuple):
    """What the worker's handler returned for a request, or raised."""

    number: int
    value: Any = None
    raised: Raised | None = None


class WorkerChannel:
    """The first argument of a worker's target function: sends to and receives from the main process."""

    def __init__(self, pipe: "Pipe[Any, Any]", inbox: "queue.SimpleQueue[bytes]", flags: th.Tensor, index: int) -> None:
        self._pipe = pipe
        self._inbox = inbox
        self._stop_flag = flags[0].numpy()
        self._heartbeats = flags[1 + index].numpy()

    def send(self, message: Any) -> None:
        """Send anything that pickle or cloudpickle can pickle. Blocks while the pipe is full."""
        self._send_bytes(dumps(message))

    def serve(self, handler: Callable[[Any], Any], block: bool = False) -> bool:
        """
        Take one message out of the inbox and call ``handler`` with it. If the message is a request, what ``handler``
        returns or raises is sent as the answer. Return whether there was a message.

        :param block: whether to wait until a message arrives or a stop is requested
        """
        try:
            message = pickle.loads(self._inbox.get(block))
        except queue.Empty:
            return False
        if isinstance(message, Request):
            self._answer(handler, message)
        elif message is not None:  # None only wakes the worker
            handler(message)
        return True

    def _answer(self, handler: Callable[[Any], Any], request: Request) -> None:
        try:
            data = dumps(Answer(request.number, value=handler(pickle.loads(request.content))))
        except Exception as exception:
            data = dumps(Answer(request.number, raised=_raised(exception)))
        self._send_bytes(data)

    def _send_bytes(self, data: bytes) -> None:
        try:
            self._pipe.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # the main process is gone

    def wake(self) -> None:
        """Let :meth:`serve` return that waits in another thread."""
        self._inbox.put(dumps(None))

    def stopped(self) -> bool:
        """Whether the main process wants this worker to end."""
        return bool(self._stop_flag[0])

    def works(self) -> bool:
        """Record a heartbeat: the next one, or :meth:`rests`, must follow within ``timeout``. Returns :meth:`stopped`."""
        start.is_bootstrapping = False
        self._heartbeats[WORK] = time.monotonic_ns()
        return bool(self._stop_flag[0])

    def rests(self) -> None:
        """Clear the heartbeat: from now on the worker may wait for any time."""
        self._heartbeats[WORK] = 0

    def beat(self) -> None:
        """Record a heartbeat of the process."""
        self._heartbeats[PROCESS] = time.monotonic_ns()


def worker_process(
    target: bytes, pipe: "Pipe[Any, Any]", inbox: "Pipe[Any, Any]", flags: th.Tensor, index: int, arguments: tuple[Any, ...]
) -> None:
    """Entry point of a worker process."""
    start.is_bootstrapping = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process stops the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked during the start; an environment may use it
    parent = multiprocessing.parent_process()
    assert parent is not None
    _die_with(parent.sentinel)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    channel = WorkerChannel(pipe, messages, flags, index)
    threading.Thread(target=_empty_inbox, args=(inbox, messages, parent.sentinel, channel.beat), daemon=True).start()
    try:
        pickle.loads(target)(channel, *arguments)
        channel.send(Returned())
    except BaseException as exception:
        channel.send(_raised(exception))


def _empty_inbox(
    inbox: "Pipe[Any, Any]", messages: "queue.SimpleQueue[bytes]", parent: int, beat: Callable[[], None]
) -> None:
    """A thread that reads messages as they arrive, and shows that the process runs. Exits when the main process does."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            beat()
            ready = connection.wait([inbox, parent], BEAT_SECONDS)
            if parent in ready:
                break
            if inbox in ready:
                messages.put(inbox.recv_bytes())
    os._exit(1)


def _die_with(parent: int) -> None:
    """
    Let Linux kill this process when the main process is gone, even if C code keeps Python's lock from the thread.

    :param parent: the sentinel of the main process, the end of a pipe to which nothing more is written
    """
    if sys.platform == "linux":
        import fcntl

        set_signal = 10  # F_SETSIG of <fcntl.h>
        with contextlib.suppress(OSError):
            fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(parent, set_signal, signal.SIGKILL)
            fcntl.fcntl(parent, fcntl.F_SETFL, fcntl.fcntl(parent, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([parent], 0):
        os._exit(1)  # it was gone before


def _raised(exception: BaseException) -> Raised:
    text = traceback.format_exc()
    exception.__traceback__ = None
    with contextlib.suppress(Exception):
        copy = pickle.loads(dumps(exception))
        str(copy)  # as the main process is going to do
        if type(copy) is type(exception) and isinstance(exception, Exception):  # SystemExit would end the user's program
            return Raised(exception, text)
    return Raised(RuntimeError(f"{type(exception).__name__}: {_message(exception)}"), text)  # the exception can't be sent


def _message(exception: BaseException) -> str:
    try:
        return str(exception)
    except Exception as error:
        return f"its __str__ raised {type(error).__name__}"


def dumps(message: Any) -> bytes:
    """Pickle a message; by cloudpickle where pickle can't (classes of a script or a notebook)."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        dumped: bytes = cloudpickle.dumps(message)
        return dumped
