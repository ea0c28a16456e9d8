"""
Starts, watches and stops processes that all run one function. Knows no reinforcement learning.

Who reads and writes what, for each worker process::

    main process                                  worker process
      arguments ────────── at the start ──────────► target(channel, *arguments)
      receive() ◄───────── messages, a pipe of its own ◄── channel.send()
      receive() ◄───────── sentinel: the process has ended
      request_stop() ───── stop flag, shared memory ─────► channel.stopped()

Workers share no queue, lock or semaphore: one that is killed while it holds such a thing would stop all the others. The
pipe is bounded by the operating system, so a worker waits in ``send`` while nobody reads.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any, NamedTuple

import cloudpickle
import torch as th

from sb3_a3c.errors import WorkerDiedError, WorkerTracebackError

#: Seconds that a worker is given to end by itself, and then to follow SIGTERM, before it is killed.
STOP_SECONDS = 1.0

_starting = threading.Lock()


class _Finished(NamedTuple):
    """The worker's function has returned."""


class _Raised(NamedTuple):
    """The worker's function has raised."""

    exception: BaseException
    traceback: str


class WorkerChannel:
    """A worker's end of its line. The first argument of its function."""

    def __init__(self, pipe: "connection.Connection[Any, Any]", stop_flag: th.Tensor) -> None:
        self._pipe = pipe
        self._stop_flag = stop_flag.numpy()

    def send(self, message: Any) -> None:
        """
        Wait until the main process has room for the message, and send it.

        :param message: anything that pickle or cloudpickle can pickle
        """
        data = _dumps(message)
        try:
            self._pipe.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # the main process does not listen any more

    def stopped(self) -> bool:
        """:return: whether the main process wants this worker to end"""
        return bool(self._stop_flag[0])


class Supervisor:
    """
    Processes that run ``target(channel, *arguments[i])``.

    :param target: a function that can be imported, or that cloudpickle can pickle
    :param arguments: one tuple for each process; what it holds goes through multiprocessing's pickler, so that shared
        tensors stay shared
    :param start_method: "forkserver" or "spawn"; None takes the first that the platform has
    :param preload: names of modules that a new fork server imports once for all its children
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        start_method: str | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self._target = cloudpickle.dumps(target)
        self._arguments = arguments
        self._context = _context(start_method, preload)
        self._stop_flag = th.zeros(1, dtype=th.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._processes: list[ForkServerProcess | SpawnProcess] = []
        self._pipes: dict[connection.Connection[Any, Any], int] = {}  # the open ones, and whose they are
        self._ended: set[int] = set()  # workers that need not be heard any more: finished, or their failure is known
        self._failures: list[BaseException] = []  # to be raised, each once

    def start(self) -> None:
        """Start all processes. If one can't be started, none is left."""
        try:
            for index, arguments in enumerate(self._arguments):
                reader, writer = self._context.Pipe(duplex=False)
                process = self._context.Process(
                    target=_worker_process,
                    args=(self._target, writer, self._stop_flag, arguments),
                    name=f"a3c-worker-{index}",
                )
                self._pipes[reader] = index
                try:
                    with _starting, _without_main_module():
                        process.start()
                    self._processes.append(process)
                finally:
                    writer.close()
        except BaseException:
            self.stop()
            raise

    @property
    def finished(self) -> bool:
        """Whether every worker has ended and all that it sent (messages, or its failure) has been received."""
        return len(self._ended) == len(self._arguments) and not self._failures

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of the arguments."""
        return [process.pid or -1 for process in self._processes]

    def receive(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        """
        Wait until at least one message has come, or all workers have finished.

        :param timeout: seconds to wait at most
        :return: (index of the worker, message), at most one from each worker; empty after the timeout or at the end
        :raises WorkerDiedError: if a worker ended without having finished
        :raises BaseException: what a worker raised
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        messages: list[tuple[int, Any]] = []
        while not messages and not self.finished:
            if self._failures:  # only now: what others had sent before must not be lost
                raise self._failures.pop(0)
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = connection.wait([*self._pipes, *self._sentinels()], remaining)
            if not ready:
                break
            for pipe in [pipe for pipe in self._pipes if pipe in ready]:
                messages += self._read(pipe)
            for index, process in enumerate(self._processes):
                if process.sentinel in ready and index not in self._ended:
                    self._bury(index, process)
        return messages

    def request_stop(self) -> None:
        """Ask all workers to end soon. Keep receiving until ``finished``, or call :meth:`stop`."""
        self._stop_flag[0] = 1

    def stop(self) -> None:
        """End all processes, by force if they take longer than ``STOP_SECONDS``, and free what was used for them."""
        self._stop_flag[0] = 1
        try:
            self._discard_messages(time.monotonic() + STOP_SECONDS)
            self._join_all(time.monotonic() + STOP_SECONDS)
            for process in self._processes:
                if process.exitcode is None:
                    process.terminate()
            self._join_all(time.monotonic() + STOP_SECONDS)
        finally:  # also when the user is tired of waiting
            for process in self._processes:
                if process.exitcode is None:
                    process.kill()
                process.join()
                process.close()
            for pipe in self._pipes:
                pipe.close()
            self._pipes, self._processes = {}, []

    def _discard_messages(self, deadline: float) -> None:
        """Let workers that wait in ``send`` go on, until each has closed its pipe."""
        pipes = list(self._pipes)
        while pipes and time.monotonic() < deadline:
            for pipe in connection.wait(pipes, max(0.0, deadline - time.monotonic())):
                assert isinstance(pipe, connection.Connection)
                try:
                    pipe.recv_bytes()
                except (EOFError, OSError):
                    pipes.remove(pipe)

    def _join_all(self, deadline: float) -> None:
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _sentinels(self) -> list[int]:
        return [process.sentinel for index, process in enumerate(self._processes) if index not in self._ended]

    def _read(self, pipe: "connection.Connection[Any, Any]") -> list[tuple[int, Any]]:
        """The next message of a pipe that is ready; none at its end."""
        index = self._pipes[pipe]
        data = b""
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):  # the latter if the worker was killed in mid-message
            pass
        finally:  # at its end, or cut by Ctrl-C: nothing that follows could be understood
            if not data:
                pipe.close()
                del self._pipes[pipe]
        message = pickle.loads(data) if data else None
        if isinstance(message, _Finished):
            self._ended.add(index)
        elif isinstance(message, _Raised):
            self._ended.add(index)
            message.exception.__cause__ = WorkerTracebackError(f"In worker {index}:\n{message.traceback}")
            self._failures.append(message.exception)
        elif data:
            return [(index, message)]
        return []

    def _bury(self, index: int, process: ForkServerProcess | SpawnProcess) -> None:
        """Of a worker whose process has ended: note its death, once it has nothing more to say."""
        for pipe in [pipe for pipe, owner in self._pipes.items() if owner == index]:
            if pipe.poll():
                return  # its last words are read first; its own children may keep the pipe open after them
        process.join()
        self._ended.add(index)
        self._failures.append(WorkerDiedError(f"Worker {index} {_how_it_ended(process.exitcode)}"))


