"""A3C's exceptions and warnings. Bad arguments raise ``ValueError``, as in Stable-Baselines3."""

import sys
import warnings
from types import FrameType


class A3CError(Exception):
    """Base class of A3C's exceptions."""


class WorkerDiedError(A3CError, RuntimeError):
    """
    A worker process was killed by a signal (out of memory, ``kill``, a crash in C code) or ended by ``os._exit``. The
    message names the signal or the exit code.
    """

    worker: int = -1  #: index of the worker, or the first of ``workers``
    workers: tuple[int, ...] = ()  #: that died of one cause
    can_be_replaced: bool = True  #: False if there is no place for other workers


class ClusterLostError(A3CError, RuntimeError):
    """
    The cluster on whose hosts A3C's workers learned can't be reached any more: most likely its head has died. The model has
    everything that had arrived.
    """


class RemoteTraceback(A3CError):  # noqa: N818
    """
    The traceback of an exception that a worker raised, as text. It is the ``__cause__`` of the exception that ``learn``
    raises, so that the lines that failed in the worker are printed too.
    """

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""' if self.args else ""


#: Its name in 0.1.0.
WorkerTracebackError = RemoteTraceback


class DivergenceError(A3CError, ValueError):
    """
    Observations, rewards, the loss or its gradient were NaN or infinite too many times in a row. No such update was applied,
    so the parameters are finite. (A ``ValueError``, so that RL Zoo's hyper-parameter search prunes the trial.)
    """


#: Modules and packages whose lines tell a user nothing; decorators of the last two call ours.
_NOT_THE_USERS = ("sb3_a3c", "stable_baselines3", "torch", "contextlib")


def warn(message: str) -> None:
    """Warn of the user's own line, which is the innermost outside this package, Stable-Baselines3 and what they call."""
    stacklevel, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame) in _NOT_THE_USERS:
        stacklevel, frame = stacklevel + 1, frame.f_back
    warnings.warn(message, stacklevel=stacklevel)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
