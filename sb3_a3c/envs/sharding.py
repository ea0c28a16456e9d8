"""
A worker's share of the user's vectorised environment.

:func:`split_env` makes an :class:`EnvShare` for each worker, where ``open()`` turns it into a smaller ``VecEnv`` under the
same wrappers. The environments of a ``DummyVecEnv`` are copied. Those of a ``SubprocVecEnv`` stay in their processes, and
only the pipes to these are sent.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_a3c.envs.pickling import dump_env, load_env
from sb3_a3c.envs.subproc import lend
from sb3_a3c.envs.wrapper_state import FirstReset, begin_episodes

#: Wrappers that can be split. By exact type: a subclass may keep state that a share would lack.
_WRAPPERS = (VecCheckNan, VecExtractDictObs, VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage, VecVideoRecorder)


@dataclass
class EnvShare:
    """Environments on their way to a worker."""

    data: bytes  #: empty once they are opened: environments may be large
    connections: tuple["Connection[Any, Any]", ...]  #: to the processes of a ``SubprocVecEnv``
    first_reset: FirstReset

    def open(self) -> VecEnv:
        """Unpickle the environments, which begin new episodes at their first reset."""
        data, self.data = self.data, b""
        return begin_episodes(load_env(data, self.connections), self.first_reset)


def deal(n_envs: int, n_workers: int) -> list[tuple[int, ...]]:
    """Distribute environments over workers as evenly as possible. Return each worker's indices, in order."""
    bounds = [n_envs * worker // n_workers for worker in range(n_workers + 1)]
    return [tuple(range(begin, end)) for begin, end in pairwise(bounds)]


def split_env(
    env: VecEnv, shares: Sequence[Sequence[int]], first_reset: FirstReset, keep_writers: bool = True
) -> list[EnvShare]:
    """
    Make the shares that are sent to workers; ``shares`` has for each worker the indices of its environments.

    :param keep_writers: whether the shares write monitor files. On another host they can't: :mod:`sb3_a3c.envs.monitor_rows`
    :raises ValueError: if the environments can't be sent to other processes
    """
    return [EnvShare(*dump_env(take_share(env, indices), keep_writers), first_reset.of(indices)) for indices in shares]


def take_share(env: VecEnv, indices: Sequence[int]) -> VecEnv:
    """
    Return a smaller ``VecEnv`` of the same kind that holds the same environment objects, not copies.

    :raises ValueError: if this kind can't be split
    """
    if type(env) is DummyVecEnv:
        return _dummy_vec_env([env.envs[i] for i in indices])
    if type(env) is SubprocVecEnv:
        return lend(env, indices)
    if isinstance(env, VecEnvWrapper) and type(env) in _WRAPPERS:
        return _take_wrapper(env, indices)
    kinds = ", ".join(kind.__name__ for kind in (DummyVecEnv, SubprocVecEnv, *_WRAPPERS))
    raise ValueError(
        f"A3C can't deal the environments of a {type(env).__name__} out to worker processes; it can with {kinds}. "
        "Use these, or n_workers=0 to train in this process."
    )


def _take_wrapper(wrapper: VecEnvWrapper, indices: Sequence[int]) -> VecEnv:
    """Return the same wrapper around a share. Its arrays of one entry per environment get their size when it is reset."""
    venv = take_share(wrapper.venv, indices)
    if isinstance(wrapper, VecVideoRecorder) and 0 not in indices:
        return venv  # one worker records
    share: Any = object.__new__(type(wrapper))  # VecEnvWrapper.__getattr__ makes copy.copy recurse without end
    vars(share).update(vars(wrapper), venv=venv, num_envs=len(indices))
    if isinstance(wrapper, VecFrameStack):
        stacked = wrapper.stacked_obs
        share.stacked_obs = StackedObservations(
            len(indices), stacked.n_stack, stacked.observation_space, _channels_order(stacked)
        )
    elif isinstance(wrapper, VecVideoRecorder):
        share.env, share.recording, share.recorded_frames = venv, False, []
    return share  # type: ignore[no-any-return]


def _channels_order(stacked: StackedObservations[Any]) -> Any:
    if isinstance(stacked.observation_space, spaces.Dict):
        return {key: _channels_order(part) for key, part in stacked.sub_stacked_observations.items()}
    return "first" if stacked.channels_first else "last"


def _dummy_vec_env(envs: Sequence[Any]) -> DummyVecEnv:
    return DummyVecEnv([functools.partial(lambda env: env, env) for env in envs])


def clone_env(env: gym.Env[Any, Any], n_envs: int) -> VecEnv:
    """
    Make a ``DummyVecEnv`` of a single environment and ``n_envs - 1`` copies, each under a ``Monitor``.

    :raises ValueError: if the environment can't be pickled
    """
    if not is_wrapped(env, Monitor):
        env = Monitor(env)
    data, _ = dump_env(env)
    return _dummy_vec_env([env, *(load_env(data) for _ in range(n_envs - 1))])
