"""The exceptions that are A3C's own. Bad arguments raise plain ``ValueError``, as everywhere in Stable-Baselines3."""


class A3CError(Exception):
    """Base class, for ``except A3CError``."""


class WorkerDiedError(A3CError, RuntimeError):
    """
    A worker process ended without saying why: killed by a signal (the out-of-memory killer, ``kill``, a crash in C code)
    or by ``os._exit``. The message names the signal or the exit code.
    """

    worker: int = -1  #: its index


class RemoteTraceback(A3CError):  # noqa: N818
    """
    The traceback of an exception that a worker raised, as text. It is the ``__cause__`` of the exception that
    ``learn`` raises, so that the lines that failed in the other process are printed too.
    """

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""' if self.args else ""


#: The name in 0.1.0.
WorkerTracebackError = RemoteTraceback


class DivergenceError(A3CError, ValueError):
    """
    Observations, rewards, the loss or its gradient were NaN or infinite too many times in a row. The parameters are finite:
    no such update was applied. (A ``ValueError``, so that RL Zoo's hyper-parameter search prunes the trial.)
    """
