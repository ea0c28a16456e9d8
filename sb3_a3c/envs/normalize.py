"""
``VecNormalize`` with several workers: each applies what it sees at once, and all see the statistics of all.

Beside its running statistics a worker keeps its *deltas*: moments of what it has seen since its last report. The main
process merges them into the one ``VecNormalize`` that the user holds, and passes them on to the other workers. Deltas are of
disjoint sets of observations, so merging is exact: nothing is counted twice (Chan et al. 1979, parallel variance).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c.envs.wrapper_state import wrappers

#: Moments since the last report, for each running statistic of a stack of wrappers in the order of :func:`_statistics`.
Deltas = list[RunningMeanStd]

_OPTIONS = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")


class _DeltaRecorder(RunningMeanStd):
    """Running statistics that also keep the moments of what has come since the last report."""

    def __init__(self, known: RunningMeanStd) -> None:
        self.mean, self.var, self.count = known.mean, known.var, known.count
        self.deltas = _nothing_like(known)

    def update_from_moments(self, batch_mean: npt.NDArray[Any], batch_var: npt.NDArray[Any], batch_count: float) -> None:
        super().update_from_moments(batch_mean, batch_var, batch_count)
        self.deltas.update_from_moments(batch_mean, batch_var, batch_count)

    def add_others(self, deltas: RunningMeanStd) -> None:
        super().update_from_moments(deltas.mean, deltas.var, deltas.count)


def options(env: VecEnv) -> list[dict[str, Any]]:
    """
    :param env: any stack of wrappers
    :return: for each ``VecNormalize`` what the user can set: ``training``, ``norm_reward``, …
    """
    return [{name: getattr(normalizer, name) for name in _OPTIONS} for normalizer in _normalizers(env)]


def set_options(env: VecEnv, values: Sequence[dict[str, Any]]) -> None:
    """
    :param env: a stack like the one that ``values`` are from
    :param values: of :func:`options`
    """
    for normalizer, value in zip(_normalizers(env), values, strict=True):
        vars(normalizer).update(value)


def record_deltas(env: VecEnv) -> None:
    """
    From now on let each ``VecNormalize`` keep moments of what it sees for :func:`pop_deltas`.

    :param env: a worker's environments
    """
    for normalizer in _normalizers(env):
        attributes = vars(normalizer)
        attributes["ret_rms"] = _DeltaRecorder(normalizer.ret_rms)
        obs_rms = attributes.get("obs_rms")  # absent if observations are not normalised
        if isinstance(obs_rms, dict):
            attributes["obs_rms"] = {key: _DeltaRecorder(rms) for key, rms in obs_rms.items()}
        elif obs_rms is not None:
            attributes["obs_rms"] = _DeltaRecorder(obs_rms)


def pop_deltas(env: VecEnv) -> Deltas:
    """
    :param env: a worker's environments, after :func:`record_deltas`
    :return: what they have seen since the last call
    """
    taken = []
    for statistic in _statistics(env):
        assert isinstance(statistic, _DeltaRecorder)
        taken.append(statistic.deltas)
        statistic.deltas = _nothing_like(statistic)
    return taken


def merge_deltas(into: VecEnv | Deltas, deltas: Deltas) -> None:
    """
    :param into: environments (a worker's own deltas do not grow by this), or deltas to add to
    :param deltas: what others have seen
    """
    for statistic, new in zip(into if isinstance(into, list) else _statistics(into), deltas, strict=True):
        if new.count == 0:
            continue
        if isinstance(statistic, _DeltaRecorder):
            statistic.add_others(new)
        else:
            statistic.combine(new)


class StatisticsMerger:
    """
    The main process's part: merges what each worker saw into the user's ``VecNormalize``, and keeps for each worker what
    the others saw until it is sent.

    :param env: the user's environments
    :param n_workers: number of workers
    """

    def __init__(self, env: VecEnv, n_workers: int) -> None:
        self._env = env
        self._waiting = [self._empty() for _ in range(n_workers)]

    def merge(self, worker: int, deltas: Deltas) -> None:
        """
        :param worker: index of the worker that reports
        :param deltas: what it has seen since its last report
        """
        if not deltas:
            return
        merge_deltas(self._env, deltas)
        for other, waiting in enumerate(self._waiting):
            if other != worker:
                merge_deltas(waiting, deltas)

    def pop(self, worker: int) -> Deltas:
        """
        :param worker: index of the worker that is to be told
        :return: what the other workers have seen since the last call
        """
        deltas, self._waiting[worker] = self._waiting[worker], self._empty()
        return deltas

    def _empty(self) -> Deltas:
        return [_nothing_like(statistic) for statistic in _statistics(self._env)]


def _normalizers(env: VecEnv) -> list[VecNormalize]:
    return [wrapper for wrapper in wrappers(env) if isinstance(wrapper, VecNormalize)]


def _statistics(env: VecEnv) -> list[RunningMeanStd]:
    """All running statistics of a stack, always in the same order."""
    statistics: list[RunningMeanStd] = []
    for normalizer in _normalizers(env):
        obs_rms: Any = getattr(normalizer, "obs_rms", None)
        statistics += [normalizer.ret_rms]
        statistics += list(obs_rms.values()) if isinstance(obs_rms, dict) else [] if obs_rms is None else [obs_rms]
    return statistics


def _nothing_like(statistic: RunningMeanStd) -> RunningMeanStd:
    return RunningMeanStd(epsilon=0.0, shape=np.shape(statistic.mean))
