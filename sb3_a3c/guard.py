"""
What is not a finite number goes no further: the updates that it would spoil are dropped, and the user hears why.

Which fault stops where, for each chunk of a rollout::

    observation ── zero_faulty ──────► the policy acts on a zero instead, the chunk is not learned from (before VecNormalize
                                       there is ``normalization.Sieve``)
    reward ─────── fault_of_rollout ─► the chunk is not learned from
    gradient ───── fault_of_gradient ► not pushed
    parameter ──── Replica.push ─────► undone where it is not finite
"""

import contextlib
import enum
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.errors import DivergenceError

#: So many updates of a worker that were dropped in a row end the training.
MAX_SKIPPED_UPDATES = 100

_LARGEST = np.finfo(np.float32).max  # policies turn observations into single precision
_UNTOUCHED = "The parameters are those from before, and finite."
_CALMER = "Lower `learning_rate` or `max_grad_norm`, or let VecNormalize scale observations and rewards."


class Fault(enum.Enum):
    """What was not finite, and what to do about it."""

    OBSERVATION = (
        "an observation was NaN or infinite",
        f"{_UNTOUCHED} Mend the environment; VecCheckNan(env, raise_exception=True) shows where it comes from.",
    )
    REWARD = (
        "a reward was NaN or infinite",
        f"{_UNTOUCHED} Mend the environment; VecCheckNan(env, raise_exception=True) shows where it comes from.",
    )
    GRADIENT = (
        "the loss or its gradient was NaN or infinite",
        f"{_UNTOUCHED} {_CALMER}",
    )
    PARAMETER = (
        "parameters, or buffers of the network, would have become NaN or infinite",
        "Those have kept finite values; others may have moved. Lower `learning_rate`, and see that the optimizer's `eps` is "
        "not 0.",
    )

    def __init__(self, what: str, advice: str) -> None:
        self.what = what
        self.advice = advice


class Guard:
    """Counts the updates that a worker drops one after another."""

    def __init__(self) -> None:
        self._n_dropped = 0

    def passed(self) -> None:
        """An update was made."""
        self._n_dropped = 0

    def dropped(self, fault: Fault) -> None:
        """
        An update was not made.

        :param fault: why
        :raises DivergenceError: if that has happened ``MAX_SKIPPED_UPDATES`` times in a row
        """
        self._n_dropped += 1
        if self._n_dropped >= MAX_SKIPPED_UPDATES:
            raise DivergenceError(
                f"{MAX_SKIPPED_UPDATES} updates in a row were dropped, the last because {fault.what}. {fault.advice}"
            )


def all_finite(tensors: Iterable[th.Tensor]) -> bool:
    """
    :param tensors: of floating point
    :return: whether all numbers are finite
    """
    # a finite sum has finite terms, and is found far sooner; only absurd terms have none
    return all(math.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all()) for tensor in tensors)


def check_finite(policy: ActorCriticPolicy) -> None:
    """
    :param policy: that is to be trained
    :raises ValueError: if one of its trainable parameters is NaN or infinite
    """
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and not all_finite([parameter]):
            raise ValueError(
                f"The policy's parameter `{name}` is NaN or infinite: nothing can be learned from there. Load an earlier "
                "checkpoint, or make a new model."
            )


def zero_faulty(obs: Any) -> npt.NDArray[np.bool_]:
    """
    Put zeros where a number is not finite in single precision.

    :param obs: (n_envs, …), which are changed
    :return: (n_envs,), in which there were such
    """
    if isinstance(obs, dict):
        faulty: npt.NDArray[np.bool_] = np.logical_or.reduce([_zero_faulty(part) for part in obs.values()])
        return faulty
    return _zero_faulty(obs)


def _zero_faulty(obs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if obs.dtype.kind == "f" and not (is_finite := np.abs(obs) <= _LARGEST).all():
        obs[~is_finite] = 0.0
        return np.asarray(~is_finite.reshape(len(obs), -1).all(axis=1))  # (n_envs, …) -> (n_envs,)
    return np.zeros(len(obs), dtype=bool)


def fault_of_rollout(
    faulty_obs: npt.NDArray[np.bool_], rewards: npt.NDArray[np.floating], terminal_values: npt.NDArray[np.floating]
) -> Fault | None:
    """
    :param faulty_obs: (n,), which environments of a chunk had an observation that was not finite
    :param rewards: (T, n)
    :param terminal_values: (T, n), of the observations at which time limits cut episodes
    :return: why this chunk can't be learned from; None if it can
    """
    if faulty_obs.any() or not np.isfinite(terminal_values).all():
        return Fault.OBSERVATION
    return None if np.isfinite(rewards).all() else Fault.REWARD


def fault_of_gradient(loss: float, norm: float) -> Fault | None:
    """
    :param loss: whose gradient it is
    :param norm: of the whole gradient
    :return: why it can't be pushed; None if it can
    """
    return None if math.isfinite(loss) and math.isfinite(norm) else Fault.GRADIENT


@contextlib.contextmanager
def outputs_explained() -> Iterator[None]:
    """
    ``torch.distributions`` refuses what is not finite. Inside this block observations and parameters are finite: so the
    policy's outputs have overflowed, and that error is raised as :class:`DivergenceError`.
    """
    try:
        yield
    except ValueError as error:
        if "invalid values" not in str(error):
            raise
        raise DivergenceError(
            "The policy's outputs were NaN or infinite, though its parameters and the observations are finite: they have "
            f"become too large. {_CALMER}"
        ) from error
