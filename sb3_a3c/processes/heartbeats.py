"""Finds workers that are alive, but make no progress."""

import math
import time

import numpy as np
import numpy.typing as npt

#: Seconds between two checks of the heartbeats.
LOOK_SECONDS = 1.0
#: Seconds between two heartbeats of a worker's process, and the least that count as its silence.
BEAT_SECONDS, SILENCE_SECONDS = 1.0, 5.0
#: Columns of the heartbeats: of a worker's work, which it clears while it may wait for any time, and of its process.
WORK, PROCESS = 0, 1


class HangDetector:
    """
    Counts for how long the heartbeats of workers have not changed.

    :param timeout: seconds without a new heartbeat after which a worker hangs; None: never
    """

    def __init__(self, n_workers: int, timeout: float | None) -> None:
        self._last = np.zeros((n_workers, 2), dtype=np.int64)  # as they were at the last look
        self._silence = np.zeros((n_workers, 2))  # in seconds
        self._is_off = timeout is None
        self._limits = [timeout or 0.0, max(timeout or 0.0, SILENCE_SECONDS)]
        self._last_look = time.monotonic()

    def seconds_to_next_look(self) -> float:
        """Seconds until :meth:`look` is to be called again, at the latest."""
        return math.inf if self._is_off else max(0.0, self._last_look + LOOK_SECONDS - time.monotonic())

    def look(self, heartbeats: npt.NDArray[np.int64]) -> dict[int, str]:
        """
        Return what is wrong with each worker that hangs. To be called often; it looks once in ``LOOK_SECONDS``.

        :param heartbeats: (n_workers, 2); 0 where none is expected
        """
        if self.seconds_to_next_look() > 0:
            return {}
        now = time.monotonic()
        # of a time without looks, because of a callback or Ctrl-Z, only a little counts: the workers may have been stopped
        # as well, and have until the next look
        elapsed = min(now - self._last_look, 2 * LOOK_SECONDS)
        self._last_look = now
        beats = heartbeats.copy()  # the workers write to them
        is_silent = (beats != 0) & (beats == self._last)
        hangs = is_silent & (self._silence > self._limits)
        self._last, self._silence = beats, np.where(is_silent, self._silence + elapsed, 0.0)
        return {int(worker): self._fault(hangs[worker]) for worker in np.flatnonzero(hangs.any(axis=1))}

    def _fault(self, hangs: npt.NDArray[np.bool_]) -> str:
        if hangs[WORK]:
            return (
                f"made no progress for {self._limits[WORK]:g} s. Does the environment wait for something that never comes? "
                "If a step may take that long, raise `worker_timeout`."
            )
        return (
            f"did not run for {self._limits[PROCESS]:g} s. Was it stopped (SIGSTOP), or does C code of the environment keep "
            "Python's lock? If it may for that long, raise `worker_timeout`."
        )
