"""
A worker process's end of its line to the main process, and the body of every worker process. ``supervisor`` has the
other end, and a picture of the whole.
"""

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

Pipe = connection.Connection  # multiprocessing's, one end of it


class Returned(NamedTuple):
    """The worker's function has returned."""


class Raised(NamedTuple):
    """The worker's function has raised."""

    exception: BaseException
    traceback: str


class Request(NamedTuple):
    """A message to a worker that wants an answer."""

    number: int
    content: bytes


class Answer(NamedTuple):
    """What the worker's handler returned for a request, or raised."""

    number: int
    value: Any = None
    raised: Raised | None = None


class WorkerChannel:
    """A worker's end of its line. The first argument of its function."""

    def __init__(self, pipe: "Pipe[Any, Any]", inbox: "queue.SimpleQueue[bytes]", flags: th.Tensor, index: int) -> None:
        self._pipe = pipe
        self._inbox = inbox
        self._stop_flag = flags[:1].numpy()
        self._heartbeat = flags[1 + index : 2 + index].numpy()

    def send(self, message: Any) -> None:
        """
        Wait until the main process has room for the message, and send it.

        :param message: anything that pickle or cloudpickle can pickle
        """
        self._send_bytes(dumps(message))

    def serve(self, handler: Callable[[Any], Any], timeout: float | None = 0.0) -> bool:
        """
        Take one message out of the inbox, and hand it to ``handler``. If the main process has asked for an answer, it
        gets what ``handler`` returns, or raises.

        :param handler: called with the message
        :param timeout: seconds to wait for a message; None: until one comes, or a stop is requested
        :return: whether there was anything in the inbox
        """
        try:
            message = pickle.loads(self._inbox.get(timeout != 0, timeout))
        except queue.Empty:
            return False
        if isinstance(message, Request):
            self._answer(handler, message)
        elif message is not None:  # None only wakes
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
            os._exit(1)  # the main process does not listen any more

    def stopped(self) -> bool:
        """:return: whether the main process wants this worker to end"""
        return bool(self._stop_flag[0])

    def works(self) -> bool:
        """
        The worker begins a piece of work, which must not take longer than the supervisor's ``timeout``.

        :return: as :meth:`stopped`
        """
        self._heartbeat[0] = time.monotonic_ns()  # one clock for all processes of a machine
        return bool(self._stop_flag[0])

    def rests(self) -> None:
        """The worker works no more, and may now wait as long as it likes."""
        self._heartbeat[0] = 0


def worker_process(
    target: bytes,
    pipe: "Pipe[Any, Any]",
    inbox: "Pipe[Any, Any]",
    flags: th.Tensor,
    index: int,
    arguments: tuple[Any, ...],
) -> None:
    """Body of every worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process stops the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # whatever the environment wants with it
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_empty_inbox, args=(inbox, messages), daemon=True).start()
    channel = WorkerChannel(pipe, messages, flags, index)
    try:
        pickle.loads(target)(channel, *arguments)
        channel.send(Returned())
    except BaseException as exception:
        channel.send(_raised(exception))


def _empty_inbox(inbox: "Pipe[Any, Any]", messages: "queue.SimpleQueue[bytes]") -> None:
    """Thread of a worker: what the main process sends is taken at once, so that it need not wait. Ends with that process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(EOFError, OSError):
        while parent.sentinel not in connection.wait([inbox, parent.sentinel]):
            messages.put(inbox.recv_bytes())
    os._exit(1)


def _raised(exception: BaseException) -> Raised:
    text = traceback.format_exc()
    return Raised(_picklable(exception), text)


def _picklable(exception: BaseException) -> BaseException:
    """The exception itself if it survives a journey, else one that says what it was."""
    exception.__traceback__ = None
    try:
        copy = pickle.loads(dumps(exception))
        if type(copy) is type(exception) and isinstance(exception, Exception):  # SystemExit would end the user's program
            return exception
    except Exception:
        pass
    return RuntimeError(f"{type(exception).__name__}: {exception}")


def dumps(message: Any) -> bytes:
    """As bytes; cloudpickle where pickle can't (classes of a script or a notebook)."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        dumped: bytes = cloudpickle.dumps(message)
        return dumped
