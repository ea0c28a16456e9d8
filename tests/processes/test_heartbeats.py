"""The silence of workers is counted only while the main process looks."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from sb3_a3c.processes.heartbeats import PROCESS, WORK, HangDetector

Advance = Callable[[float], None]


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Advance:
    """Moves the clock."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.mark.parametrize(("column", "words"), [(WORK, "made no progress for 5 s"), (PROCESS, "did not run for 5 s")])
def test_only_silence_of_more_than_the_timeout_is_a_hang(column: int, words: str, advance: Advance) -> None:
    detector, beats = HangDetector(3, timeout=5.0), np.zeros((3, 2), dtype=np.int64)
    beats[:2, column] = 1
    for second in range(20):
        beats[0, column] += second % 5 == 0
        advance(1.0)
        hangs = detector.look(beats)
        assert set(hangs) == ({1} if second > 6 else set())
        assert all(fault.startswith(words) for fault in hangs.values())


def test_a_process_is_silent_for_5_seconds_at_least(advance: Advance) -> None:
    detector, beats = HangDetector(1, timeout=0.5), np.array([[0, 1]])
    for second in range(10):
        advance(1.0)
        assert set(detector.look(beats)) == ({0} if second > 6 else set())


def test_time_without_looks_counts_little(advance: Advance) -> None:
    detector, beats = HangDetector(1, timeout=1.5), np.array([[1, 1]])
    for _ in range(2):
        advance(1.0)
        assert detector.look(beats) == {}
    advance(1000.0)
    assert detector.look(beats) == {}  # may just have been continued, as this process was
    advance(1.0)
    assert set(detector.look(beats)) == {0}
    beats += 1
    advance(1.0)
    assert detector.look(beats) == {}


def test_looks_are_a_second_apart(advance: Advance) -> None:
    detector = HangDetector(1, timeout=1.0)
    advance(0.25)
    assert detector.seconds_to_next_look() == 0.75
    advance(1.0)
    assert detector.seconds_to_next_look() == 0.0
    detector.look(np.zeros((1, 2), dtype=np.int64))
    assert detector.seconds_to_next_look() == 1.0
    assert HangDetector(1, timeout=None).seconds_to_next_look() == math.inf
