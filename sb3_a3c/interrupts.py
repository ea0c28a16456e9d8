"""Ctrl-C, and the end of the program, at moments when they do no harm: what was received is counted, nothing crashes."""

import atexit
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: Seconds that the end of the program may wait for a daemon thread.
END_SECONDS = 2.0


class EndOfProgram:
    """
    When a program ends, Python before 3.14 ends its daemon threads as soon as each comes out of C++, and if it was torch's,
    that aborts the program ("terminate called without an active exception", as with other algorithms of SB3). So a daemon
    thread that trains stands still before: the end of the program waits until it is at :meth:`pass_or_stay`.
    """

    def __init__(self) -> None:
        self._is_near, self._stays = threading.Event(), threading.Event()
        if threading.current_thread().daemon:
            atexit.register(self._wait)

    def pass_or_stay(self) -> None:
        """Stay for ever if the program is about to end."""
        if self._is_near.is_set():
            self._stays.set()
            threading.Event().wait()

    def _wait(self) -> None:
        self._is_near.set()
        self._stays.wait(END_SECONDS)

    def cancel(self) -> None:
        """There is no training any more that the end of the program would have to wait for."""
        atexit.unregister(self._wait)


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[Any]]:
    """
    A SIGINT that arrives inside this block is handled at its end, and so is a SIGTERM for which the user has a handler. (In
    other threads Python handles none anyway.)

    :return: grows with each SIGINT that arrives
    """
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

        return note

    try:
        if on_interrupt:
            signal.signal(signal.SIGINT, deferred(on_interrupt, interrupts))
        if on_terminate:
            signal.signal(signal.SIGTERM, deferred(on_terminate, terminations))
        yield interrupts
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
