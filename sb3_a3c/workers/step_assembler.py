"""What a callback sees: the reports of all workers, put together to steps of ``n_envs`` transitions."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sb3_a3c.actor_learner.report import Report
from sb3_a3c.envs.observations import Obs, row, stacked


class Step(NamedTuple):
    """One step of ``n_envs`` environments, in the terms of ``VecEnv.step``."""

    rewards: npt.NDArray[np.float32]  #: (n_envs,)
    dones: npt.NDArray[np.bool_]  #: (n_envs,)
    infos: list[dict[str, Any]]  #: n_envs; ``env_index`` says whose transition it is
    actions: npt.NDArray[Any]  #: (n_envs, …)
    new_obs: Obs  #: (n_envs, …), each row the newest known; exact at the last step of a rollout


class _Transition(NamedTuple):
    env_index: int
    reward: float
    done: bool
    info: dict[str, Any]
    action: npt.NDArray[Any]
    rollout_end: tuple[int, Obs] | None  #: at a rollout's last step: where this environment's observation is


class StepAssembler:
    """
    Puts transitions into steps, as ``env.step`` of one vectorised environment would have returned them.

    Row i of a step is environment i while workers keep pace. When some environment is ``max_rollouts`` rollouts ahead, its
    transitions also fill the rows of those that lag, so that no worker waits for another. The transitions of one environment
    stay in order of time.

    :param n_envs: number of environments
    :param max_rollouts: of one environment, that may wait for the others, one that is begun included
    """

    def __init__(self, n_envs: int, max_rollouts: int) -> None:
        self.n_envs = n_envs
        self.max_rollouts = max_rollouts
        self._queues: list[deque[_Transition]] = [deque() for _ in range(n_envs)]
        self._n_rollouts = [0] * n_envs  # in each queue
        self._first_obs: dict[int, tuple[int, Obs]] = {}  # by environment: its column in these observations
        self.obs: Obs | None = None  #: (n_envs, …), after the step that was taken last; None until all have begun
        self._used_up: list[int] = []

    def begin(self, env_indices: Sequence[int], obs: Obs) -> None:
        """Add the observations (N, …) of the first reset of a worker's environments. A replaced worker's came before."""
        for column, env_index in enumerate(env_indices):
            self._first_obs.setdefault(env_index, (column, obs))
        if self.obs is None and len(self._first_obs) == self.n_envs:
            self.obs = stacked([row(obs, column) for _, (column, obs) in sorted(self._first_obs.items())])  # (n_envs, …)

    def add(self, report: Report) -> None:
        """Add the next rollout of a worker's environments."""
        n_steps = len(report.rewards)
        for column, env_index in enumerate(report.env_indices):
            queue = self._queues[env_index]
            self._n_rollouts[env_index] += 1
            rewards, dones = report.rewards[:, column].tolist(), report.dones[:, column].tolist()
            for t in range(n_steps):
                info = {**report.infos[t][column], "env_index": env_index}
                end = (column, report.last_obs) if t == n_steps - 1 else None
                queue.append(_Transition(env_index, rewards[t], dones[t], info, report.actions[t, column], end))

    def has_step(self, flush: bool = False) -> bool:
        """
        :param flush: no more reports will come: make steps as long as ``n_envs`` transitions are left
        :return: whether there is a next step
        """
        if self.obs is None:
            return False
        if all(self._queues):
            return True
        enough = flush or max(self._n_rollouts) >= self.max_rollouts
        return enough and sum(len(queue) for queue in self._queues) >= self.n_envs

    def take_step(self) -> Step:
        """:return: the next step, which :meth:`has_step` has promised"""
        assert self.obs is not None
        transitions = [(queue or max(self._queues, key=len)).popleft() for queue in self._queues]
        ends = [(t.env_index, *t.rollout_end) for t in transitions if t.rollout_end is not None]
        if ends:
            self.obs = _with_rows(self.obs, ends)
        for env_index, *_ in ends:
            self._n_rollouts[env_index] -= 1
            self._used_up.append(env_index)
        return Step(
            rewards=np.array([transition.reward for transition in transitions], dtype=np.float32),
            dones=np.array([transition.done for transition in transitions], dtype=bool),
            infos=[transition.info for transition in transitions],
            actions=np.stack([transition.action for transition in transitions]),
            new_obs=self.obs,
        )

    def take_used_up(self) -> list[int]:
        """:return: the environments of which a rollout has ended in a step since the last call, once for each rollout"""
        used_up, self._used_up = self._used_up, []
        return used_up

    def leftovers(self) -> tuple[list[dict[str, Any]], npt.NDArray[np.bool_]]:
        """
        Take out all transitions that no step has shown.

        :return: their infos, and whether each ended an episode
        """
        rest = [transition for queue in self._queues for transition in queue]
        for queue in self._queues:
            queue.clear()
        self._n_rollouts = [0] * self.n_envs
        return [transition.info for transition in rest], np.array([transition.done for transition in rest], dtype=bool)


def _with_rows(obs: Obs, rows: list[tuple[int, int, Obs]]) -> Obs:
    """A copy of ``obs`` with new rows; each is (its index, its column in the observations given, those observations)."""
    if isinstance(obs, dict):
        parts = {key: [(i, column, new[key]) for i, column, new in rows if isinstance(new, dict)] for key in obs}
        return {key: _with_array_rows(value, parts[key]) for key, value in obs.items()}
    return _with_array_rows(obs, [(i, column, new) for i, column, new in rows if not isinstance(new, dict)])


def _with_array_rows(obs: npt.NDArray[Any], rows: list[tuple[int, int, npt.NDArray[Any]]]) -> npt.NDArray[Any]:
    obs = obs.copy()
    for index, column, new in rows:
        obs[index] = new[column]
    return obs
