"""
``VecNormalize`` with several workers: each normalises with the statistics of all, its own included at once.

Beside its running statistics a worker records *deltas*: the moments of what it has seen since its last report. The main
process merges them into the user's ``VecNormalize`` and passes them on to the other workers. No observation is in two of
them, so the merged statistics are exact (Chan et al. 1979, parallel variance).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c.envs.wrapper_state import wrappers

#: Moments since the last report, one for each running statistic of a stack of wrappers, ordered as :func:`_statistics`.
Deltas = list[RunningMeanStd]

_OPTIONS = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")


class _DeltaRecorder(RunningMeanStd):
    """Running statistics that record the moments of what was added since the last report."""

    def __init__(self, known: RunningMeanStd) -> None:
        self.mean, self.var, self.count = known.mean, known.var, known.count
        self.deltas = _empty_like(known)

    def update_from_moments(self, batch_mean: npt.NDArray[Any], batch_var: npt.NDArray[Any], batch_count: float) -> None:
        super().update_from_moments(batch_mean, batch_var, batch_count)
        self.deltas.update_from_moments(batch_mean, batch_var, batch_count)

    def combine(self, other: RunningMeanStd) -> None:
        """Add another worker's deltas, which are not recorded."""
        super().update_from_moments(other.mean, other.var, other.count)


def options(env: VecEnv) -> list[dict[str, Any]]:
    """Return the options of each ``VecNormalize`` around ``env``: ``training``, ``norm_reward``, …"""
    return [{name: getattr(normalizer, name) for name in _OPTIONS} for normalizer in _normalizers(env)]


def set_options(env: VecEnv, values: Sequence[dict[str, Any]]) -> None:
    """Set what :func:`options` returned for a stack of the same wrappers."""
    for normalizer, value in zip(_normalizers(env), values, strict=True):
        vars(normalizer).update(value)


def record_deltas(env: VecEnv) -> None:
    """Let each ``VecNormalize`` around a worker's environments record deltas for :func:`pop_deltas`."""
    for normalizer in _normalizers(env):
        attributes = vars(normalizer)
        attributes["ret_rms"] = _DeltaRecorder(normalizer.ret_rms)
        obs_rms = attributes.get("obs_rms")  # absent if observations are not normalised
        if isinstance(obs_rms, dict):
            attributes["obs_rms"] = {key: _DeltaRecorder(rms) for key, rms in obs_rms.items()}
        elif obs_rms is not None:
            attributes["obs_rms"] = _DeltaRecorder(obs_rms)


def pop_deltas(env: VecEnv) -> Deltas:
    """Return what a worker's environments have recorded since the last call."""
    popped = []
    for statistic in _statistics(env):
        assert isinstance(statistic, _DeltaRecorder)
        popped.append(statistic.deltas)
        statistic.deltas = _empty_like(statistic)
    return popped


def merge_deltas(into: VecEnv | Deltas, deltas: Deltas) -> None:
    """Add deltas to the statistics of environments, where they are not recorded again, or to other deltas."""
    for statistic, new in zip(into if isinstance(into, list) else _statistics(into), deltas, strict=True):
        if new.count > 0:
            statistic.combine(new)


class StatisticsMerger:
    """The main process's part: merges deltas into the user's ``VecNormalize``, and keeps them for the other workers."""

    def __init__(self, env: VecEnv, n_workers: int) -> None:
        self._env = env
        self._waiting = [self._empty() for _ in range(n_workers)]

    def merge(self, worker: int, deltas: Deltas) -> None:
        """Merge the deltas that a worker reports. In-process training reports none."""
        if not deltas:
            return
        merge_deltas(self._env, deltas)
        for other, waiting in enumerate(self._waiting):
            if other != worker:
                merge_deltas(waiting, deltas)

    def pop(self, worker: int) -> Deltas:
        """Return the deltas of the other workers since the last call, to be sent to this one."""
        deltas, self._waiting[worker] = self._waiting[worker], self._empty()
        return deltas

    def _empty(self) -> Deltas:
        return [_empty_like(statistic) for statistic in _statistics(self._env)]


def _normalizers(env: VecEnv) -> list[VecNormalize]:
    return [wrapper for wrapper in wrappers(env) if isinstance(wrapper, VecNormalize)]


def _statistics(env: VecEnv) -> list[RunningMeanStd]:
    """Return all running statistics of a stack, always in the same order."""
    statistics: list[RunningMeanStd] = []
    for normalizer in _normalizers(env):
        statistics.append(normalizer.ret_rms)
        obs_rms: Any = vars(normalizer).get("obs_rms")
        if isinstance(obs_rms, dict):
            statistics += obs_rms.values()
        elif obs_rms is not None:
            statistics.append(obs_rms)
    return statistics


def _empty_like(statistic: RunningMeanStd) -> RunningMeanStd:
    return RunningMeanStd(epsilon=0.0, shape=np.shape(statistic.mean))
