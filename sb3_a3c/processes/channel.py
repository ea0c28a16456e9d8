"""The worker's side of the communication with the main process. See ``supervisor`` for the main process's side."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

import cloudpickle
import torch as th

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
        self._stop_flag = flags[:1].numpy()
        self._heartbeat = flags[1 + index : 2 + index].numpy()

    def send(self, message: Any) -> None:
        """Send anything that pickle or cloudpickle can pickle. Blocks while the pipe is full."""
        self._send_bytes(dumps(message))

    def serve(self, handler: Callable[[Any], Any], timeout: float | None = 0.0) -> bool:
        """
        Take one message out of the inbox and call ``handler`` with it. If the message is a request, what ``handler``
        returns or raises is sent as the answer. Return whether there was a message.

        :param timeout: seconds to wait for a message; None waits until one arrives or a stop is requested
        """
        try:
            message = pickle.loads(self._inbox.get(timeout != 0, timeout))
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

    def stopped(self) -> bool:
        """Whether the main process wants this worker to end."""
        return bool(self._stop_flag[0])

    def works(self) -> bool:
        """Record a heartbeat: the next one, or :meth:`rests`, must follow within ``timeout``. Returns :meth:`stopped`."""
        self._heartbeat[0] = time.monotonic_ns()  # one clock for all processes of a machine
        return bool(self._stop_flag[0])

    def rests(self) -> None:
        """Clear the heartbeat: from now on the worker may wait for any time."""
        self._heartbeat[0] = 0


def worker_process(
    target: bytes, pipe: "Pipe[Any, Any]", inbox: "Pipe[Any, Any]", flags: th.Tensor, index: int, arguments: tuple[Any, ...]
) -> None:
    """Entry point of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process stops the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked during the start; an environment may use it
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_empty_inbox, args=(inbox, messages), daemon=True).start()
    channel = WorkerChannel(pipe, messages, flags, index)
    try:
        pickle.loads(target)(channel, *arguments)
        channel.send(Returned())
    except BaseException as exception:
        channel.send(_raised(exception))


def _empty_inbox(inbox: "Pipe[Any, Any]", messages: "queue.SimpleQueue[bytes]") -> None:
    """A thread that reads messages as they arrive, so that the main process never blocks. Exits when that process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(EOFError, OSError):
        while parent.sentinel not in connection.wait([inbox, parent.sentinel]):
            messages.put(inbox.recv_bytes())
    os._exit(1)


def _raised(exception: BaseException) -> Raised:
    text = traceback.format_exc()
    exception.__traceback__ = None
    try:
        copy = pickle.loads(dumps(exception))
        if type(copy) is type(exception) and isinstance(exception, Exception):  # SystemExit would end the user's program
            return Raised(exception, text)
    except Exception:
        pass
    return Raised(RuntimeError(f"{type(exception).__name__}: {exception}"), text)  # the exception can't be pickled


def dumps(message: Any) -> bytes:
    """Pickle a message; by cloudpickle where pickle can't (classes of a script or a notebook)."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        dumped: bytes = cloudpickle.dumps(message)
        return dumped
