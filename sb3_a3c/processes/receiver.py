"""
Receives events of workers, wherever these run: keeps messages until they are taken, raises what workers have raised and that
they died, and lets them be asked.
"""

import itertools
import math
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from sb3_a3c.errors import RemoteTraceback, WorkerDiedError
from sb3_a3c.processes.channel import Answer, Raised, Request, Returned, dumps
from sb3_a3c.processes.owner import Owned
from sb3_a3c.processes.signals import uninterrupted


class Died(NamedTuple):
    """Worker processes have ended, after their function had returned or before. For several with one cause, one event."""

    workers: tuple[int, ...]
    how: str  #: a sentence
    can_be_replaced: bool = True


#: A pickled message of a worker, or a death.
Event: TypeAlias = bytes | Died


class EventReceiver(Owned, ABC):
    """
    The receiving end of ``n_workers`` workers, which exceptions call ``name`` and their number.

    A subclass says where events come from, and how messages go to the workers.
    """

    def __init__(self, n_workers: int, name: str = "worker") -> None:
        self._n_workers, self._worker_name = n_workers, name
        Owned.__init__(self)
        self._answers: dict[int, Answer] = {}  # by worker
        self._ended: set[int] = set()  # workers that have returned, raised or died
        self._received: list[tuple[int, Any]] = []  # messages for the next call of `take`
        self._failures: list[BaseException] = []  # to be raised once each
        self._request_numbers = itertools.count()

    @abstractmethod
    def poll(self, deadline: float) -> bool:
        """Wait for events; False if there were none by ``deadline``, in the time of ``time.monotonic``."""

    @abstractmethod
    def take_events(self) -> Iterable[tuple[int, Event]]:
        """Take the events that :meth:`poll` has found, as (index of a worker, event)."""

    @abstractmethod
    def send(self, index: int, message: Any) -> None:
        """Put a message into a worker's inbox, without waiting. Does nothing if the worker has ended."""

    @property
    def ended(self) -> set[int]:
        """Workers that have ended. Empty while a message or a failure of any worker is still to be received."""
        return set() if self._failures or self._received else set(self._ended)

    @property
    def finished(self) -> bool:
        """Whether all workers have ended and all their messages and failures have been received."""
        return len(self.ended) == self._n_workers

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

    def ask(self, requests: Mapping[int, Any], on_death: Callable[[WorkerDiedError], None] | None = None) -> dict[int, Any]:
        """
        Send requests to some workers and wait for their answers. Other messages are kept for :meth:`receive`.

        :param requests: by worker
        :param on_death: replaces workers that have died, or raises; the new workers get the request again. Dead ones that it
            does not replace are left out of the answers
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
                dead = set(death.workers)
                requests = {index: content for index, content in requests.items() if index not in dead & self._ended}
                for index in waiting & dead & requests.keys():
                    self.send(index, Request(number, dumps(requests[index])))
                continue
            if waiting & self._ended:
                raise RuntimeError(f"Worker {min(waiting & self._ended)} has ended and can't answer any more.")
            self._listen(math.inf)
        answers = {index: self._answers.pop(index) for index in requests}
        for index, answer in answers.items():
            if answer.raised is not None:
                raise self._with_cause(index, answer.raised)
        return {index: answer.value for index, answer in answers.items()}

    def replaced(self, workers: Iterable[int]) -> None:
        """New workers run in the place of some that have ended."""
        self._ended -= set(workers)

    def _listen(self, deadline: float) -> bool:
        """Wait for events, and record them. False after ``deadline``."""
        found = self.poll(deadline)
        with uninterrupted():
            for index, event in self.take_events():
                if isinstance(event, Died):
                    self._record_death(event)
                else:
                    self._record_message(index, pickle.loads(event))
        return found

    def _record_message(self, index: int, message: Any) -> None:
        match message:
            case Returned():
                self._ended.add(index)
            case Raised():
                self._ended.add(index)
                self._failures.append(self._with_cause(index, message))
            case Answer():
                self._answers[index] = message
            case _:
                self._received.append((index, message))

    def _record_death(self, died: Died) -> None:
        workers = tuple(worker for worker in died.workers if worker not in self._ended)
        if not workers:
            return
        self._ended.update(workers)
        death = WorkerDiedError(died.how)
        death.worker, death.workers = workers[0], workers
        death.can_be_replaced = died.can_be_replaced
        self._failures.append(death)

    def _with_cause(self, index: int, raised: Raised) -> BaseException:
        """A worker's exception, with its traceback as the cause."""
        raised.exception.__cause__ = RemoteTraceback(f"In {self._worker_name} {index}:\n{raised.traceback}")
        return raised.exception
