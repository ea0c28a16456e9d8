"""Replaces NaN and infinity in observations before a policy or ``VecNormalize`` sees them, and reports where they were."""

from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_a3c.envs.observations import Obs, batch_of_one, copied
from sb3_a3c.envs.wrapper_state import wrappers

_LARGEST = np.finfo(np.float32).max  # policies convert observations to single precision


class NonFiniteFilter:
    """
    Resets and steps a worker's environments. Where a number of an observation is not finite in single precision, it is 0.

    ``VecNormalize`` would keep a NaN in its statistics for ever, and clip an infinity. So the input of the innermost one is
    filtered too, unless a ``VecCheckNan`` outside of it has to see everything.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self.faulty_obs = np.zeros(env.num_envs, dtype=bool)  #: (n_envs,), the last observation was not finite
        self.faulty_ends = np.zeros(env.num_envs, dtype=bool)  #: (n_envs,), the last step's terminal observation was not
        stack = wrappers(env)
        places = [i for i, wrapper in enumerate(stack) if isinstance(wrapper, VecNormalize)]
        is_checked = places and any(isinstance(wrapper, VecCheckNan) for wrapper in stack[: places[-1]])
        self._input = _InputFilter(stack[places[-1]].venv) if places and not is_checked else None

    def reset(self) -> Obs:
        """As ``VecEnv.reset``, but returns a copy."""
        return self._filtered(self.env.reset())

    def step(
        self, actions: npt.NDArray[Any]
    ) -> tuple[Obs, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """As ``VecEnv.step``, but returns a copy of the observations. A reward that was not finite is not finite here."""
        obs, rewards, dones, infos = self.env.step(actions)
        obs = self._filtered(obs)
        if self._input is not None:
            self.faulty_ends = self._input.faulty_ends
            rewards = np.where(self._input.faulty_rewards, np.float32(np.nan), rewards)
        return obs, rewards, dones, infos

    def close(self) -> None:
        """Remove the filter from the environments, which stay open."""
        if self._input is not None:
            self._input.remove()

    def _filtered(self, obs: VecEnvObs) -> Obs:
        obs = copied(obs)
        self.faulty_obs = zero_non_finite(obs)
        if self._input is not None:
            self.faulty_obs |= self._input.faulty_obs
        return obs


class _InputFilter:
    """
    Replaces numbers that are not finite by 0 in what a ``VecNormalize`` gets from the ``VecEnv`` inside it. ``reset`` and
    ``step_wait`` of that instance are replaced, because another wrapper around it would change the user's stack.
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
    """Replace by 0, in place, numbers that are not finite in single precision. Return (n_envs,): where any were."""
    if isinstance(obs, dict):
        faulty: npt.NDArray[np.bool_] = np.logical_or.reduce([zero_non_finite(part) for part in obs.values()])
        return faulty
    if obs.dtype.kind == "f" and not (is_finite := np.abs(obs) <= _LARGEST).all():
        obs[~is_finite] = 0.0
        return np.asarray(~is_finite.reshape(len(obs), -1).all(axis=1))  # (n_envs, …) -> (n_envs,)
    return np.zeros(len(obs), dtype=bool)
