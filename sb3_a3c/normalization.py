"""
``VecNormalize`` with several workers: each applies what it sees at once, and all see the statistics of all.

A worker keeps, beside its running statistics, what it has seen since it last told (its *news*). The main process merges
all news into the one ``VecNormalize`` that the user holds, and passes them on to the other workers. News are moments of
disjoint sets of observations, so merging is exact: nothing is counted twice (Chan et al. 1979, parallel variance).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_a3c.envs import wrappers
from sb3_a3c.guard import zero_faulty
from sb3_a3c.observations import batch_of_one

#: What was seen, for each running statistic of a stack of wrappers, in the order of :func:`_statistics`.
News = list[RunningMeanStd]

_OPTIONS = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")


class _NewsKeeper(RunningMeanStd):
    """Running statistics that also keep what has come since the news were last taken."""

    def __init__(self, known: RunningMeanStd) -> None:
        self.mean, self.var, self.count = known.mean, known.var, known.count
        self.news = _nothing_like(known)

    def update_from_moments(self, batch_mean: npt.NDArray[Any], batch_var: npt.NDArray[Any], batch_count: float) -> None:
        super().update_from_moments(batch_mean, batch_var, batch_count)
        self.news.update_from_moments(batch_mean, batch_var, batch_count)

    def learn_from_others(self, news: RunningMeanStd) -> None:
        super().update_from_moments(news.mean, news.var, news.count)


class Sieve:
    """
    Lets the ``VecNormalize`` of a stack see finite numbers only: it would clip infinities, and keep a NaN in its statistics
    for ever. Where there is none, or a ``VecCheckNan`` outside of it wants to see all, nothing is done.

    :param env: a worker's environments
    """

    def __init__(self, env: VecEnv) -> None:
        nothing = np.zeros(env.num_envs, dtype=bool)
        self.faulty_obs = nothing  #: in the last step: which observations were not finite,
        self.faulty_ends = nothing  #: which that an episode ended with,
        self.faulty_rewards = nothing  #: and which rewards
        stack = wrappers(env)
        places = [i for i, wrapper in enumerate(stack) if isinstance(wrapper, VecNormalize)]
        self._venv: VecEnv | None = None
        if places and not any(isinstance(wrapper, VecCheckNan) for wrapper in stack[: places[-1]]):
            self._venv = stack[places[-1]].venv
            # on the instance: the stack stays the user's
            self._reset, self._step_wait = self._venv.reset, self._venv.step_wait
            self._venv.reset, self._venv.step_wait = self.reset, self.step_wait  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the environments their own methods back."""
        if self._venv is not None:
            del self._venv.reset, self._venv.step_wait

    def reset(self) -> VecEnvObs:
        """As :meth:`VecEnv.reset`."""
        obs = self._reset()
        self.faulty_obs = zero_faulty(obs)
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        """As :meth:`VecEnv.step_wait`."""
        obs, rewards, dones, infos = self._step_wait()
        self.faulty_obs, self.faulty_rewards = zero_faulty(obs), ~np.isfinite(rewards)
        self.faulty_ends = np.zeros_like(self.faulty_obs)
        for i in np.flatnonzero(dones):
            if (terminal_obs := infos[i].get("terminal_observation")) is not None:
                self.faulty_ends[i] = zero_faulty(batch_of_one(terminal_obs))[0]
        return obs, np.where(self.faulty_rewards, 0.0, rewards), dones, infos


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


def keep_news(env: VecEnv) -> None:
    """
    From now on let each ``VecNormalize`` keep what it sees for :func:`take_news`.

    :param env: a worker's environments
    """
    for normalizer in _normalizers(env):
        attributes = vars(normalizer)
        attributes["ret_rms"] = _NewsKeeper(normalizer.ret_rms)
        obs_rms = attributes.get("obs_rms")  # absent if observations are not normalised
        if isinstance(obs_rms, dict):
            attributes["obs_rms"] = {key: _NewsKeeper(rms) for key, rms in obs_rms.items()}
        elif obs_rms is not None:
            attributes["obs_rms"] = _NewsKeeper(obs_rms)


def take_news(env: VecEnv) -> News:
    """
    :param env: a worker's environments, after :func:`keep_news`
    :return: what they have seen since the last call
    """
    taken = []
    for statistic in _statistics(env):
        assert isinstance(statistic, _NewsKeeper)
        taken.append(statistic.news)
        statistic.news = _nothing_like(statistic)
    return taken


def merge_news(into: VecEnv | News, news: News) -> None:
    """
    :param into: environments (a worker does not count this as its own news), or news to add to
    :param news: what others have seen
    """
    for statistic, new in zip(into if isinstance(into, list) else _statistics(into), news, strict=True):
        if new.count == 0:
            continue
        if isinstance(statistic, _NewsKeeper):
            statistic.learn_from_others(new)
        else:
            statistic.combine(new)


def no_news(env: VecEnv) -> News:
    """
    :param env: environments
    :return: empty news of their statistics' shapes, to merge into
    """
    return [_nothing_like(statistic) for statistic in _statistics(env)]


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
