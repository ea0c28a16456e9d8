"""Ctrl-C at a moment when it does no harm: what was received is counted, what was started is stopped."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[Any]]:
    """
    A SIGINT that arrives inside this block is handled at its end, and so is a SIGTERM for which the user has a handler. (In
    other threads Python handles none anyway.)

    :return: grows with each SIGINT that arrives
    """
    arrived: list[Any] = []
    with _Deferred(signal.SIGINT, arrived), _Deferred(signal.SIGTERM, []):
        yield arrived


class _Deferred:
    """One signal that waits for the end of the block. Each in a block of its own, as its handler may raise."""

    def __init__(self, number: signal.Signals, arrived: list[Any]) -> None:
        self._number, self._arrived = number, arrived
        self._frames: list[Any] = []
        self._handler: Any = None  # None if there is nothing to defer

    def __enter__(self) -> None:
        handler = signal.getsignal(self._number)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(self._number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._frames.append(frame)
        self._arrived.append(number)

    def __exit__(self, *_: Any) -> None:
        if self._handler is not None:
            signal.signal(self._number, self._handler)
            if self._frames:
                self._handler(self._number, self._frames[0])
