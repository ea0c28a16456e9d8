"""
Starts, watches and stops processes that all run one function. Knows no reinforcement learning.

Who reads and writes what, for each worker process::

    main process                                       worker process
      arguments ─────────── at the start ────────────► target(channel, *arguments)
      receive() ◄────────── messages, a pipe of its own ◄── channel.send()
      send(), ask() ─────── inbox, a pipe of its own ────► channel.serve(), whose answers to ask() go back with the messages
      receive() ◄────────── sentinel: the process has ended
      request_stop() ────── stop flag, shared memory ────► channel.stopped()
      timeout ◄──────────── heartbeat, shared memory ───── channel.works(), channel.rests()

Workers share no queue, lock or semaphore: one that is killed while it holds such a thing would stop all the others. The
pipes are bounded by the operating system. So a worker waits in ``send`` while nobody reads; the main process does not,
because a thread of the worker empties its inbox.
"""

import contextlib
import itertools
import math
import multiprocessing.process
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

import cloudpickle
import torch as th

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import Answer, Pipe, Raised, Request, Returned, dumps, worker_process
from sb3_a3c.processes.signals import uninterrupted
from sb3_a3c.processes.start import prepared_start, process_context

#: Seconds between two looks at the heartbeats.
LOOK_SECONDS = 1.0
#: Seconds that a worker is given to end by itself, and then to follow SIGTERM, before it is killed.
STOP_SECONDS = 1.0


_HUNG = (
    "it had not come further for {:g} s. Does the environment wait for something that never comes? If its steps may take so "
    "long, raise `worker_timeout`."
)


