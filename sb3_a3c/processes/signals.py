"""Ctrl-C and SIGTERM at moments when they do no harm: what was received is counted."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[threading.Event]:
    """
    A SIGINT that arrives inside this block is handled at its end, and so is a SIGTERM for which the user has a handler. (In
    other threads Python handles none anyway.)

    :return: set as soon as a SIGINT arrives
    """
    interrupted = threading.Event()
    interrupts: list[Any] = []
    terminations: list[Any] = []
    on_interrupt, on_terminate = _handler(signal.SIGINT), _handler(signal.SIGTERM)
    is_over = False

    def deferred(handler: Callable[[int, Any], Any], arrived: list[Any]) -> Callable[[int, Any], Any]:
        def note(number: int, frame: Any) -> None:
            if is_over:  # another handler has raised before this one was taken away
                handler(number, frame)
            else:
                arrived.append(frame)
                if arrived is interrupts:
                    interrupted.set()

        return note

    try:
        if on_interrupt:
            signal.signal(signal.SIGINT, deferred(on_interrupt, interrupts))
        if on_terminate:
            signal.signal(signal.SIGTERM, deferred(on_terminate, terminations))
        yield interrupted
    finally:
        is_over = True
        try:
            if on_interrupt:
                signal.signal(signal.SIGINT, on_interrupt)
        finally:
            if on_terminate:
                signal.signal(signal.SIGTERM, on_terminate)
        try:
            if on_interrupt and interrupts:
                on_interrupt(signal.SIGINT, interrupts[0])
        finally:
            if on_terminate and terminations:
                on_terminate(signal.SIGTERM, terminations[0])


def _handler(number: signal.Signals) -> Callable[[int, Any], Any] | None:
    """Python's, if this thread is the one that runs it."""
    handler = signal.getsignal(number)
    return handler if callable(handler) and threading.current_thread() is threading.main_thread() else None
