"""Assembles the reports of all workers into steps of ``n_envs`` transitions, which callbacks see."""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sb3_a3c.actor_learner.report import Report
from sb3_a3c.envs.observations import Obs, stacked


class Step(NamedTuple):
    """
    One step of ``n_envs`` environments, in the terms of A2C's ``collect_rollouts``. Row i of each is the same transition.
    Rewards, dones and actions are read-only: workers have learned from them, so a change would not have A2C's effect.
    """

    rewards: npt.NDArray[np.float32]  #: (n_envs,)
    dones: npt.NDArray[np.bool_]  #: (n_envs,)
    infos: list[dict[str, Any]]  #: n_envs; ``env_index`` says whose transition it is
    actions: npt.NDArray[Any]  #: (n_envs, …)
    values: npt.NDArray[np.floating]  #: (n_envs,), V of the states acted in
    obs: Obs | None  #: (n_envs, …), acted on; None if the reports have none
    new_obs: Obs | None  #: (n_envs, …), after the step; likewise


class _Transition(NamedTuple):
    """Step t of the environment in a column of a report."""

    report: Report
    t: int
    column: int

    @property
    def env_index(self) -> int:
        return self.report.env_indices[self.column]

    @property
    def ends_rollout(self) -> bool:
        return self.t == len(self.report.rewards) - 1

    @property
    def info(self) -> dict[str, Any]:
        return {**self.report.infos[self.t][self.column], "env_index": self.env_index}


class StepAssembler:
    """
    Puts transitions into steps, as ``env.step`` of one vectorised environment would have returned them.

    Row i of a step is environment i while workers keep pace. When some environment is ``max_rollouts`` rollouts ahead, its
    transitions also fill the rows of those that lag, so that no worker waits for another. The transitions of one environment
    stay in order of time.

    :param max_rollouts: of one environment, that may wait for the others, one that is begun included
    """

    def __init__(self, n_envs: int, max_rollouts: int) -> None:
        self.n_envs = n_envs
        self.max_rollouts = max_rollouts
        self._queues: list[deque[_Transition]] = [deque() for _ in range(n_envs)]
        self._n_rollouts = [0] * n_envs  # in each queue
        self._used_up: list[int] = []

    def add(self, report: Report) -> None:
        """Add the next rollout of a worker's environments."""
        for column, env_index in enumerate(report.env_indices):
            self._n_rollouts[env_index] += 1
            self._queues[env_index].extend(_Transition(report, t, column) for t in range(len(report.rewards)))

    def has_step(self, flush: bool = False) -> bool:
        """Whether there is a next step. ``flush`` if no more reports will come: then any ``n_envs`` transitions make one."""
        if all(self._queues):
            return True
        enough = flush or max(self._n_rollouts) >= self.max_rollouts
        return enough and sum(len(queue) for queue in self._queues) >= self.n_envs

    def take_step(self) -> Step:
        """Return the next step, after :meth:`has_step` has returned True."""
        row = [(queue or max(self._queues, key=len)).popleft() for queue in self._queues]
        for transition in row:
            if transition.ends_rollout:
                self._n_rollouts[transition.env_index] -= 1
                self._used_up.append(transition.env_index)
        step = Step(
            rewards=np.array([report.rewards[t, column] for report, t, column in row], dtype=np.float32),
            dones=np.array([report.dones[t, column] for report, t, column in row], dtype=bool),
            infos=[transition.info for transition in row],
            actions=np.stack([report.actions[t, column] for report, t, column in row]),
            values=np.array([report.values[t, column] for report, t, column in row]),
            obs=_stacked([_row(report.obs, t, column) for report, t, column in row]),
            new_obs=_stacked([_new_obs(transition) for transition in row]),
        )
        for learned_from in (step.rewards, step.dones, step.actions):
            learned_from.flags.writeable = False
        return step

    def take_used_up(self) -> list[int]:
        """Return the environments of which a rollout has ended in a step since the last call, once for each rollout."""
        used_up, self._used_up = self._used_up, []
        return used_up

    def leftovers(self) -> tuple[list[dict[str, Any]], npt.NDArray[np.bool_]]:
        """Take out all transitions that no step has shown. Return their infos, and whether each ended an episode."""
        rest = [transition for queue in self._queues for transition in queue]
        for queue in self._queues:
            queue.clear()
        self._n_rollouts = [0] * self.n_envs
        return [each.info for each in rest], np.array([each.report.dones[each.t, each.column] for each in rest], dtype=bool)


def _new_obs(transition: _Transition) -> Any:
    report, t, column = transition
    return _row(report.last_obs, column) if transition.ends_rollout else _row(report.obs, t + 1, column)


def _row(obs: Obs | None, *indices: int) -> Any:
    if isinstance(obs, dict):
        return {key: part[indices] for key, part in obs.items()}
    return None if obs is None else obs[indices]


def _stacked(rows: list[Any]) -> Obs | None:
    return None if rows[0] is None else stacked(rows)
