"""Hints: said once, where more workers than cores compute or threads fight, and not where environments just wait."""

import time
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C, collector, hints
from sb3_a3c.hints import computing_share, hint
from sb3_a3c.reports import RolloutStatistics


def measured(seconds: float, core_seconds: float, queue_seconds: float, n_threads: int = 1) -> RolloutStatistics:
    return RolloutStatistics(
        seconds={"acting": seconds / 4, "stepping": 3 * seconds / 4},
        core_seconds=core_seconds,
        queue_seconds=queue_seconds,
        n_threads=n_threads,
    )


COMPUTING = measured(160.0, 40.0, 120.0)
SLEEPING = measured(200.0, 20.0, 0.0)
BOTH = measured(80.0, 30.0, 40.0)  # alone: 30 of computation, 10 of waiting


@pytest.mark.parametrize(("pool", "share"), [(COMPUTING, 1.0), (SLEEPING, 0.1), (BOTH, 0.75)])
def test_the_share_of_computation_does_not_depend_on_the_lack_of_cores(pool: RolloutStatistics, share: float) -> None:
    assert computing_share(pool) == pytest.approx(share)


@pytest.mark.parametrize(
    ("pool", "n_workers", "n_cores", "advice"),
    [
        (COMPUTING, 8, 2, "n_workers=2"),
        (COMPUTING, 2, 2, None),
        (COMPUTING, 3, 2, "n_workers=2"),
        (COMPUTING, 9, 8, None),  # costs little
        (SLEEPING, 8, 2, None),
        (SLEEPING, 64, 2, None),
        (BOTH, 3, 2, None),
        (BOTH, 4, 2, "n_workers=2"),
        (measured(100.0, 64.0, 0.0), 2, 1, "n_workers=1"),
    ],
)
def test_too_many_workers(pool: RolloutStatistics, n_workers: int, n_cores: int, advice: str | None) -> None:
    text = hint(pool, n_workers, n_cores)
    assert (text is None) == (advice is None)
    if text is not None and advice is not None:
        assert text.startswith(f"n_workers={n_workers} on {n_cores} cores: ")
        assert text.endswith(f" Try {advice}.")


def test_fighting_threads() -> None:
    pool = measured(160.0, 160.0, 0.0, n_threads=4)
    assert "4 threads in each of 2 workers, and they compete for 2 cores" in str(hint(pool, 2, 2))
    assert hint(pool, 2, 8) is None
    assert hint(measured(160.0, 160.0, 0.0), 2, 2) is None


def test_no_hint_without_enough_measured() -> None:
    assert hint(measured(4.0, 1.0, 3.0), 8, 2) is None
    assert hint(RolloutStatistics(), 8, 2) is None
    assert hint(measured(160.0, 0.0, 0.0), 8, 2) is None  # a system that doesn't tell


class Sleeper(gym.Wrapper[Any, Any, Any, Any]):
    """Waits for something outside the machine."""

    def step(self, action: Any) -> Any:
        time.sleep(0.01)
        return super().step(action)


@pytest.mark.parametrize(("verbose", "wrapper", "n_hints"), [(1, None, 1), (0, None, 0), (1, Sleeper, 0)])
def test_the_hint_is_printed_once(
    verbose: int,
    wrapper: Any,
    n_hints: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(collector, "n_cores", lambda: 1)
    monkeypatch.setattr(hints, "ENOUGH_SECONDS", 0.05)
    env = make_vec_env("CartPole-v1", n_envs=4, wrapper_class=wrapper)
    model = A3C("MlpPolicy", env, n_workers=2, verbose=verbose)
    model.learn(640 if wrapper else 10_000, log_interval=2 if wrapper else 25)
    assert capsys.readouterr().out.count("n_workers=2 on 1 cores: ") == n_hints


class Threads(gym.Wrapper[Any, Any, Any, Any]):
    """Interferes."""

    def reset(self, **kwargs: Any) -> Any:
        th.set_num_threads(3)
        return super().reset(**kwargs)


def test_threads_in_workers_are_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(collector, "n_cores", lambda: 2)
    monkeypatch.setattr(hints, "ENOUGH_SECONDS", 0.02)
    env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=Threads)
    before = th.get_num_threads()
    try:
        A3C("MlpPolicy", env, n_workers=2, verbose=1).learn(4000, log_interval=20)
    finally:
        th.set_num_threads(before)
    assert capsys.readouterr().out.count("torch uses 3 threads in each of 2 workers") == 1
