"""
Starts, watches, replaces and stops processes that all run one function. What they send comes out as *events*, unread: who
reads them may be in another process, to which exceptions and their tracebacks travel as they are (``receiver``).

Who reads and writes what, for each worker process::

    main process                                       worker process
      arguments ─────────── at the start ────────────► target(channel, *arguments)
      poll() ◄───────────── messages and answers, a pipe ── channel.send(), channel.serve()
      send() ────────────── outbox, inbox: a pipe ───────► channel.serve()
      poll() ◄───────────── sentinel: the process has ended
      request_stop() ────── stop flag, shared memory ────► channel.stopped()
      timeout ◄──────────── heartbeats, shared memory ──── channel.works(), channel.rests(), channel.beat()

Workers share no queue, lock or semaphore: a worker killed while it holds one would stop all the others. The operating system
bounds the pipes, so ``channel.send()`` blocks while the main process does not read. The main process never blocks when
it sends: a thread of its own writes the messages to each worker, and a thread of the worker empties its inbox.
"""

import math
import multiprocessing.process
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

import cloudpickle
import torch as th

from sb3_a3c.processes.channel import Pipe, dumps, worker_process
from sb3_a3c.processes.heartbeats import HangDetector
from sb3_a3c.processes.outbox import Outbox
from sb3_a3c.processes.owner import Owned
from sb3_a3c.processes.receiver import Died, Event
from sb3_a3c.processes.signals import uninterrupted
from sb3_a3c.processes.start import Arguments, prepared_start, process_context

#: Seconds that workers have to end by themselves, and then after SIGTERM, before they are killed.
STOP_SECONDS = 1.0


class ProcessGroup(Owned):
    """
    Processes that run ``target(channel, *arguments)``, each with arguments of its own. They are numbered.

    :param target: a function that can be imported, or that cloudpickle can pickle
    :param n_processes: how many may run at once; none does yet
    :param start_method: "forkserver" or "spawn"; by default the first that the platform has
    :param preload: names of modules that a new fork server imports once for all its children
    :param timeout: seconds after which a worker without a new heartbeat (:meth:`WorkerChannel.works`), or whose process does
        not run, is killed; None: never
    :param name: of the processes, before their number
    :param place: where they run, as it follows their number in messages
    """

    def __init__(
        self,
        target: Callable[..., None],
        n_processes: int,
        start_method: str | None = None,
        preload: Sequence[str] = (),
        timeout: float | None = None,
        name: str = "worker",
        place: str = "",
    ) -> None:
        self._target = cloudpickle.dumps(target)
        self._context = process_context(start_method)
        self._preload = preload
        self._name, self._place = name, place
        self._flags = th.zeros(1 + n_processes, 2, dtype=th.int64)  # the stop flag, and the workers' heartbeats
        self._flags.share_memory_()  # type: ignore[no-untyped-call]
        self._hang_detector = HangDetector(n_processes, timeout)
        Owned.__init__(self)
        # these dictionaries and sets are by worker
        self._processes: dict[int, ForkServerProcess | SpawnProcess] = {}
        self._pipes: dict[int, Pipe[Any, Any]] = {}  # the open ones
        self._outboxes: dict[int, Outbox] = {}
        self._hung: dict[int, str] = {}  # killed after `timeout`, and why
        self._exited: set[int] = set()
        self._events: list[tuple[int, Event]] = []  # for the next call of `take_events`
        util.Finalize(self, _detach, (self._processes,), exitpriority=0)

    def start_one(self, index: int, arguments: tuple[Any, ...]) -> None:
        """Start process ``index``, also in the place of one that has died. Shared tensors in its arguments stay shared."""
        if index in self._processes:
            if index in self._pipes:  # children of the dead process keep the other end open
                self._pipes.pop(index).close()
            self._outboxes.pop(index).close()
            self._processes.pop(index).close()
            self._flags[1 + index] = 0
            self._hung.pop(index, None)
        self._pipes[index], writer = self._context.Pipe(duplex=False)
        inbox_reader, inbox_writer = self._context.Pipe(duplex=False)
        self._outboxes[index] = Outbox(inbox_writer)
        process = self._context.Process(
            target=worker_process,
            args=(self._target, writer, inbox_reader, self._flags, index, Arguments(arguments)),
            name=f"a3c-{self._name}-{index}",
        )
        try:
            with prepared_start(self._context, self._preload):
                process.start()
            self._processes[index] = process
        finally:
            writer.close()
            inbox_reader.close()
        self._exited.discard(index)

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of the workers."""
        return [self._processes[index].pid or -1 for index in sorted(self._processes)]

    def poll(self, deadline: float) -> bool:
        """Wait for messages and deaths; read one message of each worker that has sent any. False after ``deadline``."""
        ready: list[Any] = []
        while not ready:
            self._kill_hung_workers()
            sentinels = [process.sentinel for index, process in self._processes.items() if index not in self._exited]
            wait = min(deadline - time.monotonic(), self._hang_detector.seconds_to_next_look())
            ready = connection.wait([*self._pipes.values(), *sentinels], None if wait == math.inf else max(0.0, wait))
            if not ready and time.monotonic() >= deadline:
                return False
        with uninterrupted():
            for index, pipe in list(self._pipes.items()):
                if pipe in ready:
                    self._read(index, pipe)
            for index, process in self._processes.items():
                if process.sentinel in ready and index not in self._exited:
                    self._note_exit(index, process)
        return True

    def send(self, index: int, message: Any) -> None:
        """Put a message into a worker's inbox, without waiting. Does nothing if the worker has ended."""
        self.send_bytes(index, dumps(message))

    def send_bytes(self, index: int, message: bytes) -> None:
        """As :meth:`send`, for a message that ``channel.dumps`` has pickled."""
        if index in self._outboxes and not self.is_forked:  # not, if it could not be replaced
            self._outboxes[index].put(message)

    def take_events(self) -> list[tuple[int, Event]]:
        """What :meth:`poll` has found, as (index of the worker, pickled message or :class:`Died`), in order."""
        events, self._events = self._events, []
        return events

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

    def _kill_hung_workers(self) -> None:
        for index, fault in self._hang_detector.look(self._flags[1:].numpy()).items():
            if index not in self._exited:
                self._hung[index] = fault
                self._processes[index].kill()

    def _read(self, index: int, pipe: "Pipe[Any, Any]") -> None:
        """Read one message from a pipe that is ready, or close the pipe at its end."""
        try:
            self._events.append((index, pipe.recv_bytes()))
        except (EOFError, OSError):  # OSError if the worker was killed while it sent a message
            self._pipes.pop(index).close()

    def _note_exit(self, index: int, process: ForkServerProcess | SpawnProcess) -> None:
        if index in self._pipes and self._pipes[index].poll():
            return  # its final messages are read first; not up to the pipe's end, as its children may keep the pipe open
        process.join()
        self._exited.add(index)
        fault = self._hung.get(index)
        how = _how_it_ended(process.exitcode) if fault is None else f"was killed because it {fault}"
        self._events.append((index, Died((index,), f"{self._name.capitalize()} {index}{self._place} {how}")))


def _detach(processes: "dict[int, ForkServerProcess | SpawnProcess]") -> None:
    """
    At interpreter exit, keep multiprocessing from joining the workers of a daemon thread that still trains, which would
    never return. They exit by themselves when this process has.
    """
    for worker in list(processes.values()):
        multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


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
