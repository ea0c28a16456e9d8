"""
A worker's share of the user's vectorised environment.

:func:`split_env` deals the environments of a ``VecEnv`` out; each :class:`EnvShare` travels to its worker, where
``open()`` makes a smaller ``VecEnv`` of the same wrappers from it. Environments of a ``DummyVecEnv`` travel as copies, of
a ``SubprocVecEnv`` only the ends of the pipes: worker i drives its slice of the running processes.
"""

import functools
import io
import pickle
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

from sb3_a3c.envs.pickling import EnvUnpickler, dump_env, rebuild_wrapper
from sb3_a3c.envs.subproc import lend
from sb3_a3c.envs.wrapper_state import FirstReset, begin_episodes

#: Wrappers that can be split. By exact type: a subclass may do something that its share would not.
_WRAPPERS = (
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)


@dataclass(frozen=True)
class EnvShare:
    """Environments on their way to a worker."""

    data: bytes
    connections: tuple["Connection[Any, Any]", ...]  #: to the processes of a ``SubprocVecEnv``
    first_reset: FirstReset

    def open(self) -> VecEnv:
        """:return: the environments, which begin new episodes at their first reset"""
        env: VecEnv = EnvUnpickler(io.BytesIO(self.data), self.connections).load()
        return begin_episodes(env, self.first_reset)


def deal(n_envs: int, n_workers: int) -> list[tuple[int, ...]]:
    """
    Deal environments out as evenly as they go.

    :param n_envs: number of environments
    :param n_workers: number of workers
    :return: for each worker the indices of its environments, in order
    """
    bounds = [n_envs * worker // n_workers for worker in range(n_workers + 1)]
    return [tuple(range(begin, end)) for begin, end in pairwise(bounds)]


def split_env(env: VecEnv, shares: Sequence[Sequence[int]], first_reset: FirstReset) -> list[EnvShare]:
    """
    :param env: ``DummyVecEnv`` or ``SubprocVecEnv``, also under SB3's wrappers
    :param shares: for each worker the indices of its environments
    :param first_reset: of all environments
    :return: for each worker its environments
    :raises ValueError: if the environments can't be sent to other processes
    """
    return [EnvShare(*dump_env(take_share(env, indices)), first_reset.of(indices)) for indices in shares]


def take_share(env: VecEnv, indices: Sequence[int]) -> VecEnv:
    """
    :param env: a vectorised environment
    :param indices: which of its environments
    :return: a smaller one of the same kind over the same environments, to be sent to a worker
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
    """The same wrapper around a share. What it keeps for each environment, it makes anew when it is reset."""
    venv = take_share(wrapper.venv, indices)
    if isinstance(wrapper, VecVideoRecorder) and 0 not in indices:
        return venv  # recorded once, not by every worker
    share: Any = rebuild_wrapper(type(wrapper), vars(wrapper))
    share.venv, share.num_envs = venv, len(indices)
    share.reset_infos, share._seeds, share._options = venv.reset_infos, venv._seeds, venv._options
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
    :param env: a single environment
    :param n_envs: how many to make of it
    :return: the environment itself and ``n_envs - 1`` copies, each under a ``Monitor``
    :raises ValueError: if it can't be copied
    """
    if not is_wrapped(env, Monitor):
        env = Monitor(env)
    data, _ = dump_env(env)
    return _dummy_vec_env([env, *(pickle.loads(data) for _ in range(n_envs - 1))])
