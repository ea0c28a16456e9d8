"""Where a worker's time goes."""

import time

import pytest
import torch as th

from sb3_a3c import stopwatch
from sb3_a3c.reports import RolloutStatistics
from sb3_a3c.stopwatch import ACTIVITIES, Stopwatch


def test_time_is_booked_on_what_it_was_spent_on() -> None:
    statistics = RolloutStatistics()
    watch = Stopwatch(statistics)
    assert statistics.seconds == dict.fromkeys(ACTIVITIES, 0.0)
    begin = time.perf_counter()
    for activity, seconds in (("acting", 0.02), ("stepping", 0.04), ("acting", 0.02)):
        time.sleep(seconds)
        watch.spent(activity)
    assert statistics.seconds["acting"] >= 0.04
    assert statistics.seconds["stepping"] >= 0.04
    assert sum(statistics.seconds.values()) <= time.perf_counter() - begin + 0.01
    assert statistics.seconds["learning"] == statistics.seconds["sharing"] == 0.0


@pytest.mark.skipif(stopwatch._scheduled() == (0.0, 0.0), reason="only Linux tells")
def test_waiting_needs_no_core_but_computing_does() -> None:
    statistics = RolloutStatistics()
    watch = Stopwatch(statistics)
    time.sleep(0.2)
    watch.stop()
    assert statistics.core_seconds < 0.1
    watch = Stopwatch(statistics)
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        pass
    watch.stop()
    assert statistics.core_seconds + statistics.queue_seconds == pytest.approx(0.2, abs=0.05)
    assert statistics.n_threads == th.get_num_threads()
