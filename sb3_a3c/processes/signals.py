"""Defers Ctrl-C and SIGTERM to the end of a block that must not be interrupted."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from signal import SIGINT, SIGTERM
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[threading.Event]:
    """
    Defer a SIGINT, and a SIGTERM for which the user has a handler, to the end of this block. In threads other than the main
    one this does nothing, because signals never interrupt them.

    :return: set as soon as a SIGINT arrives
    """
    interrupted = threading.Event()
    handlers: dict[int, Callable[[int, Any], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in (SIGINT, SIGTERM) if callable(handler := signal.getsignal(number))}
    frames: dict[int, Any] = {}  # where each signal arrived first
    is_over = False

    def defer(number: int, frame: Any) -> None:
        if is_over:  # the other signal's handler has raised before this one was removed
            handlers[number](number, frame)
            return
        frames.setdefault(number, frame)
        if number == SIGINT:
            interrupted.set()

    try:
        for number in handlers:
            signal.signal(number, defer)
        yield interrupted
    finally:
        is_over = True
        try:  # a handler that raises must not keep the other signal from being handled
            if SIGINT in handlers:
                signal.signal(SIGINT, handlers[SIGINT])
        finally:
            try:
                if SIGTERM in handlers:
                    signal.signal(SIGTERM, handlers[SIGTERM])
            finally:
                try:
                    if SIGINT in frames:
                        handlers[SIGINT](SIGINT, frames[SIGINT])
                finally:
                    if SIGTERM in frames:
                        handlers[SIGTERM](SIGTERM, frames[SIGTERM])