def _worker_process(target: bytes, pipe: Any, stop_flag: th.Tensor, arguments: tuple[Any, ...]) -> None:
    """Body of every worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    channel = WorkerChannel(pipe, stop_flag)
    try:
        pickle.loads(target)(channel, *arguments)
        channel.send(_Finished())
    except BaseException as exception:
        text = traceback.format_exc()
        channel.send(_Raised(_picklable(exception), text))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _picklable(exception: BaseException) -> BaseException:
    """The exception itself if it survives a journey, else one that says what it was."""
    exception.__traceback__ = None
    try:
        copy = pickle.loads(_dumps(exception))
        if type(copy) is type(exception) and isinstance(exception, Exception):  # SystemExit would end the user's program
            return exception
    except Exception:
        pass
    return RuntimeError(f"{type(exception).__name__}: {exception}")


def _dumps(message: Any) -> bytes:
    """As bytes; cloudpickle where pickle can't (classes of a script or a notebook)."""
    try:
        return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        dumped: bytes = cloudpickle.dumps(message)
        return dumped


def _context(start_method: str | None, preload: Sequence[str]) -> Any:
    available = multiprocessing.get_all_start_methods()
    method = start_method or ("forkserver" if "forkserver" in available else "spawn")
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(preload))
    return context


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """
    Start processes that do not import the main script: it needs no ``if __name__ == "__main__":`` guard, and may as well
    be a notebook or standard input. What a worker needs of it comes by value, through cloudpickle.
    """
    main = sys.modules["__main__"]
    if multiprocessing.parent_process() is None:  # else this process was itself started with a main script fit for import
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exited with code {exitcode} without finishing. Did the environment call os._exit() or sys.exit()?"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    cause = {
        "SIGKILL": "Most likely the system ran out of memory: use fewer workers or smaller environments.",
        "SIGSEGV": "Most likely C code of the environment or of a library crashed.",
        "SIGBUS": "Most likely /dev/shm is full: give the container more (docker run --shm-size=1g).",
    }.get(name, "Something else ended it from outside.")
    return f"was killed by {name}. {cause}"
