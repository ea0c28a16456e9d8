"""
A worker process: an actor-learner that, between its rollouts, does what the main process asks.

Who says what, over the channel of ``supervisor``::

    main process                                                worker process
      Credit      a report was used up; what others saw  ─────►   one more rollout may be reported
      Change      new hyper-parameters                   ─────►   from the next rollout on
      EnvCall     a method of the environments           ─────►   answered with what it returns, or raises
      Close       learning is over                       ─────►   Farewell, and the process ends
                                                         ◄─────   Progress (a report), once a rollout
                                                         ◄─────   Done, after the last rollout; from then on it only serves

A worker begins with some credit and spends one for each report. Without credit it waits, and serves meanwhile: so it runs
ahead of the callbacks by so many rollouts at most, and a call to the environments never waits for a callback.
"""

import contextlib
import ctypes
import pickle
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.channel import WorkerChannel
from sb3_a3c.envs import EnvShare, WrapperCounts, wrapper_counts
from sb3_a3c.normalization import News, keep_news, merge_news, set_options, take_news
from sb3_a3c.reports import Report
from sb3_a3c.shared import ParameterStore
from sb3_a3c.task import Settings
from sb3_a3c.worker import ActorLearner

#: Seconds between two looks of a worker that waits for its turn.
TURN_SECONDS = 1e-4


class Credit(NamedTuple):
    """To a worker: one of its reports was used up."""

    news: News  #: what others' ``VecNormalize`` saw


class Change(NamedTuple):
    """To a worker: hyper-parameters that count from its next rollout on."""

    settings: Settings
    normalization: list[dict[str, Any]]  #: of ``normalization.options``


class EnvCall(NamedTuple):
    """To a worker: call a method of its ``VecEnv``. It wants an answer."""

    method: str
    indices: list[int] | None  #: of the worker's own environments; None if the method knows none
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Close(NamedTuple):
    """To a worker: say farewell and end."""


class Progress(NamedTuple):
    """From a worker: one rollout, and what its ``VecNormalize`` saw meanwhile."""

    report: Report
    news: News


class Done(NamedTuple):
    """From a worker: no more rollouts will come. It still serves calls to its environments."""


class Farewell(NamedTuple):
    """From a worker: its last words."""

    news: News
    counts: WrapperCounts  #: what the wrappers of its environments have counted


def run_worker(channel: WorkerChannel, store: ParameterStore, share: EnvShare, credit: int, task: bytes) -> None:
    """
    Body of a worker process.

    :param channel: the line to the main process
    :param store: the shared parameters
    :param share: the worker's environments
    :param credit: how many rollouts may be reported before the first of them is used up
    :param task: a pickled :class:`WorkerTask`
    """
    th.set_num_threads(1)  # as many learners as cores: more threads would only fight
    keep_freed_memory()
    env = share.open()
    try:
        keep_news(env)
        _Service(channel, ActorLearner(pickle.loads(task), env, store, channel.works), credit).run()
    finally:
        env.close()


def call_env(env: VecEnv, call: EnvCall) -> Any:
    """
    :param env: a worker's environments
    :param call: what to call
    :return: what the call returned
    """
    indices = {} if call.indices is None else {"indices": call.indices}
    # of the innermost VecEnv: the main process's wrappers have passed the call on already
    return getattr(env.unwrapped, call.method)(*call.args, **indices, **call.kwargs)


class _Service:
    """Rollouts, and what is served between them."""

    def __init__(self, channel: WorkerChannel, learner: ActorLearner, credit: int) -> None:
        self.channel = channel
        self.learner = learner
        self.env = learner.env
        self.credit = credit
        self.closing = False

    def run(self) -> None:
        """Make rollouts until there are enough, then serve until all is over."""
        while self._may_begin() and (report := self._rollout()) is not None:
            self.credit -= 1
            self.channel.send(Progress(report, take_news(self.env)))
        self.channel.send(Done())
        while not self.closing:
            self.channel.serve(self._handle, timeout=None)
        self.channel.send(Farewell(take_news(self.env), wrapper_counts(self.env)))

    def _rollout(self) -> Report | None:
        """A rollout, between whose steps the heart beats. Whoever waits for credit, a turn or a reader is not hung."""
        try:
            return self.learner.rollout()
        finally:
            self.channel.rests()

    def _may_begin(self) -> bool:
        """Serve all that waits, and until there is credit and it is this worker's turn. False once a stop is requested."""
        while not (self.channel.stopped() or self.closing):
            if self.credit == 0:
                self.channel.serve(self._handle, timeout=None)
            elif not self.learner.is_my_turn():
                self.channel.serve(self._handle, timeout=TURN_SECONDS)
            elif not self.channel.serve(self._handle):
                return True
        return False

    def _handle(self, message: Any) -> Any:
        match message:
            case Credit(news):
                self.credit += 1
                merge_news(self.env, news)
            case Change(settings, normalization):
                self.learner.settings = settings
                set_options(self.env, normalization)
            case EnvCall():
                return call_env(self.env, message)
            case Close():
                self.closing = True
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
