"""
NaN and infinity never reach the shared parameters: the update that they would spoil is dropped, and the user is told why.

Where each fault stops, for each chunk of a rollout::

    observation ── envs.non_finite ──► the policy acts on zeros; the chunk is not learned from (check_rollout)
    reward ─────── check_rollout ────► the chunk is not learned from
    gradient ───── check_gradient ───► not pushed
    parameter ──── Replica.push ─────► undone where it is not finite
"""

import contextlib
import enum
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sb3_a3c.actor_learner.report import RolloutStatistics
from sb3_a3c.errors import DivergenceError
from sb3_a3c.store.base import Replica

#: 100 dropped updates in a row in one worker end the training.
MAX_SKIPPED_UPDATES = 100
_UNTOUCHED = "The parameters are those from before, and finite."
_SMALLER_STEPS = "Lower `learning_rate` or `max_grad_norm`, or let VecNormalize scale observations and rewards."
_FIND_IT = "Correct the environment; VecCheckNan(env, raise_exception=True) shows where it comes from."


class Fault(enum.Enum):
    """What was not finite, and what to do about it."""

    OBSERVATION = "an observation was NaN or infinite", f"{_UNTOUCHED} {_FIND_IT}"
    REWARD = "a reward was NaN or infinite", f"{_UNTOUCHED} {_FIND_IT}"
    GRADIENT = "the loss or its gradient was NaN or infinite", f"{_UNTOUCHED} {_SMALLER_STEPS}"
    PARAMETER = (
        "parameters, or buffers of the network, would have become NaN or infinite",
        "Those have kept finite values; others may have moved. Lower `learning_rate`, and check that the optimizer's `eps` "
        "is not 0.",
    )

    def __init__(self, what: str, advice: str) -> None:
        self.what = what
        self.advice = advice


class DroppedUpdateError(Exception):
    """An update is not to be made. Never leaves :meth:`UpdateGuard.dropping`."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class UpdateGuard:
    """Drops updates that something non-finite would spoil, and counts how many in a row."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._n_dropped = 0

    @contextlib.contextmanager
    def dropping(self, statistics: RolloutStatistics) -> Iterator[None]:
        """
        One update is made inside this block. If it raises a :class:`DroppedUpdateError`, the update is dropped and counted.

        :raises DivergenceError: if that has happened ``MAX_SKIPPED_UPDATES`` times in a row
        """
        try:
            yield
        except DroppedUpdateError as dropped:
            self._replica.discard()
            statistics.skipped_updates += 1
            statistics.fault = dropped.fault.what
            self._n_dropped += 1
            if self._n_dropped >= MAX_SKIPPED_UPDATES:
                raise DivergenceError(
                    f"{MAX_SKIPPED_UPDATES} updates in a row were dropped, the last because {dropped.fault.what}. "
                    f"{dropped.fault.advice}"
                ) from None
        else:
            self._n_dropped = 0


def check_rollout(
    faulty_obs: npt.NDArray[np.bool_], rewards: npt.NDArray[np.floating], terminal_values: npt.NDArray[np.floating]
) -> None:
    """``faulty_obs``, (n,): which environments of a chunk had an observation that was not finite. The others are (T, n)."""
    if faulty_obs.any() or not np.isfinite(terminal_values).all():
        raise DroppedUpdateError(Fault.OBSERVATION)
    if not np.isfinite(rewards).all():
        raise DroppedUpdateError(Fault.REWARD)


def check_gradient(loss: float, norm: float) -> None:
    """``norm`` is that of the whole gradient of ``loss``."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DroppedUpdateError(Fault.GRADIENT)
