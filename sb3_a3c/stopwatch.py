"""Where a worker's time goes: what it does, and whether it has a core meanwhile."""

import time
from pathlib import Path

import torch as th

from sb3_a3c.reports import RolloutStatistics

ACTIVITIES = ("acting", "stepping", "learning", "sharing")


class Stopwatch:
    """
    Books the time of one rollout, from now on.

    :param statistics: where to
    """

    def __init__(self, statistics: RolloutStatistics) -> None:
        self._statistics = statistics
        statistics.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._last = time.perf_counter()
        self._core_seconds, self._queue_seconds = _scheduled()

    def spent(self, activity: str) -> None:
        """
        Book the time since the last call.

        :param activity: what it was spent on, one of :data:`ACTIVITIES`
        """
        now = time.perf_counter()
        self._statistics.seconds[activity] += now - self._last
        self._last = now

    def stop(self) -> None:
        """Book, at the end of the rollout, whether there was a core for all that."""
        core_seconds, queue_seconds = _scheduled()
        self._statistics.core_seconds = core_seconds - self._core_seconds
        self._statistics.queue_seconds = queue_seconds - self._queue_seconds
        self._statistics.n_threads = th.get_num_threads()


def _scheduled() -> tuple[float, float]:
    """Seconds in which this thread had a core so far, and in which it waited for one. Zeros where there is no Linux."""
    try:
        core, queue, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except OSError:
        return 0.0, 0.0
    return 1e-9 * int(core), 1e-9 * int(queue)
