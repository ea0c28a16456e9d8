"""The timer of a worker's activities."""

import time

import pytest

from sb3_a3c.actor_learner.report import ACTIVITIES, Timer


def test_all_time_is_counted_once() -> None:
    begin = time.perf_counter()
    timer = Timer()
    for activity in ("acting", "stepping", "acting"):
        time.sleep(0.01)
        timer.spent(activity)
    elapsed = time.perf_counter() - begin
    assert set(timer.seconds) == set(ACTIVITIES)
    assert timer.seconds["acting"] > timer.seconds["stepping"] >= 0.01
    assert timer.seconds["learning"] == timer.seconds["sharing"] == 0.0
    assert sum(timer.seconds.values()) == pytest.approx(elapsed, abs=2e-3)
