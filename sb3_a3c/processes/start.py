"""
Starts worker processes quickly, without importing the main script.

A separate fork server imports torch once for all workers. The one that multiprocessing shares between all its users may
already run without torch (for a ``SubprocVecEnv``), and each worker would then take seconds to import it.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

_starting = threading.Lock()
_server: Any = None  # the separate multiprocessing.forkserver.ForkServer, once it was needed


def process_context(start_method: str | None) -> Any:
    """A context of :mod:`multiprocessing`; by default "forkserver" if the platform has it, else "spawn"."""
    available = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(start_method or ("forkserver" if "forkserver" in available else "spawn"))


@contextlib.contextmanager
def prepared_start(context: Any, preload: Sequence[str]) -> Iterator[None]:
    """Start processes of ``context`` inside this block. A new fork server imports the modules of ``preload`` for them."""
    server = _own_fork_server(preload) if context.get_start_method() == "forkserver" else contextlib.nullcontext()
    with _starting, _without_main_module(), _sigint_blocked(), server:
        yield


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
    connect = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _server.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = connect


def _forget_fork_server() -> None:
    """In a forked process: its parent's fork server is not its child and can't be waited for, so it starts another."""
    global _server, _starting
    _server, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_fork_server)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """
    Keep processes that start inside this block from importing the main script: it needs no ``if __name__ == "__main__":``
    and may be a notebook or standard input. Cloudpickle sends what a worker needs of it by value.
    """
    main = sys.modules["__main__"]
    if multiprocessing.parent_process() is None:  # else this process has itself imported the main script
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
