"""
Starts worker processes quickly, without importing the main script.

A separate fork server imports torch once for all workers. The one that multiprocessing shares between all its users may
already run without torch (for a ``SubprocVecEnv``), and each worker would then take seconds to import it.
"""

import contextlib
import io
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import tempfile
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import spawn
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import cloudpickle

#: Whether this process is a worker that opens its environments, which may import the user's modules.
is_bootstrapping = False

_starting = threading.Lock()
_server: Any = None  # the separate multiprocessing.forkserver.ForkServer, once it was needed


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles shared tensors and pipes as multiprocessing does, and by value what the main script defines."""

    dispatch_table: ClassVar[Any] = ChainMap(ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table)  # type: ignore[attr-defined]


class Arguments:
    """Arguments of a process that starts, and does not import the main script."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        _Pickler(file).dump(self._arguments)
        return pickle.loads, (file.getvalue(),)


def process_context(start_method: str | None) -> Any:
    """A context of :mod:`multiprocessing`; by default "forkserver" if the platform has it, else "spawn"."""
    available = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(start_method or ("forkserver" if "forkserver" in available else "spawn"))


@contextlib.contextmanager
def prepared_start(context: Any, preload: Sequence[str]) -> Iterator[None]:
    """
    Start processes of ``context`` inside this block. A new fork server imports the modules of ``preload`` for them.

    :raises RuntimeError: if this process is itself a worker that starts, or ignores SIGCHLD, without which it can't wait for
        processes that "spawn" starts
    :raises OSError: if the fork server's socket would have too long a path
    """
    _check_not_bootstrapping()
    forks = context.get_start_method() == "forkserver"
    if not forks and hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        raise RuntimeError(
            'Workers can\'t be started by start_method="spawn" while SIGCHLD is ignored: the system would not say how they '
            "ended. Call signal.signal(signal.SIGCHLD, signal.SIG_DFL) before `learn`."
        )
    server = _own_fork_server(preload) if forks else contextlib.nullcontext()
    with _starting, _without_main_module(), _sigint_blocked(), server:
        yield


def _check_not_bootstrapping() -> None:
    """As multiprocessing's own check, which does not cover what the worker's target unpickles."""
    if is_bootstrapping:
        raise RuntimeError(
            "An attempt has been made to start A3C's workers before the current process, itself a worker, has finished its "
            "bootstrapping phase.\n\n"
            "This means that a worker has imported a module of yours, because its environments are defined there, and that "
            "this module trains when it is imported. Put what starts the training under\n\n"
            "    if __name__ == '__main__':\n        ...\n"
        )


@contextlib.contextmanager
def _replaced_in_this_thread(module: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module for calls from this thread; others may start processes of their own meanwhile."""
    original, thread = getattr(module, name), threading.get_ident()

    def call(*args: Any) -> Any:
        return (replacement if threading.get_ident() == thread else original)(*args)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """
    Block SIGINT in processes that start inside this block: they inherit the mask. A terminal sends Ctrl-C to all processes,
    and a fork server that still imports does not ignore it yet: it would end with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _own_fork_server(preload: Sequence[str]) -> Iterator[None]:
    from multiprocessing import forkserver  # not on Windows

    global _server
    if _server is None:
        _server = forkserver.ForkServer()
        _server.set_forkserver_preload(list(preload))
    try:
        _server.ensure_running()
    except OSError as error:
        if "too long" not in str(error):
            raise
        raise OSError(
            f"The fork server that starts A3C's workers can't make its socket: its path in {tempfile.gettempdir()} would be "
            'too long. Set the environment variable TMPDIR to a folder with a shorter path, or pass start_method="spawn".'
        ) from error
    with _replaced_in_this_thread(forkserver, "connect_to_new_process", _server.connect_to_new_process):
        yield


def _forget_parents_processes() -> None:
    """
    In a forked process: its parent's processes are not its children. It can't wait for the fork server, so it starts
    another; and multiprocessing would terminate or join the rest at its exit.
    """
    global _server, _starting
    _server, _starting = None, threading.Lock()
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents_processes)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """
    Keep processes that this thread starts inside this block from importing the main script: it needs no
    ``if __name__ == "__main__":`` and may be a notebook or standard input. Cloudpickle sends what a worker needs of it by
    value.
    """
    if multiprocessing.parent_process() is not None:  # this process has itself imported the main script
        yield
        return
    prepare = spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        return {key: value for key, value in prepare(name).items() if not key.startswith("init_main_from_")}

    with _replaced_in_this_thread(spawn, "get_preparation_data", without_main):
        yield
