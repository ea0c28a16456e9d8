"""
From workers' reports to steps and to the logger's figures. Every transition carries its environment and time in its info,
and its reward, action and observation are computed from these two, so that a mix-up shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.utils import explained_variance

from sb3_a3c.actor_learner.report import Report, RolloutStatistics
from sb3_a3c.envs.observations import Obs
from sb3_a3c.workers.statistics import TrainingStatistics
from sb3_a3c.workers.step_assembler import Step, StepAssembler


def reward_of(env: int, time: int) -> int:
    return 1000 * env + time


def action_of(env: int, time: int) -> list[int]:
    return [env, time]


def is_done(env: int, time: int) -> bool:
    return (env + time) % 3 == 0


def obs_after(env: int, time: int) -> npt.NDArray[np.float32]:
    return np.array([env, time + 1], dtype=np.float32)


def as_dict(obs: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """The same observations as a dictionary of arrays of different types and shapes: (…, 2) -> (…, 1, 1) and (…,)"""
    return {"image": obs[..., :1, None].astype(np.uint8), "vector": -obs[..., 1]}


def report(envs: Sequence[int], begin: int, n_steps: int, dictionary: bool = False) -> Report:
    """What a worker with these environments says of steps begin, …, begin + n_steps - 1."""
    times = range(begin, begin + n_steps)
    last_obs = np.stack([obs_after(env, begin + n_steps - 1) for env in envs])
    return Report(
        env_indices=tuple(envs),
        rewards=np.array([[reward_of(env, t) for env in envs] for t in times], dtype=np.float32),
        dones=np.array([[is_done(env, t) for env in envs] for t in times]),
        actions=np.array([[action_of(env, t) for env in envs] for t in times]),
        infos=[[{"env": env, "time": t} for env in envs] for t in times],
        last_obs=as_dict(last_obs) if dictionary else last_obs,
        statistics=RolloutStatistics(),
    )


def assembler(n_envs: int, max_rollouts: int, dictionary: bool = False) -> StepAssembler:
    first_obs = np.stack([obs_after(env, -1) for env in range(n_envs)])
    return StepAssembler(as_dict(first_obs) if dictionary else first_obs, n_envs, max_rollouts)


def rows(step: Step | None) -> list[tuple[int, int]]:
    """Environment and time of each row, after a check that all that belongs to it says the same."""
    assert step is not None
    found = [(info["env"], info["time"]) for info in step.infos]
    assert [info["env_index"] for info in step.infos] == [env for env, _ in found]
    assert step.rewards.dtype == np.float32
    assert step.dones.dtype == bool
    assert step.rewards.tolist() == [reward_of(*row) for row in found]
    assert step.dones.tolist() == [is_done(*row) for row in found]
    assert step.actions.tolist() == [action_of(*row) for row in found]
    return found


def all_steps(steps: StepAssembler, flush: bool = False) -> list[list[tuple[int, int]]]:
    found = []
    while steps.has_step(flush):
        found.append(rows(steps.take_step()))
    return found


def test_rows_are_the_environments_in_order_while_workers_keep_pace() -> None:
    steps = assembler(n_envs=2, max_rollouts=2)
    assert not steps.has_step()
    steps.add(report([0], 0, 2))
    assert not steps.has_step()
    steps.add(report([1], 0, 2))
    assert all_steps(steps) == [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]
    steps.add(report([1], 2, 2))
    assert not steps.has_step()
    steps.add(report([0], 2, 2))
    assert all_steps(steps) == [[(0, 2), (1, 2)], [(0, 3), (1, 3)]]


def test_one_worker_may_have_all_environments() -> None:
    steps = assembler(n_envs=3, max_rollouts=2)
    steps.add(report([0, 1, 2], 0, 2))
    assert all_steps(steps) == [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1), (2, 1)]]


def test_workers_may_have_different_numbers_of_environments() -> None:
    steps = assembler(n_envs=5, max_rollouts=2)
    steps.add(report([3, 4], 0, 2))
    assert not steps.has_step()
    steps.add(report([0, 1, 2], 0, 2))
    assert all_steps(steps) == [[(env, time) for env in range(5)] for time in range(2)]


def test_a_fast_workers_transitions_fill_the_others_rows_only_at_the_largest_backlog() -> None:
    steps = assembler(n_envs=2, max_rollouts=3)
    steps.add(report([0], 0, 2))
    steps.add(report([0], 2, 1))
    assert not steps.has_step()
    steps.add(report([0], 3, 3))
    # a rollout that is begun counts as waiting: it takes two steps until there are fewer than three
    assert rows(steps.take_step()) == [(0, 0), (0, 1)]
    assert not steps.has_step()
    steps.add(report([0], 6, 1))
    assert rows(steps.take_step()) == [(0, 2), (0, 3)]
    assert not steps.has_step()
    # the laggard's own row is its own again as soon as it reports
    steps.add(report([1], 0, 1))
    assert rows(steps.take_step()) == [(0, 4), (1, 0)]
    assert not steps.has_step()
    assert steps.take_used_up() == [0, 0, 1]
    assert steps.take_used_up() == []


def test_only_the_rows_of_laggards_are_filled() -> None:
    steps = assembler(n_envs=4, max_rollouts=1)
    steps.add(report([1], 0, 1))
    steps.add(report([3], 0, 3))
    # environment 1 in its own row, and environment 3 in those of 0 and 2 and in its own
    assert rows(steps.take_step()) == [(3, 0), (1, 0), (3, 1), (3, 2)]


def test_there_is_no_step_of_too_few_transitions_even_at_the_largest_backlog() -> None:
    steps = assembler(n_envs=4, max_rollouts=1)
    steps.add(report([2], 0, 3))
    assert not steps.has_step()
    assert not steps.has_step(flush=True)
    steps.add(report([2], 3, 1))
    assert rows(steps.take_step()) == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_flush_makes_steps_of_whatever_is_there() -> None:
    steps = assembler(n_envs=2, max_rollouts=100)
    steps.add(report([0], 0, 5))
    steps.add(report([1], 0, 2))
    assert all_steps(steps) == [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]
    assert all_steps(steps, flush=True) == [[(0, 2), (0, 3)]]


def test_leftovers_are_taken_out_once() -> None:
    steps = assembler(n_envs=3, max_rollouts=100)
    steps.add(report([0], 0, 3))
    steps.add(report([2], 0, 2))
    assert all_steps(steps, flush=True) == [[(0, 0), (0, 1), (2, 0)]]
    infos, dones = steps.leftovers()
    assert [(info["env"], info["time"], info["env_index"]) for info in infos] == [(0, 2, 0), (2, 1, 2)]
    assert dones.tolist() == [is_done(0, 2), is_done(2, 1)] == [False, True]
    infos, dones = steps.leftovers()
    assert infos == []
    assert dones.shape == (0,)
    assert dones.dtype == bool
    assert not steps.has_step(flush=True)


@pytest.mark.parametrize("seed", range(10))
def test_at_any_pace_nothing_is_lost_or_doubled_and_time_runs_forward(seed: int) -> None:
    rng = np.random.default_rng(seed)
    workers, n_envs, n_steps, max_rollouts = ([0, 1, 2], [3, 4]), 5, 3, 2
    rollouts = [0, 0]
    steps = assembler(n_envs, max_rollouts)
    seen: list[tuple[int, int]] = []
    pace = rng.random()
    for _ in range(40):
        worker = int(rng.random() < pace)
        steps.add(report(workers[worker], n_steps * rollouts[worker], n_steps))
        rollouts[worker] += 1
        before = len(seen)
        for row in all_steps(steps):
            seen += row
        n_waiting = sum(n_steps * n * len(envs) for n, envs in zip(rollouts, workers, strict=True)) - len(seen)
        assert n_waiting < n_envs * (max_rollouts + 1) * n_steps
        assert (len(seen) - before) % n_envs == 0
    for row in all_steps(steps, flush=True):
        seen += row
    infos, dones = steps.leftovers()
    rest = [(info["env"], info["time"]) for info in infos]
    assert len(rest) < n_envs
    assert dones.tolist() == [is_done(*row) for row in rest]
    made = {env: n_steps * n for n, envs in zip(rollouts, workers, strict=True) for env in envs}
    for env, n_made in made.items():
        assert [time for other, time in seen + rest if other == env] == list(range(n_made))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_in_order_whenever_every_environment_has_something_to_show(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, rollouts, waiting = assembler(n_envs=3, max_rollouts=2), [0, 0, 0], [0, 0, 0]
    n_filled = 0
    for _ in range(60):
        env = int(rng.integers(3))
        steps.add(report([env], 2 * rollouts[env], 2))
        rollouts[env] += 1
        waiting[env] += 2
        while steps.has_step():
            step = steps.take_step()
            shown = [row[0] for row in rows(step)]
            in_order = all(waiting)
            assert (shown == [0, 1, 2]) == in_order
            n_filled += not in_order
            assert in_order or max(waiting) >= 3  # two rollouts, one of them begun
            assert all(row == i for i, row in enumerate(shown) if waiting[i] > 0)
            for row in shown:
                waiting[row] -= 1
    assert n_filled > 0


def assert_obs(obs: Obs, expected: Sequence[npt.NDArray[np.float32]]) -> None:
    rows = np.stack(expected)
    if not isinstance(obs, dict):
        assert obs.dtype == rows.dtype
        np.testing.assert_array_equal(obs, rows)
        return
    parts = as_dict(rows)
    assert list(obs) == list(parts)
    for key, part in parts.items():
        assert obs[key].dtype == part.dtype
        np.testing.assert_array_equal(obs[key], part)


@pytest.mark.parametrize("dictionary", [False, True])
def test_new_obs_is_exact_at_the_last_step_of_a_rollout(dictionary: bool) -> None:
    steps = assembler(3, max_rollouts=4, dictionary=dictionary)
    steps.add(report([1, 2], 0, 2, dictionary))  # rows 0 and 1 of the worker's observations
    steps.add(report([0], 0, 4, dictionary))
    shown = []
    for _ in range(2):
        step = steps.take_step()
        assert step is not None
        shown.append(step.new_obs)
    steps.add(report([1, 2], 2, 2, dictionary))
    while steps.has_step():
        step = steps.take_step()
        shown.append(step.new_obs)
    start = [obs_after(env, -1) for env in range(3)]
    # compared at the end: later steps must not have touched what was handed out before
    assert len(shown) == 4
    assert_obs(shown[0], start)
    assert_obs(shown[1], [start[0], obs_after(1, 1), obs_after(2, 1)])
    assert_obs(shown[2], [start[0], obs_after(1, 1), obs_after(2, 1)])
    assert_obs(shown[3], [obs_after(env, 3) for env in range(3)])


@pytest.mark.parametrize("dictionary", [False, True])
def test_new_obs_is_by_environment_also_where_rows_are_filled(dictionary: bool) -> None:
    steps = assembler(2, max_rollouts=2, dictionary=dictionary)
    steps.add(report([1], 0, 1, dictionary))
    steps.add(report([1], 1, 1, dictionary))
    steps.add(report([1], 2, 2, dictionary))
    step = steps.take_step()
    assert rows(step) == [(1, 0), (1, 1)]
    assert step is not None
    # row 0 shows environment 1, but row 0 of the observations stays environment 0's; the later of two rollouts counts
    assert_obs(step.new_obs, [obs_after(0, -1), obs_after(1, 1)])


def test_first_obs_and_last_obs_are_left_alone() -> None:
    first_obs = np.stack([obs_after(0, -1), obs_after(1, -1)])
    steps = StepAssembler(first_obs, 2, 2)
    told = report([0, 1], 0, 1), report([0, 1], 1, 1)
    for one in told:
        steps.add(one)
    assert len(all_steps(steps)) == 2
    np.testing.assert_array_equal(first_obs, [[0, 0], [1, 0]])
    np.testing.assert_array_equal(told[0].last_obs, [[0, 1], [1, 1]])
    np.testing.assert_array_equal(told[1].last_obs, [[0, 2], [1, 2]])


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


def test_rollouts_of_different_sizes_are_weighted_by_their_transitions() -> None:
    figures = pooled(
        RolloutStatistics(1, policy_loss=2.0, value_loss=3.0, entropy=1.0, n_updates=1, grad_norm=6.0, staleness=4),
        RolloutStatistics(3, policy_loss=6.0, value_loss=1.0, entropy=3.0, n_updates=3, grad_norm=2.0, staleness=2),
    )
    assert figures["train/policy_loss"] == 2
    assert figures["train/value_loss"] == 1
    assert figures["train/entropy_loss"] == -1  # A2C's sign
    assert figures["train/grad_norm"] == 2
    assert figures["train/staleness"] == 1.5


@pytest.mark.parametrize("seed", range(10))
def test_explained_variance_is_that_of_all_transitions_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # rollouts of different sizes, each around a mean of its own: averaging their explained variances would be wrong
    parts = []
    for size in rng.integers(1, 30, 5):
        returns = rng.normal(rng.normal(0, 5), 1, size)
        parts.append((returns, returns + rng.normal(rng.normal(), 1, size)))
    figures = pooled(*(statistics_of(returns, values) for returns, values in parts))
    returns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert figures["train/explained_variance"] == pytest.approx(float(explained_variance(values, returns)), abs=1e-9)


def test_a_perfect_critic_explains_everything_and_a_constant_one_nothing() -> None:
    returns = np.array([1.0, 2.0, 3.0, 6.0])
    assert pooled(statistics_of(returns, returns))["train/explained_variance"] == 1
    assert pooled(statistics_of(returns, np.full(4, 3.0)))["train/explained_variance"] == 0


@pytest.mark.parametrize(
    "constant",
    [
        0.0,
        1.0,
        0.1,
    ],
)
def test_explained_variance_of_constant_returns_is_nan(constant: float) -> None:
    figures = pooled(statistics_of(np.full(7, constant), np.arange(7.0)))
    assert np.isnan(figures["train/explained_variance"])


def test_shares_of_time_sum_to_one() -> None:
    figures = pooled(
        RolloutStatistics(n_transitions=1, seconds={"acting": 1.0, "stepping": 2.0, "learning": 0.5, "sharing": 0.5}),
        RolloutStatistics(n_transitions=9, seconds={"acting": 1.0, "stepping": 1.0, "learning": 1.5, "sharing": 0.5}),
    )
    shares = {key: value for key, value in figures.items() if key.startswith("time/")}
    assert shares == {"time/acting": 0.25, "time/stepping": 0.375, "time/learning": 0.25, "time/sharing": 0.125}
    assert sum(shares.values()) == 1


def test_pop_starts_anew() -> None:
    statistics = TrainingStatistics()
    returns, values = np.array([1.0, 5.0, 3.0, 8.0]), np.array([2.0, 0.0, 3.0, 7.0])
    old = statistics_of(returns[:2], values[:2], policy_loss=9.0, n_updates=1, grad_norm=9.0, seconds={"acting": 9.0})
    new = statistics_of(returns[1:], values[1:], policy_loss=3.0, n_updates=1, grad_norm=2.0, seconds={"learning": 1.0})
    statistics.add(old)
    assert statistics.pop() == pooled(old)
    statistics.add(new)
    assert statistics.pop() == pooled(new)
    assert "time/acting" not in pooled(new)


def test_what_was_added_is_left_alone() -> None:
    first = RolloutStatistics(n_transitions=1, policy_loss=1.0, seconds={"acting": 1.0})
    pooled(first, RolloutStatistics(n_transitions=1, policy_loss=2.0, seconds={"acting": 2.0}))
    assert first == RolloutStatistics(n_transitions=1, policy_loss=1.0, seconds={"acting": 1.0})


def test_there_is_nothing_to_log_before_anything_was_learned() -> None:
    statistics = TrainingStatistics()
    assert statistics.pop() == {}
    statistics.add(RolloutStatistics(n_transitions=1, seconds={"acting": 1.0}))
    assert statistics.pop() != {}
    assert statistics.pop() == {}


def test_skipped_updates_are_counted_since_the_start() -> None:
    statistics = TrainingStatistics()
    for n_skipped, expected in ((2, 2), (0, 2), (1, 3)):
        statistics.add(RolloutStatistics(n_transitions=1, skipped_updates=n_skipped, seconds={"acting": 1.0}))
        assert statistics.pop()["train/skipped_updates"] == expected
    assert statistics.skipped_updates == 3


def test_means_over_updates_are_left_out_where_all_were_skipped() -> None:
    figures = pooled(RolloutStatistics(n_transitions=1, skipped_updates=1, seconds={"acting": 1.0}))
    assert figures["train/skipped_updates"] == 1
    assert "train/grad_norm" not in figures
    assert "train/staleness" not in figures
