"""
Starts, watches, replaces and stops worker processes, which all run one function.

Who reads and writes what, for each worker process::

    main process                                       worker process
      arguments ─────────── at the start ────────────► target(channel, *arguments)
      receive() ◄────────── messages and answers, a pipe ── channel.send(), channel.serve()
      send(), ask() ─────── outbox, inbox: a pipe ───────► channel.serve()
      receive() ◄────────── sentinel: the process has ended
      request_stop() ────── stop flag, shared memory ────► channel.stopped()
      timeout ◄──────────── heartbeats, shared memory ──── channel.works(), channel.rests(), channel.beat()

Workers share no queue, lock or semaphore: a worker killed while it holds one would stop all the others. The operating system
bounds the pipes, so ``channel.send()`` blocks while the main process does not read. The main process never blocks when
it sends: a thread of its own writes the messages to each worker, and a thread of the worker empties its inbox.
"""

import itertools
import math
import multiprocessing.process
import os
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
from sb3_a3c.processes.heartbeats import HangDetector
from sb3_a3c.processes.outbox import Outbox
from sb3_a3c.processes.signals import uninterrupted
from sb3_a3c.processes.start import Arguments, prepared_start, process_context

#: Seconds that workers have to end by themselves, and then after SIGTERM, before they are killed.
STOP_SECONDS = 1.0


class Supervisor:
    """
    Worker processes that run ``target(channel, *arguments[i])``.

    :param target: a function that can be imported, or that cloudpickle can pickle
    :param arguments: one tuple for each process; shared tensors stay shared
    :param start_method: "forkserver" or "spawn"; by default the first that the platform has
    :param preload: names of modules that a new fork server imports once for all its children
    :param timeout: seconds after which a worker without a new heartbeat (:meth:`WorkerChannel.works`), or whose process does
        not run, is killed; None: never
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
        self._flags = th.zeros(1 + len(arguments), 2, dtype=th.int64)  # the stop flag, and the workers' heartbeats
        self._flags.share_memory_()  # type: ignore[no-untyped-call]
        self._hang_detector = HangDetector(len(arguments), timeout)
        self._pid = os.getpid()
        # these dictionaries and sets are by worker
        self._processes: dict[int, ForkServerProcess | SpawnProcess] = {}
        self._pipes: dict[int, Pipe[Any, Any]] = {}  # the open ones
        self._outboxes: dict[int, Outbox] = {}
        self._answers: dict[int, Answer] = {}
        self._hung: dict[int, str] = {}  # killed after `timeout`, and why
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
        self._outboxes.pop(index).close()
        self._processes.pop(index).close()
        self._flags[1 + index] = 0
        self._hung.pop(index, None)
        self._start(index, arguments)
        self._ended.discard(index)

    def _start(self, index: int, arguments: tuple[Any, ...]) -> None:
        self._pipes[index], writer = self._context.Pipe(duplex=False)
        inbox_reader, inbox_writer = self._context.Pipe(duplex=False)
        self._outboxes[index] = Outbox(inbox_writer)
        process = self._context.Process(
            target=worker_process,
            args=(self._target, writer, inbox_reader, self._flags, index, Arguments(arguments)),
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

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked copy of the process that has started the workers, which must leave them alone."""
        return os.getpid() != self._pid

    def _check_not_forked(self) -> None:
        if self.is_forked:
            raise RuntimeError(
                "This process was forked from the one in which A3C learns, and can't go on learning with its workers. "
                "Leave the callback by os._exit(), or don't fork in it."
            )

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait until there is at least one message, all workers have finished, or ``timeout`` seconds have passed.

        :raises WorkerDiedError: if a worker died, once all messages received before have been taken
        :raises BaseException: what a worker raised, likewise
        """
        self._check_not_forked()
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
        """Put a message into a worker's inbox, without waiting. Does nothing if the worker has ended."""
        if index in self._outboxes and not self.is_forked:  # not, if it could not be replaced
            self._outboxes[index].put(dumps(message))

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
        self._check_not_forked()
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
        if self.is_forked:
            return
        self._flags[0] = 1
        for index in self._outboxes:
            self.send(index, None)

    def stop(self, hurry: threading.Event | None = None) -> None:
        """
        End all processes, by force if they take longer than ``STOP_SECONDS`` or if ``hurry`` is set (by a second Ctrl-C),
        and free their resources. In a forked process this does nothing: they are not its children.
        """
        if self.is_forked:
            return
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
            for pipe in self._pipes.values():
                pipe.close()
            for outbox in self._outboxes.values():
                outbox.close()
            self._pipes, self._outboxes, self._processes = {}, {}, {}
            self._flags = self._flags.clone()  # an exception's traceback may keep this object, but no shared memory

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
            wait = min(deadline - time.monotonic(), self._hang_detector.seconds_to_next_look())
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
        for index, fault in self._hang_detector.look(self._flags[1:].numpy()).items():
            if index not in self._ended:
                self._hung[index] = fault
                self._processes[index].kill()

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
        fault = self._hung.get(index)
        how = _how_it_ended(process.exitcode) if fault is None else f"was killed because it {fault}"
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
