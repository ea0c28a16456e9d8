"""NaN and infinity in observations and rewards, caught before a policy or ``VecNormalize`` sees them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_a3c.envs.observations import Obs, batch_of_one, copied
from sb3_a3c.envs.wrapper_state import wrappers

_LARGEST = np.finfo(np.float32).max  # policies turn observations into single precision


class NonFiniteFilter:
    """
    Resets and steps a worker's environments, and returns observations in which every number is finite: where one was not
    finite in single precision, it is 0 and ``faulty_obs`` says so. A reward that is not finite is NaN.

    A ``VecNormalize`` would clip infinities and keep a NaN in its statistics for ever. So its input is filtered too, unless
    a ``VecCheckNan`` outside of it wants to see everything.

    :param env: a worker's environments
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self.faulty_obs = np.zeros(env.num_envs, dtype=bool)  #: whose observation of the last step was not finite
        self.faulty_ends = np.zeros(env.num_envs, dtype=bool)  #: whose episode ended there with one that was not finite
        stack = wrappers(env)
        places = [i for i, wrapper in enumerate(stack) if isinstance(wrapper, VecNormalize)]
        is_checked = places and any(isinstance(wrapper, VecCheckNan) for wrapper in stack[: places[-1]])
        self._normalized = _InputFilter(stack[places[-1]].venv) if places and not is_checked else None

    def reset(self) -> Obs:
        """:return: (n_envs, …), in memory of its own"""
        obs = copied(self.env.reset())
        self._set_faulty(obs)
        return obs

    def step(
        self, actions: npt.NDArray[Any]
    ) -> tuple[Obs, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """:return: as ``VecEnv.step``, the observations in memory of their own"""
        obs, rewards, dones, infos = self.env.step(actions)
        obs = copied(obs)
        self._set_faulty(obs)
        if self._normalized is not None:
            self.faulty_ends = self._normalized.faulty_ends
            rewards = np.where(self._normalized.faulty_rewards, np.float32(np.nan), rewards)
        return obs, rewards, dones, infos

    def _set_faulty(self, obs: Obs) -> None:
        self.faulty_obs = zero_non_finite(obs)
        if self._normalized is not None:
            self.faulty_obs |= self._normalized.faulty_obs

    def close(self) -> None:
        """Restore the environments' own methods. They stay open."""
        if self._normalized is not None:
            self._normalized.remove()


class _InputFilter:
    """
    Lets the ``VecNormalize`` around a ``VecEnv`` see zeros instead of numbers that are not finite.

    :param venv: the one inside it; ``reset`` and ``step_wait`` are replaced on this instance, so that the stack of wrappers
        stays the user's
    """

    def __init__(self, venv: VecEnv) -> None:
        self.faulty_obs = self.faulty_ends = self.faulty_rewards = np.zeros(venv.num_envs, dtype=bool)
        self._venv = venv
        self._reset, self._step_wait = venv.reset, venv.step_wait
        venv.reset, venv.step_wait = self.reset, self.step_wait  # type: ignore[method-assign]

    def remove(self) -> None:
        del self._venv.reset, self._venv.step_wait

    def reset(self) -> VecEnvObs:
        obs = self._reset()
        self.faulty_obs = zero_non_finite(obs)
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self._step_wait()
        self.faulty_obs, self.faulty_rewards = zero_non_finite(obs), ~np.isfinite(rewards)
        self.faulty_ends = np.zeros_like(self.faulty_obs)
        for i in np.flatnonzero(dones):
            if (terminal_obs := infos[i].get("terminal_observation")) is not None:
                self.faulty_ends[i] = zero_non_finite(batch_of_one(terminal_obs))[0]
        return obs, np.where(self.faulty_rewards, 0.0, rewards), dones, infos


def zero_non_finite(obs: Any) -> npt.NDArray[np.bool_]:
    """
    Put zeros where a number is not finite in single precision.

    :param obs: (n_envs, …), changed in place
    :return: (n_envs,), which environments had such a number
    """
    if isinstance(obs, dict):
        faulty: npt.NDArray[np.bool_] = np.logical_or.reduce([_zero_non_finite(part) for part in obs.values()])
        return faulty
    return _zero_non_finite(obs)


def _zero_non_finite(obs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if obs.dtype.kind == "f" and not (is_finite := np.abs(obs) <= _LARGEST).all():
        obs[~is_finite] = 0.0
        return np.asarray(~is_finite.reshape(len(obs), -1).all(axis=1))  # (n_envs, …) -> (n_envs,)
    return np.zeros(len(obs), dtype=bool)
