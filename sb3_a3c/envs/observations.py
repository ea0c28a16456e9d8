"""Observations as environments return them: arrays, or dictionaries of arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.utils import obs_as_tensor

#: Observations of n environments: an array (n, …), or a dictionary of such arrays.
Obs = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]


def as_tensor(obs: Obs) -> Any:
    """Convert observations to tensors that share their memory."""
    return obs_as_tensor(obs, th.device("cpu"))


def batch_of_one(obs: Any) -> Obs:
    """Add a batch dimension to a single observation, (…) -> (1, …), without copying it."""
    return _map(lambda part: np.asarray(part)[None], obs)


def copied(obs: Any) -> Obs:
    """Copy observations whose buffer the environment may overwrite in its next step."""
    return _map(np.array, obs)


def row(obs: Obs, index: int) -> Any:
    """Select the observation of one environment, (n, …) -> (…), without copying it."""
    return {key: part[index] for key, part in obs.items()} if isinstance(obs, dict) else obs[index]


def stacked(rows: Sequence[Any]) -> Obs:
    """Stack observations along a new first axis: (N, …) of T steps to (T, N, …)."""
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def flat_chunk(obs: Obs, chunk: slice) -> Obs:
    """Select n of the N environments and flatten: (T, N, …) -> (T * n, …)."""
    return _map(lambda part: part[:, chunk].reshape(-1, *part.shape[2:]), obs)


def _map(function: Callable[[Any], npt.NDArray[Any]], obs: Any) -> Obs:
    if isinstance(obs, dict):
        return {key: function(part) for key, part in obs.items()}
    return function(obs)
