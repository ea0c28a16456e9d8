"""The logger's values from the statistics of rollouts."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.utils import explained_variance

from sb3_a3c.actor_learner.report import RolloutStatistics
from sb3_a3c.workers.statistics import TrainingStatistics


def statistics_of(returns: npt.NDArray[np.float64], values: npt.NDArray[np.float64], **others: Any) -> RolloutStatistics:
    errors = returns - values
    return RolloutStatistics(
        n_transitions=len(returns),
        return_moments=(float(returns.sum()), float(np.square(returns).sum())),
        error_moments=(float(errors.sum()), float(np.square(errors).sum())),
        **others,
    )


def pooled(*rollouts: RolloutStatistics) -> Mapping[str, float]:
    statistics = TrainingStatistics()
    for rollout in rollouts:
        statistics.add(rollout)
    return statistics.pop()


def test_means_are_per_transition_or_per_update() -> None:
    figures = pooled(
        RolloutStatistics(1, policy_loss=2.0, value_loss=3.0, entropy=1.0, n_updates=1, grad_norm=6.0, staleness=4),
        RolloutStatistics(3, policy_loss=6.0, value_loss=1.0, entropy=3.0, n_updates=3, grad_norm=2.0, staleness=2),
    )
    assert figures["train/policy_loss"] == 2
    assert figures["train/value_loss"] == 1
    assert figures["train/entropy_loss"] == -1  # A2C's sign
    assert figures["train/grad_norm"] == 2
    assert figures["train/staleness"] == 1.5


@pytest.mark.parametrize("seed", range(5))
def test_explained_variance_is_that_of_all_transitions_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # rollouts of different sizes and means: the mean of their explained variances would be wrong
    parts = []
    for size in rng.integers(1, 30, 5):
        returns = rng.normal(rng.normal(0, 5), 1, size)
        parts.append((returns, returns + rng.normal(rng.normal(), 1, size)))
    figures = pooled(*(statistics_of(returns, values) for returns, values in parts))
    returns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert figures["train/explained_variance"] == pytest.approx(float(explained_variance(values, returns)), abs=1e-9)


def test_explained_variance_of_perfect_and_constant_values_and_of_constant_returns() -> None:
    returns = np.array([1.0, 2.0, 3.0, 6.0])
    assert pooled(statistics_of(returns, returns))["train/explained_variance"] == 1
    assert pooled(statistics_of(returns, np.full(4, 3.0)))["train/explained_variance"] == 0
    for constant in (0.0, 1.0, 0.1):
        assert np.isnan(pooled(statistics_of(np.full(7, constant), np.arange(7.0)))["train/explained_variance"])


def test_shares_of_time_sum_to_one() -> None:
    figures = pooled(
        RolloutStatistics(n_transitions=1, seconds={"acting": 1.0, "stepping": 2.0, "learning": 0.5, "sharing": 0.5}),
        RolloutStatistics(n_transitions=9, seconds={"acting": 1.0, "stepping": 1.0, "learning": 1.5, "sharing": 0.5}),
    )
    shares = {key: value for key, value in figures.items() if key.startswith("time/")}
    assert shares == {"time/acting": 0.25, "time/stepping": 0.375, "time/learning": 0.25, "time/sharing": 0.125}
    assert sum(shares.values()) == 1


def test_pop_resets() -> None:
    statistics = TrainingStatistics()
    assert statistics.pop() == {}
    returns, values = np.array([1.0, 5.0, 3.0, 8.0]), np.array([2.0, 0.0, 3.0, 7.0])
    old = statistics_of(returns[:2], values[:2], policy_loss=9.0, n_updates=1, grad_norm=9.0, seconds={"acting": 9.0})
    new = statistics_of(returns[1:], values[1:], policy_loss=3.0, n_updates=1, grad_norm=2.0, seconds={"learning": 1.0})
    for rollout in (old, new):
        statistics.add(rollout)
        assert statistics.pop() == pooled(rollout)
        assert statistics.pop() == {}
    assert "time/acting" not in pooled(new)
    copy = deepcopy(old)
    pooled(old, new)
    assert old == copy


def test_skipped_updates_are_counted_since_the_start() -> None:
    statistics = TrainingStatistics()
    for n_skipped, expected in ((2, 2), (0, 2), (1, 3)):
        statistics.add(RolloutStatistics(n_transitions=1, skipped_updates=n_skipped, seconds={"acting": 1.0}))
        assert statistics.pop()["train/skipped_updates"] == expected
    assert statistics.skipped_updates == 3


def test_no_means_over_updates_where_all_were_skipped() -> None:
    figures = pooled(RolloutStatistics(n_transitions=1, skipped_updates=1, seconds={"acting": 1.0}))
    assert figures["train/skipped_updates"] == 1
    assert "train/grad_norm" not in figures
    assert "train/staleness" not in figures


def learning(n_updates: int, explained: bool, clipped_updates: int) -> RolloutStatistics:
    """Returns of 0 and 2; values that explain three quarters of their variance, or make it four times as large."""
    returns = np.array([0.0, 2.0])
    values = returns / 2 if explained else -returns
    return statistics_of(returns, values, n_updates=n_updates, clipped_updates=clipped_updates, grad_norm=500.0 * n_updates)


def test_a_hint_once_if_no_variance_is_explained_and_all_gradients_are_clipped_for_50_updates() -> None:
    statistics = TrainingStatistics()
    for rollout in [learning(2, False, 2)] * 24:
        statistics.add(rollout)
        assert statistics.pop_hint() == ""
    statistics.add(learning(2, False, 2))
    hint = statistics.pop_hint()
    assert hint == (
        "The critic does not learn: in 50 updates running, explained variance is -3, and all gradients are clipped "
        "(mean norm 500). Probably the rewards are too large: use VecNormalize(env, norm_obs=False)."
    )
    for _ in range(100):
        statistics.add(learning(2, False, 2))
        assert statistics.pop_hint() == ""


@pytest.mark.parametrize(
    "rollouts",
    [
        [learning(2, True, 2)] * 200,
        [learning(2, False, 1)] * 200,
        ([learning(2, False, 2)] * 24 + [learning(2, False, 1)]) * 8,
        [RolloutStatistics(skipped_updates=2)] * 200,
    ],
    ids=["explained", "not all clipped", "never for 50 running", "all dropped"],
)
def test_no_hint(rollouts: list[RolloutStatistics]) -> None:
    statistics = TrainingStatistics()
    for rollout in rollouts:
        statistics.add(rollout)
        statistics.pop()  # a log in between changes nothing
        assert statistics.pop_hint() == ""
