"""Sends messages to one worker without waiting for it."""

import contextlib
import queue
import threading
from multiprocessing import connection
from typing import Any

#: Seconds that the thread has to end once the worker has.
END_SECONDS = 0.5


class Outbox:
    """
    Writes to a worker's inbox in a thread of its own, so that the main process never waits: a pipe holds 64 KiB, and a
    worker whose C code holds Python's lock, or that was stopped by a signal, does not empty it.
    """

    def __init__(self, pipe: "connection.Connection[Any, Any]") -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_write, args=(pipe, self._messages), daemon=True)
        self._thread.start()

    def put(self, message: bytes) -> None:
        """Send a message after those before. It is lost if the worker has ended."""
        self._messages.put(message)

    def close(self) -> None:
        """End the thread, after the worker has ended. It stays while a child of the worker keeps a full pipe open."""
        self._messages.put(None)
        self._thread.join(END_SECONDS)


def _write(pipe: "connection.Connection[Any, Any]", messages: "queue.SimpleQueue[bytes | None]") -> None:
    with pipe, contextlib.suppress(OSError):  # the worker has ended
        while (message := messages.get()) is not None:
            pipe.send_bytes(message)
