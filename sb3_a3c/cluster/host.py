"""
A host's part of a training: its workers, on a store in its own shared memory, and its end of the exchange. The broker calls
it, through whatever engine.
"""

import importlib.metadata
import os
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch as th

from sb3_a3c.cluster.exchange import Answer, Contribution, HostEnd
from sb3_a3c.cluster.messages import Deliver, Order, Start, StopWorkers
from sb3_a3c.processes.process_group import ProcessGroup
from sb3_a3c.processes.receiver import Event
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.version import __version__
from sb3_a3c.workers.worker_main import run_worker
from sb3_a3c.workers.worker_processes import PRELOAD

#: Seconds without a call after which a host ends. The broker gives it up sooner.
LEASE_SECONDS = 60.0
#: Seconds that :meth:`Host.listen` waits for events.
LISTEN_SECONDS = 0.25


@dataclass(frozen=True)
class Opening:
    """What a host needs to know before its workers start."""

    versions: Mapping[str, str]  #: that it must have
    policy: bytes  #: pickled, of the architecture that is trained
    n_workers: int  #: of all hosts
    timeout: float | None  #: as for ``ProcessGroup``
    start_method: str | None  #: likewise
    name: str  #: of the host, for people
    workers: tuple[int, ...]  #: of this host
    answer: Answer  #: the center's first


def versions() -> dict[str, str]:
    """Those of the packages that must be the same on all hosts."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "stable-baselines3", "gymnasium", "numpy")}
    return {"sb3_a3c": __version__, **{name: version.split("+")[0] for name, version in others.items()}}


class Host:
    """
    To be opened, then to be called by several threads: :meth:`exchange` by one at a time, :meth:`listen` by one.

    :param lease: seconds without a call after which the process ends; None: never
    """

    def __init__(self, lease: float | None = LEASE_SECONDS) -> None:
        th.set_num_threads(1)  # the cores are the workers'
        self._last_call = time.monotonic()
        self._lock = threading.Lock()  # of the processes, but for what is sent to them
        if lease is not None:
            threading.Thread(target=self._end_without_calls, args=(lease,), daemon=True).start()

    def open(self, opening: Opening) -> None:
        """
        Make the store, as the center's is.

        :raises ValueError: if packages have other versions
        """
        self._last_call = time.monotonic()
        mine = versions()
        if wrong := [name for name, version in opening.versions.items() if mine.get(name) != version]:
            told = ", ".join(f"{name} {mine.get(name)} instead of {opening.versions[name]}" for name in wrong)
            raise ValueError(f"{opening.name} has {told}. Install the versions of this machine there.")
        self._store = SharedMemoryStore(pickle.loads(opening.policy), opening.n_workers)
        self._end = HostEnd(self._store, opening.workers, opening.answer)
        self._group = ProcessGroup(
            run_worker, opening.n_workers, opening.start_method, PRELOAD, opening.timeout, place=f" on {opening.name}"
        )

    def carry_out(self, orders: Sequence[Order]) -> None:
        """Start workers, send to them, or ask them to end."""
        self._last_call = time.monotonic()
        for order in orders:
            match order:
                case Start(worker, arguments):
                    with self._lock:
                        self._group.start_one(worker, (self._store, *pickle.loads(arguments)))
                case Deliver(worker, message):
                    self._group.send_bytes(worker, message)
                case StopWorkers():
                    self._group.request_stop()

    def listen(self) -> list[tuple[int, Event]]:
        """Events of the workers. Returns as soon as there are some, or after ``LISTEN_SECONDS``."""
        self._last_call = time.monotonic()
        with self._lock:
            self._group.poll(time.monotonic() + LISTEN_SECONDS)
            return self._group.take_events()

    def exchange(self, answer: Answer, with_state: bool) -> Contribution:
        """As :meth:`HostEnd.exchange`."""
        self._last_call = time.monotonic()
        return self._end.exchange(answer, with_state)

    def close(self, answer: Answer) -> Contribution:
        """End the workers, and exchange for the last time."""
        self._last_call = time.monotonic()
        with self._lock:
            self._group.stop()
        contribution = self._end.exchange(answer, with_state=True)
        self._store.close()
        return contribution

    def _end_without_calls(self, lease: float) -> None:
        """If the broker is gone, or the way to it is cut, nothing must train on: others run in the place of its workers."""
        while time.monotonic() - self._last_call < lease:
            time.sleep(1.0)
        os._exit(1)
