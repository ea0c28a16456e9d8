"""A worker's report on a rollout: transitions for callbacks, sums for the logger, and what its time was spent on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_a3c.actor_learner.loss import LossTerms
from sb3_a3c.envs.observations import Obs

ACTIVITIES = ("acting", "stepping", "learning", "sharing")


@dataclass
class RolloutStatistics:
    """Sums over one rollout of one worker, so that rollouts of different sizes pool exactly."""

    n_transitions: int = 0  #: learned from
    policy_loss: float = 0.0  #: sums over transitions of the objective's terms (not yet weighted by coefficients) …
    value_loss: float = 0.0
    entropy: float = 0.0
    return_moments: tuple[float, float] = (0.0, 0.0)  #: … of the returns and their squares,
    error_moments: tuple[float, float] = (0.0, 0.0)  #: … of ``returns - values`` and their squares
    n_updates: int = 0
    clipped_updates: int = 0  #: those whose gradient was clipped
    grad_norm: float = 0.0  #: sums over updates, before clipping
    staleness: int = 0
    skipped_updates: int = 0  #: updates dropped because something was not finite
    learning_rate: float = 0.0  #: of all updates of the rollout
    fault: str = ""  #: what was not finite, at the last of them
    seconds: dict[str, float] = field(default_factory=dict)  #: spent on each of :data:`ACTIVITIES`

    def add_update(
        self,
        terms: LossTerms,
        returns: npt.NDArray[np.floating],
        values: npt.NDArray[np.floating],
        grad_norm: float,
        staleness: int,
    ) -> None:
        """Count a push that learned from ``returns`` and ``values``, (T, n); ``grad_norm`` is the norm before clipping."""
        n_envs = returns.shape[1]
        self.n_updates += 1
        self.n_transitions += returns.size
        self.policy_loss += terms.policy_loss.item() * n_envs
        self.value_loss += terms.value_loss.item() * n_envs
        self.entropy += terms.entropy.item() * n_envs
        self.return_moments = added(self.return_moments, moments(returns))
        self.error_moments = added(self.error_moments, moments(returns - values))
        self.grad_norm += grad_norm
        self.staleness += staleness


@dataclass(frozen=True)
class Report:
    """One rollout of one worker. T = n_steps, N = environments of this worker."""

    env_indices: Sequence[int]  #: which of the user's environments these are (N,)
    rewards: npt.NDArray[np.float32]  #: (T, N)
    dones: npt.NDArray[np.bool_]  #: (T, N)
    actions: npt.NDArray[Any]  #: (T, N, …), as the policy chose them
    infos: list[list[dict[str, Any]]]  #: T lists of N
    values: npt.NDArray[np.floating]  #: (T, N), V of the states acted in
    obs: Obs | None  #: (T, N, …), the observations acted on; None if no callback can see them
    last_obs: Obs | None  #: (N, …), those after the last step; likewise
    statistics: RolloutStatistics


class Timer:
    """Adds up the seconds that each activity of a rollout takes, starting now."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._last = time.perf_counter()

    def spent(self, activity: str) -> None:
        """Count the time since the last call as time spent on one of :data:`ACTIVITIES`."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._last
        self._last = now


def moments(x: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The sums of the numbers and of their squares; in double precision, because they are pooled and subtracted later."""
    x = x.astype(np.float64)
    return float(x.sum()), float(np.square(x).sum())


def added(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """The moments of all numbers, from the moments of two disjoint sets of them."""
    return a[0] + b[0], a[1] + b[1]