class Supervisor:
    """
    Processes that run ``target(channel, *arguments[i])``.

    :param target: a function that can be imported, or that cloudpickle can pickle
    :param arguments: one tuple for each process; what it holds goes through multiprocessing's pickler, so that shared
        tensors stay shared
    :param start_method: "forkserver" or "spawn"; None takes the first that the platform has
    :param preload: names of modules that a new fork server imports once for all its children
    :param timeout: seconds that a worker may take for a piece of work (:meth:`WorkerChannel.works`) before it is killed;
        None for ever
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        start_method: str | None = None,
        preload: Sequence[str] = (),
        timeout: float | None = None,
    ) -> None:
        self._target = cloudpickle.dumps(target)
        self._arguments = arguments
        self._context = process_context(start_method)
        self._preload = preload
        self._flags = th.zeros(1 + len(arguments), dtype=th.int64)  # the stop flag, and the workers' heartbeats
        self._flags.share_memory_()  # type: ignore[no-untyped-call]
        self._heartbeats = self._flags[1:].numpy()
        self._timeout = timeout
        self._next_look = 0.0
        self._hung: set[int] = set()  # workers that were killed because their heart had stopped
        self._processes: dict[int, ForkServerProcess | SpawnProcess] = {}  # by worker
        self._pipes: dict[Pipe[Any, Any], int] = {}  # the open ones, and whose they are
        self._inboxes: dict[int, Pipe[Any, Any]] = {}  # by worker
        self._received: list[tuple[int, Any]] = []  # messages for the next call of receive
        self._answers: dict[int, Answer] = {}  # by worker
        self._request_numbers = itertools.count()
        self._ended: set[int] = set()  # workers that need not be heard any more: finished, or their failure is known
        self._failures: list[BaseException] = []  # to be raised, each once
        util.Finalize(self, _let_go, (self._processes,), exitpriority=0)

    def start(self) -> None:
        """Start all processes. If one can't be started, none is left."""
        try:
            for index, arguments in enumerate(self._arguments):
                self._start(index, arguments)
        except BaseException:
            self.stop()
            raise

    def replace(self, index: int, arguments: tuple[Any, ...]) -> None:
        """
        Start a process in the place of one that has died, after its death was raised.

        :param index: of the worker
        :param arguments: of the new process
        """
        for pipe in [pipe for pipe, owner in self._pipes.items() if owner == index]:
            pipe.close()  # where children of the dead process keep its other end open
            del self._pipes[pipe]
        self._inboxes.pop(index).close()
        self._processes.pop(index).close()
        self._heartbeats[index] = 0
        self._hung.discard(index)
        self._start(index, arguments)
        self._ended.discard(index)

    def _start(self, index: int, arguments: tuple[Any, ...]) -> None:
        reader, writer = self._context.Pipe(duplex=False)
        inbox_reader, inbox_writer = self._context.Pipe(duplex=False)
        self._pipes[reader] = index
        self._inboxes[index] = inbox_writer
        process = self._context.Process(
            target=worker_process,
            args=(self._target, writer, inbox_reader, self._flags, index, arguments),
            name=f"a3c-worker-{index}",
        )
        try:
            with prepared_start(self._context, self._preload):
                process.start()
            self._processes[index] = process
        finally:
            writer.close()
            inbox_reader.close()

    @property
    def ended(self) -> set[int]:
        """The workers that have ended; none as long as something that was sent, or a failure, is still to be received."""
        return set() if self._failures or self._received else set(self._ended)

    @property
    def finished(self) -> bool:
        """Whether every worker has ended and all that it sent (messages, or its failure) has been received."""
        return len(self.ended) == len(self._arguments)

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of the arguments."""
        return [self._processes[index].pid or -1 for index in sorted(self._processes)]

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait until at least one message has come, or all workers have finished.

        :param timeout: seconds to wait at most
        :raises WorkerDiedError: if a worker ended without having finished, and all that others had sent before was received
        :raises BaseException: what a worker raised, likewise
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._received and not self.finished:
            if self._failures:
                raise self._failures.pop(0)
            if not self._listen(None if deadline is None else max(0.0, deadline - time.monotonic())):
                break

    def receive(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        """
        :meth:`wait`, and take what has come.

        :param timeout: seconds to wait at most
        :return: as :meth:`take`; empty after the timeout or at the end
        :raises BaseException: as :meth:`wait`
        """
        self.wait(timeout)
        return self.take()

    def take(self) -> list[tuple[int, Any]]:
        """
        :return: what has come, without waiting: (index of the worker, message), those of one worker in order
        """
        received, self._received = self._received, []
        return received

    def send(self, index: int, message: Any) -> None:
        """
        Put a message into a worker's inbox. If the worker has ended, nothing happens.

        :param index: of the worker
        :param message: anything that pickle or cloudpickle can pickle
        """
        with contextlib.suppress(OSError, KeyError):  # the latter if it could not be replaced
            self._inboxes[index].send_bytes(dumps(message))

    def ask(self, requests: Mapping[int, Any], on_death: Callable[[WorkerDiedError], None] | None = None) -> dict[int, Any]:
        """
        Put a message into the inbox of some workers and wait for their answers. Messages that come meanwhile are kept for
        :meth:`receive`.

        :param requests: for each worker asked its message
        :param on_death: replaces a worker that has died, or raises; a new one that is asked gets the message again
        :return: for each its answer
        :raises WorkerDiedError: without ``on_death``, if a worker ended without having finished; :meth:`receive` will say
            so too
        :raises RuntimeError: if a worker that was asked has finished
        :raises BaseException: what a worker raised; :meth:`receive` will say so too. Or instead of an answer
        """
        number = next(self._request_numbers)
        for index, content in requests.items():
            self._answers.pop(index, None)
            self.send(index, Request(number, dumps(content)))
        while waiting := {i for i in requests if i not in self._answers or self._answers[i].number != number}:
            if self._failures:
                death = self._failures[0]
                if on_death is None or not isinstance(death, WorkerDiedError):
                    raise death
                on_death(death)
                self._failures.remove(death)
                if death.worker in waiting:
                    self.send(death.worker, Request(number, dumps(requests[death.worker])))
                continue
            if waiting & self._ended:
                raise RuntimeError(f"Worker {min(waiting & self._ended)} has finished and can't answer any more")
            self._listen(None)
        answers = {index: self._answers.pop(index) for index in requests}
        for index, answer in answers.items():
            if answer.raised is not None:
                raise _with_cause(index, answer.raised)
        return {index: answer.value for index, answer in answers.items()}

    def request_stop(self) -> None:
        """Ask all workers to end soon. Keep receiving until ``finished``, or call :meth:`stop`."""
        self._flags[0] = 1
        for index in self._inboxes:
            self.send(index, None)

    def stop(self, hurry: threading.Event | None = None) -> None:
        """
        End all processes, by force if they take longer than ``STOP_SECONDS``, and free what was used for them.

        :param hurry: set by a second Ctrl-C; then by force at once
        """
        self.request_stop()
        try:
            for end in (self._discard_messages, self._join_all, self._terminate_all):
                end(time.monotonic() + (0.0 if hurry is not None and hurry.is_set() else STOP_SECONDS))
        finally:
            for process in self._processes.values():
                if process.exitcode is None:
                    process.kill()
                process.join()
                process.close()
            for pipe in [*self._pipes, *self._inboxes.values()]:
                pipe.close()
            self._pipes, self._inboxes, self._processes = {}, {}, {}

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

    def _terminate_all(self, deadline: float) -> None:
        for process in self._processes.values():
            if process.exitcode is None:
                process.terminate()
        self._join_all(deadline)

    def _join_all(self, deadline: float) -> None:
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))

    def _sentinels(self) -> list[int]:
        return [process.sentinel for index, process in self._processes.items() if index not in self._ended]

    def _listen(self, timeout: float | None) -> bool:
        """Take in what comes next, from all that have something to say; False if nothing came in time."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        ready: list[Any] = []
        while not ready:
            self._kill_the_hung()
            now = time.monotonic()
            wait = min(deadline - now, math.inf if self._timeout is None else LOOK_SECONDS)
            ready = connection.wait([*self._pipes, *self._sentinels()], None if wait == math.inf else max(0.0, wait))
            if not ready and time.monotonic() >= deadline:
                return False
        with uninterrupted():
            for pipe in [pipe for pipe in self._pipes if pipe in ready]:
                self._read(pipe)
            for index, process in self._processes.items():
                if process.sentinel in ready and index not in self._ended:
                    self._bury(index, process)
        return True

    def _kill_the_hung(self) -> None:
        """Of those that have worked on the same piece for too long, nobody knows what they wait for."""
        late = time.monotonic() - self._next_look
        if self._timeout is None or late < 0:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        if late > 10 * LOOK_SECONDS:
            return  # this process has stood still itself, as after Ctrl-Z: so may they have
        too_long_ago = time.monotonic_ns() - int(self._timeout * 1e9)
        for index, process in self._processes.items():
            if 0 < self._heartbeats[index] < too_long_ago and index not in self._ended:
                self._hung.add(index)
                process.kill()

    def _read(self, pipe: "Pipe[Any, Any]") -> None:
        """Take in the next message of a pipe that is ready; none at its end."""
        index = self._pipes[pipe]
        data = b""
        with contextlib.suppress(EOFError, OSError):  # the latter if the worker was killed in mid-message
            data = pipe.recv_bytes()
        if not data:  # its end
            pipe.close()
            del self._pipes[pipe]
        message = pickle.loads(data) if data else None
        if isinstance(message, Returned):
            self._ended.add(index)
        elif isinstance(message, Raised):
            self._ended.add(index)
            self._failures.append(_with_cause(index, message))
        elif isinstance(message, Answer):
            self._answers[index] = message
        elif data:
            self._received.append((index, message))

    def _bury(self, index: int, process: ForkServerProcess | SpawnProcess) -> None:
        """Of a worker whose process has ended: note its death, once it has nothing more to say."""
        for pipe in [pipe for pipe, owner in self._pipes.items() if owner == index]:
            if pipe.poll():
                return  # its last words are read first; its own children may keep the pipe open after them
        process.join()
        self._ended.add(index)
        how = f"was killed, as {_HUNG.format(self._timeout)}" if index in self._hung else _how_it_ended(process.exitcode)
        death = WorkerDiedError(f"Worker {index} {how}")
        death.worker = index
        self._failures.append(death)


def _let_go(processes: "dict[int, ForkServerProcess | SpawnProcess]") -> None:
    """
    When the program ends while a daemon thread trains, multiprocessing would wait for the workers, and they for the thread.
    They end by themselves once this process has.
    """
    for worker in list(processes.values()):
        multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def _with_cause(index: int, raised: Raised) -> BaseException:
    """A worker's exception, which names its traceback as cause."""
    raised.exception.__cause__ = RemoteTraceback(f"In worker {index}:\n{raised.traceback}")
    return raised.exception


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
