"""
From workers' reports to steps. The info of every transition has its environment and time; reward, action and observation are
computed from these two, so that a mix-up shows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sb3_a3c.actor_learner.report import Report, RolloutStatistics
from sb3_a3c.envs.observations import Obs
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
    """The report of a worker with these environments on steps begin, …, begin + n_steps - 1."""
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
    steps = StepAssembler(n_envs, max_rollouts)
    steps.begin(range(n_envs), as_dict(first_obs) if dictionary else first_obs)
    return steps


def rows(step: Step | None) -> list[tuple[int, int]]:
    """Environment and time of each row, after a check that all values of the row agree."""
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


@pytest.mark.parametrize("workers", [[[0, 1, 2, 3, 4]], [[3, 4], [0, 1, 2]]])
def test_workers_with_different_numbers_of_environments(workers: list[list[int]]) -> None:
    steps = assembler(n_envs=5, max_rollouts=2)
    for envs in workers:
        assert not steps.has_step()
        steps.add(report(envs, 0, 2))
    assert all_steps(steps) == [[(env, time) for env in range(5)] for time in range(2)]


def test_a_fast_workers_transitions_fill_other_rows_only_at_the_largest_backlog() -> None:
    steps = assembler(n_envs=2, max_rollouts=3)
    steps.add(report([0], 0, 2))
    steps.add(report([0], 2, 1))
    assert not steps.has_step()
    steps.add(report([0], 3, 3))
    # a partly shown rollout counts as waiting: after two steps there are fewer than three
    assert rows(steps.take_step()) == [(0, 0), (0, 1)]
    assert not steps.has_step()
    steps.add(report([0], 6, 1))
    assert rows(steps.take_step()) == [(0, 2), (0, 3)]
    assert not steps.has_step()
    # the slow environment has its own row again as soon as it reports
    steps.add(report([1], 0, 1))
    assert rows(steps.take_step()) == [(0, 4), (1, 0)]
    assert not steps.has_step()
    assert steps.take_used_up() == [0, 0, 1]
    assert steps.take_used_up() == []


def test_only_rows_of_slow_environments_are_filled() -> None:
    steps = assembler(n_envs=4, max_rollouts=1)
    steps.add(report([1], 0, 1))
    steps.add(report([3], 0, 3))
    # environment 1 in its own row, and environment 3 in those of 0 and 2 and in its own
    assert rows(steps.take_step()) == [(3, 0), (1, 0), (3, 1), (3, 2)]


def test_too_few_transitions_make_no_step() -> None:
    steps = assembler(n_envs=4, max_rollouts=1)
    steps.add(report([2], 0, 3))
    assert not steps.has_step()
    assert not steps.has_step(flush=True)
    steps.add(report([2], 3, 1))
    assert rows(steps.take_step()) == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_flush_makes_steps_of_all_transitions() -> None:
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


@pytest.mark.parametrize("seed", range(5))
def test_at_any_pace_no_transition_is_lost_doubled_or_out_of_order(seed: int) -> None:
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
    # compared at the end: later steps must not change the arrays of earlier ones
    assert len(shown) == 4
    assert_obs(shown[0], start)
    assert_obs(shown[1], [start[0], obs_after(1, 1), obs_after(2, 1)])
    assert_obs(shown[2], [start[0], obs_after(1, 1), obs_after(2, 1)])
    assert_obs(shown[3], [obs_after(env, 3) for env in range(3)])


@pytest.mark.parametrize("dictionary", [False, True])
def test_new_obs_is_by_environment_where_rows_are_filled(dictionary: bool) -> None:
    steps = assembler(2, max_rollouts=2, dictionary=dictionary)
    steps.add(report([1], 0, 1, dictionary))
    steps.add(report([1], 1, 1, dictionary))
    steps.add(report([1], 2, 2, dictionary))
    step = steps.take_step()
    assert rows(step) == [(1, 0), (1, 1)]
    assert step is not None
    # row 0 has a transition of environment 1, but the observation of environment 0; the later of two rollouts counts
    assert_obs(step.new_obs, [obs_after(0, -1), obs_after(1, 1)])


@pytest.mark.parametrize("dictionary", [False, True])
def test_steps_begin_once_all_environments_were_reset(dictionary: bool) -> None:
    steps = StepAssembler(3, 2)
    first_obs = [np.stack([obs_after(env, -1) for env in envs]) for envs in ([1, 2], [0])]
    begun = [as_dict(obs) if dictionary else obs for obs in first_obs]
    steps.begin([1, 2], begun[0])
    for begin in (0, 1):
        steps.add(report([1, 2], begin, 1, dictionary))
    assert not steps.has_step() and not steps.has_step(flush=True)
    steps.begin([0], begun[1])
    steps.begin([0], as_dict(first_obs[1] + 1) if dictionary else first_obs[1] + 1)  # of a worker that replaces another
    assert steps.obs is not None
    assert_obs(steps.obs, [obs_after(env, -1) for env in range(3)])
    assert all_steps(steps) == [[(1, 0), (1, 1), (2, 0)]]
    assert_obs(steps.obs, [obs_after(0, -1), obs_after(1, 1), obs_after(2, 0)])


def test_first_obs_and_last_obs_are_not_modified() -> None:
    first_obs = np.stack([obs_after(0, -1), obs_after(1, -1)])
    steps = StepAssembler(2, 2)
    steps.begin([0, 1], first_obs)
    reports = report([0, 1], 0, 1), report([0, 1], 1, 1)
    for one in reports:
        steps.add(one)
    assert len(all_steps(steps)) == 2
    np.testing.assert_array_equal(first_obs, [[0, 0], [1, 0]])
    np.testing.assert_array_equal(reports[0].last_obs, [[0, 1], [1, 1]])
    np.testing.assert_array_equal(reports[1].last_obs, [[0, 2], [1, 2]])
