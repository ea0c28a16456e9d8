"""
How worker processes start: quickly, and whatever the main script is.

A fork server of our own imports torch once for all workers. The one that multiprocessing shares between all its users
may have been started by somebody else (a ``SubprocVecEnv``), without torch, and each worker would then take seconds.
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
_server: Any = None  # the fork server, once there is one


def process_context(start_method: str | None) -> Any:
    """
    :param start_method: "forkserver" or "spawn"; None takes the first that the platform has
    :return: a context of :mod:`multiprocessing`
    """
    available = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(start_method or ("forkserver" if "forkserver" in available else "spawn"))


@contextlib.contextmanager
def prepared_start(context: Any, preload: Sequence[str]) -> Iterator[None]:
    """
    Processes are to be started inside this block.

    :param context: their context
    :param preload: names of modules that a new fork server imports once for all its children
    """
    with _starting, _without_main_module(), _deaf_to_ctrl_c():
        if context.get_start_method() == "forkserver":
            with _own_fork_server(preload):
                yield
        else:
            yield


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """
    A terminal sends Ctrl-C to all processes, also to those that have not come so far as to ignore it: a fork server that
    still imports would end, with a traceback. What starts inside this block inherits that SIGINT is blocked.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would end the block
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
    """A forked process can't wait for its parent's child: it needs a fork server, and a lock, of its own."""
    global _server, _starting
    _server, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_fork_server)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """
    Processes that start now do not import the main script: it needs no ``if __name__ == "__main__":`` guard, and may as
    well be a notebook or standard input. What a worker needs of it comes by value, through cloudpickle.
    """
    main = sys.modules["__main__"]
    if multiprocessing.parent_process() is None:  # else this process was itself started with a main script fit for import
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
