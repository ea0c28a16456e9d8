"""Observations as environments return them: arrays, or dictionaries of arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.utils import obs_as_tensor

#: Of n environments: an array (n, …), or a dictionary of such.
Obs = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]


def as_tensor(obs: Obs) -> Any:
    """
    :param obs: any
    :return: as tensors of the same memory
    """
    return obs_as_tensor(obs, th.device("cpu"))


def batch_of_one(obs: Any) -> Obs:
    """
    :param obs: a single observation
    :return: (1, …), of the same memory
    """
    if isinstance(obs, dict):
        return {key: np.asarray(part)[None] for key, part in obs.items()}
    return np.asarray(obs)[None]


def copied(obs: Any) -> Obs:
    """
    :param obs: perhaps in a buffer that the next step overwrites
    :return: the same in memory of its own
    """
    if isinstance(obs, dict):
        return {key: np.array(value) for key, value in obs.items()}
    return np.array(obs)


def stacked(rows: Sequence[Any]) -> Obs:
    """
    :param rows: T observations of N environments
    :return: (T, N, …)
    """
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def flat_chunk(obs: Obs, chunk: slice) -> Obs:
    """
    :param obs: (T, N, …)
    :param chunk: n of the environments
    :return: (T * n, …)
    """
    if isinstance(obs, dict):
        return {key: value[:, chunk].reshape(-1, *value.shape[2:]) for key, value in obs.items()}
    return obs[:, chunk].reshape(-1, *obs.shape[2:])
