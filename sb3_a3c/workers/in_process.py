"""The one worker of ``n_workers=0``: the same actor-learner in this process, for debuggers and notebooks."""

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.actor_learner.config import WorkerConfig
from sb3_a3c.envs.last_step import allow_last_step, refuse_last_step
from sb3_a3c.store.base import ParameterStore
from sb3_a3c.workers.protocol import OnOneStore, RolloutFinished, Ticket, UpdateHyperparams


class InProcessWorker(OnOneStore):
    """
    :class:`~sb3_a3c.workers.protocol.Workers` of one, in the user's environments: to wait for it is to let it make its next
    rollout. It has its own random state and number of threads.
    """

    n_here = 0

    def __init__(self, config: WorkerConfig, env: VecEnv, store: ParameterStore) -> None:
        super().__init__(store)
        self._stop = False
        self.finished = False
        self._received: list[tuple[int, Any]] = []
        self._learning_rate = 0.0  # of the next rollout
        self._random_state = _random_state()
        self._arguments = config, env, store
        self._learner: ActorLearner | None = None  # made where Ctrl-C may interrupt the environments' first reset

    def start(self) -> None:
        pass

    @property
    def ended(self) -> set[int]:
        return {0} if self.finished else set()

    def wait(self, timeout: float | None = None) -> None:
        """As :meth:`Supervisor.wait`: make the next rollout. Ctrl-C interrupts it."""
        if self._received or self.finished:
            return
        if self._stop and self._learner is None:
            self.finished = True  # Ctrl-C has interrupted the first reset: it is not begun again
            return
        allow_last_step(self._arguments[1])
        with self._as_worker():
            self._learner = self._learner or ActorLearner(*self._arguments, lambda: self._stop)
            report = self._learner.rollout(self._learning_rate)
        refuse_last_step(self._arguments[1])  # of the rollout
        if report is None:
            self.finished = True
        else:
            self._received.append((0, RolloutFinished(report, [])))

    def take(self) -> list[tuple[int, Any]]:
        """Take what :meth:`wait` has made."""
        received, self._received = self._received, []
        return received

    def send(self, index: int, message: Any) -> None:
        if isinstance(message, Ticket):
            self._learning_rate = message.learning_rate  # there is one rollout for each ticket
        elif isinstance(message, UpdateHyperparams) and self._learner is not None:
            self._learner.hyperparams = message.hyperparams  # the VecNormalize is the user's own

    def ask(self, requests: Mapping[int, Any], on_death: Any = None) -> dict[int, Any]:
        """Never called: the user's environments are the worker's."""
        raise NotImplementedError

    def replace_all(self, workers: Iterable[int]) -> None:
        """Never called: the worker dies with this process."""
        raise NotImplementedError

    def request_stop(self) -> None:
        self._stop = True

    def stop(self, hurry: threading.Event) -> None:
        self._stop = self.finished = True
        if self._learner is not None:
            self._learner.close()

    @contextlib.contextmanager
    def _as_worker(self) -> Iterator[None]:
        n_threads, outside = th.get_num_threads(), _random_state()
        th.set_num_threads(1)
        _set_random_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = _random_state()
            _set_random_state(outside)
            th.set_num_threads(n_threads)


def _random_state() -> tuple[Any, Any, th.Tensor]:
    return random.getstate(), np.random.get_state(), th.get_rng_state()


def _set_random_state(state: tuple[Any, Any, th.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    th.set_rng_state(state[2])
