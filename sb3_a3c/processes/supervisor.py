"""
Starts, watches, replaces and stops worker processes, which all run one function.

Who reads and writes what, for each worker process::

    main process                                       worker process
      arguments ─────────── at the start ────────────► target(channel, *arguments)
      receive() ◄────────── messages and answers, a pipe ── channel.send(), channel.serve()
      send(), ask() ─────── inbox, a pipe ───────────────► channel.serve()
      receive() ◄────────── sentinel: the process has ended
      request_stop() ────── stop flag, shared memory ────► channel.stopped()
      timeout ◄──────────── heartbeat, shared memory ───── channel.works(), channel.rests()

Workers share no queue, lock or semaphore: a worker killed while it holds one would stop all the others. The operating system
bounds the pipes, so ``channel.send()`` blocks while the main process does not read. The main process never blocks, because a
thread of the worker empties its inbox.
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

#: Seconds between two checks of the heartbeats.
LOOK_SECONDS = 1.0
#: Seconds that workers have to end by themselves, and then after SIGTERM, before they are killed.
STOP_SECONDS = 1.0


class Supervisor:
    """
    Worker processes that run ``target(channel, *arguments[i])``.

    :param target: a function that can be imported, or that cloudpickle can pickle
    :param arguments: one tuple for each process, pickled by multiprocessing, so that shared tensors stay shared
    :param start_method: "forkserver" or "spawn"; by default the first that the platform has
    :param preload: names of modules that a new fork server imports once for all its children
    :param timeout: seconds after which a worker without a new heartbeat (:meth:`WorkerChannel.works`) is killed; None: never
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
        # these dictionaries and sets are by worker
        self._processes: dict[int, ForkServerProcess | SpawnProcess] = {}
        self._pipes: dict[int, Pipe[Any, Any]] = {}  # the open ones
        self._inboxes: dict[int, Pipe[Any, Any]] = {}
        self._answers: dict[int, Answer] = {}
        self._hung: set[int] = set()  # killed after `timeout`
        self._ended: set[int] = set()  # returned, raised or dead
        self._received: list[tuple[int, Any]] = []  # messages for the next call of `take`
        self._failures: list[BaseException] = []  # to be raised once each
        self._request_numbers = itertools.count()
        util.Finalize(self, _detach, (self._processes,), exitpriority=0)

    def start(self) -> None:
        """Start all processes. If one can't be started, stop the others."""
        try:
            for index, arguments in enumerate(self._arguments):
                self._start(index, arguments)
        except BaseException:
            self.stop()
            raise

    def replace(self, index: int, arguments: tuple[Any, ...]) -> None:
        """Start a process in place of worker ``index``, whose :class:`WorkerDiedError` was raised."""
        if index in self._pipes:  # children of the dead process keep the other end open
            self._pipes.pop(index).close()
        self._inboxes.pop(index).close()
        self._processes.pop(index).close()
        self._heartbeats[index] = 0
        self._hung.discard(index)
        self._start(index, arguments)
        self._ended.discard(index)

    def _start(self, index: int, arguments: tuple[Any, ...]) -> None:
        self._pipes[index], writer = self._context.Pipe(duplex=False)
        inbox_reader, self._inboxes[index] = self._context.Pipe(duplex=False)
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
        """Workers that have ended. Empty while a message or a failure of any worker is still to be received."""
        return set() if self._failures or self._received else set(self._ended)

    @property
    def finished(self) -> bool:
        """Whether all workers have ended and all their messages and failures have been received."""
        return len(self.ended) == len(self._arguments)

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of the workers."""
        return [self._processes[index].pid or -1 for index in sorted(self._processes)]

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait until there is at least one message, all workers have finished, or ``timeout`` seconds have passed.

        :raises WorkerDiedError: if a worker died, once all messages received before have been taken
        :raises BaseException: what a worker raised, likewise
        """
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while not self._received and not self.finished:
            if self._failures:
                raise self._failures.pop(0)
            if not self._listen(deadline):
                break

    def receive(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        """:meth:`wait`, then :meth:`take`. Empty after the timeout, and when all workers have finished."""
        self.wait(timeout)
        return self.take()

    def take(self) -> list[tuple[int, Any]]:
        """Messages received so far, as (index of the worker, message). Those of one worker are in order."""
        received, self._received = self._received, []
        return received

    def send(self, index: int, message: Any) -> None:
        """Put a message into a worker's inbox. Does nothing if the worker has ended."""
        with contextlib.suppress(OSError, KeyError):  # KeyError if it could not be replaced
            self._inboxes[index].send_bytes(dumps(message))

    def ask(self, requests: Mapping[int, Any], on_death: Callable[[WorkerDiedError], None] | None = None) -> dict[int, Any]:
        """
        Send requests to some workers and wait for their answers. Other messages are kept for :meth:`receive`.

        :param requests: by worker
        :param on_death: replaces a worker that has died, or raises; the new worker gets the request again
        :return: answers by worker
        :raises WorkerDiedError: without ``on_death``, if a worker died; :meth:`receive` raises it again
        :raises RuntimeError: if a worker that was asked has ended
        :raises BaseException: what a worker raised; if that ended the worker, :meth:`receive` raises it again
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
                raise RuntimeError(f"Worker {min(waiting & self._ended)} has ended and can't answer any more.")
            self._listen(math.inf)
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
        End all processes, by force if they take longer than ``STOP_SECONDS`` or if ``hurry`` is set (by a second Ctrl-C),
        and free their resources.
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
            for pipe in [*self._pipes.values(), *self._inboxes.values()]:
                pipe.close()
            self._pipes, self._inboxes, self._processes = {}, {}, {}

    def _discard_messages(self, deadline: float) -> None:
        """Unblock workers that wait in ``send``, until all have closed their pipes."""
        pipes = list(self._pipes.values())
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

    def _listen(self, deadline: float) -> bool:
        """Wait for messages and deaths; read one message of each worker that has sent any. False after ``deadline``."""
        ready: list[Any] = []
        while not ready:
            self._kill_hung_workers()
            sentinels = [process.sentinel for index, process in self._processes.items() if index not in self._ended]
            wait = min(deadline - time.monotonic(), math.inf if self._timeout is None else LOOK_SECONDS)
            ready = connection.wait([*self._pipes.values(), *sentinels], None if wait == math.inf else max(0.0, wait))
            if not ready and time.monotonic() >= deadline:
                return False
        with uninterrupted():
            for index, pipe in list(self._pipes.items()):
                if pipe in ready:
                    self._read(index, pipe)
            for index, process in self._processes.items():
                if process.sentinel in ready and index not in self._ended:
                    self._record_death(index, process)
        return True

    def _kill_hung_workers(self) -> None:
        """Kill workers whose last heartbeat is older than ``timeout``."""
        late = time.monotonic() - self._next_look
        if self._timeout is None or late < 0:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        if late > 10 * LOOK_SECONDS:
            return  # this process was stopped, as by Ctrl-Z; the workers probably were, too
        oldest = time.monotonic_ns() - int(self._timeout * 1e9)
        for index, process in self._processes.items():
            if 0 < self._heartbeats[index] < oldest and index not in self._ended:
                self._hung.add(index)
                process.kill()

    def _read(self, index: int, pipe: "Pipe[Any, Any]") -> None:
        """Read one message from a pipe that is ready, or close the pipe at its end."""
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):  # OSError if the worker was killed while it sent a message
            self._pipes.pop(index).close()
            return
        match message := pickle.loads(data):
            case Returned():
                self._ended.add(index)
            case Raised():
                self._ended.add(index)
                self._failures.append(_with_cause(index, message))
            case Answer():
                self._answers[index] = message
            case _:
                self._received.append((index, message))

    def _record_death(self, index: int, process: ForkServerProcess | SpawnProcess) -> None:
        if index in self._pipes and self._pipes[index].poll():
            return  # its final messages are read first; not up to the pipe's end, as its children may keep the pipe open
        process.join()
        self._ended.add(index)
        if index in self._hung:
            how = (
                f"was killed because it made no progress for {self._timeout:g} s. Does the environment wait for something "
                "that never comes? If a step may take that long, raise `worker_timeout`."
            )
        else:
            how = _how_it_ended(process.exitcode)
        death = WorkerDiedError(f"Worker {index} {how}")
        death.worker = index
        self._failures.append(death)


def _detach(processes: "dict[int, ForkServerProcess | SpawnProcess]") -> None:
    """
    At interpreter exit, keep multiprocessing from joining the workers of a daemon thread that still trains, which would
    never return. They exit by themselves when this process has.
    """
    for worker in list(processes.values()):
        multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def _with_cause(index: int, raised: Raised) -> BaseException:
    """A worker's exception, with its traceback as the cause."""
    raised.exception.__cause__ = RemoteTraceback(f"In worker {index}:\n{raised.traceback}")
    return raised.exception


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exited with code {exitcode} before its function returned. Did the environment call os._exit()?"
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
