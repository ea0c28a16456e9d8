"""
A worker process: an actor-learner that, between its rollouts, does what the main process asks. ``protocol`` says who
sends what.
"""

import contextlib
import ctypes
import pickle
import sys
import time
from collections import deque
from typing import Any

import torch as th

from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.actor_learner.report import Report
from sb3_a3c.envs.normalize import merge_deltas, pop_deltas, record_deltas, set_options
from sb3_a3c.envs.sharding import EnvShare
from sb3_a3c.envs.wrapper_state import wrapper_counts
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.store.base import ParameterStore
from sb3_a3c.workers.env_proxy import call_env
from sb3_a3c.workers.protocol import (
    EnvCall,
    FinalState,
    RolloutFinished,
    Shutdown,
    Ticket,
    TrainingDone,
    UpdateHyperparams,
)

#: Seconds between two looks of a worker that waits for its turn.
TURN_SECONDS = 1e-4


def run_worker(channel: WorkerChannel, store: ParameterStore, share: EnvShare, config: bytes) -> None:
    """Body of a worker process. ``config`` is a pickled :class:`WorkerConfig`."""
    th.set_num_threads(1)  # there are as many learners as cores: more threads would only compete
    keep_freed_memory()
    if (ale_py := sys.modules.get("ale_py")) is not None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Warning)  # the main process has shown its banner
    env = share.open()
    try:
        record_deltas(env)
        _MainLoop(channel, ActorLearner(pickle.loads(config), env, store, channel.works)).run()
    finally:
        env.close()


class _MainLoop:
    """Rollouts, and what is served between them."""

    def __init__(self, channel: WorkerChannel, learner: ActorLearner) -> None:
        self.channel = channel
        self.learner = learner
        self.env = learner.env
        self.learning_rates: deque[float] = deque()  # of its tickets
        self.shutdown = False

    def run(self) -> None:
        """Make rollouts until there are enough, then serve until the main process says that learning is over."""
        while self._may_begin() and (report := self._rollout()) is not None:
            self.channel.send(RolloutFinished(report, pop_deltas(self.env)))
        self.channel.send(TrainingDone())
        while not self.shutdown:
            self.channel.serve(self._handle, block=True)
        self.channel.send(FinalState(pop_deltas(self.env), wrapper_counts(self.env)))

    def _rollout(self) -> Report | None:
        """A rollout, with a heartbeat at each step. A worker that waits for a ticket, its turn or a reader is not hung."""
        try:
            return self.learner.rollout(self.learning_rates.popleft())
        finally:
            self.channel.rests()

    def _may_begin(self) -> bool:
        """Serve all that waits, until there is a ticket and it is this worker's turn. False once a stop is requested."""
        while not (self.channel.stopped() or self.shutdown):
            if not self.learning_rates:
                self.channel.serve(self._handle, block=True)
            elif not self.channel.serve(self._handle):
                if not self.learner.hyperparams.take_turns or self.learner.replica.is_my_turn():
                    return True
                time.sleep(TURN_SECONDS)  # not a timeout of `serve`: with a tiny one, Python 3.11's SimpleQueue can hang
        return False

    def _handle(self, message: Any) -> Any:
        match message:
            case Ticket(learning_rate, deltas):
                self.learning_rates.append(learning_rate)
                merge_deltas(self.env, deltas)
            case UpdateHyperparams(hyperparams, normalization):
                self.learner.hyperparams = hyperparams
                set_options(self.env, normalization)
            case EnvCall():
                return call_env(self.env, message)
            case Shutdown():
                self.shutdown = True
        return None


def keep_freed_memory() -> None:
    """
    Let glibc keep the megabytes that a convolution frees, instead of giving them back to the kernel and having every page
    of them cleared again at the next call: that costs a third of the learning time. Elsewhere this does nothing.
    """
    m_mmap_threshold, m_trim_threshold = -3, -1  # of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 * 2**20)  # glibc's largest
        mallopt(m_trim_threshold, 256 * 2**20)
