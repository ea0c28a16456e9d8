"""
A worker's share of the user's vectorised environment.

:func:`split_env` deals the environments of a ``VecEnv`` out; each :class:`PickledShare` travels to its worker, where
``open()`` makes a smaller ``VecEnv`` of the same wrappers from it.
"""

import functools
import inspect
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import is_wrapped, unwrap_wrapper
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations


@dataclass(frozen=True)
class PickledShare:
    """Environments on their way to a worker."""

    data: bytes
    seeds: tuple[int, ...]

    def open(self) -> VecEnv:
        """:return: the environments, which begin new episodes with the given seeds at their first reset"""
        return begin_episodes(pickle.loads(self.data), self.seeds)


@dataclass(frozen=True)
class LiveShare:
    """The user's own environments, for a worker in the user's own process."""

    env: VecEnv
    seeds: tuple[int, ...]

    def open(self) -> VecEnv:
        """:return: the environments, which begin new episodes with the given seeds at their first reset"""
        return begin_episodes(self.env, self.seeds)


def pending_seeds(env: VecEnv) -> list[int | None]:
    """:return: the seeds that the next reset would use, one for each environment; None where none was set"""
    return list(env.unwrapped._seeds)


def begin_episodes(env: VecEnv, seeds: Sequence[int]) -> VecEnv:
    """
    Let the next ``reset`` really begin new episodes, each with its own seed.

    :param env: at whatever point of its episodes
    :param seeds: one for each environment
    :return: the same ``env``
    """
    env.unwrapped._seeds = list(seeds)
    for single in getattr(env.unwrapped, "envs", []):
        lives = unwrap_wrapper(single, EpisodicLifeEnv)
        if isinstance(lives, EpisodicLifeEnv):
            # it would answer a reset in mid-game with a no-op step in the old game, and ignore the seed
            lives.was_real_done = True
        monitor = unwrap_wrapper(single, Monitor)
        if isinstance(monitor, Monitor):
            monitor.needs_reset = True  # also where it forbids resets in mid-episode
    return env


def deal(n_envs: int, n_workers: int) -> list[tuple[int, ...]]:
    """
    Deal environments out as evenly as they go.

    :param n_envs: number of environments
    :param n_workers: number of workers
    :return: for each worker the indices of its environments, in order
    """
    bounds = [n_envs * worker // n_workers for worker in range(n_workers + 1)]
    return [tuple(range(begin, end)) for begin, end in pairwise(bounds)]


def split_env(env: VecEnv, shares: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[PickledShare]:
    """
    :param env: ``DummyVecEnv``, also under ``VecFrameStack`` and ``VecTransposeImage``
    :param shares: for each worker the indices of its environments
    :param seeds: one for each environment
    :return: for each worker its environments
    :raises ValueError: if the environments can't be sent to other processes
    """
    return [PickledShare(_dumps(take_share(env, indices)), tuple(seeds[i] for i in indices)) for indices in shares]


def take_share(env: VecEnv, indices: Sequence[int]) -> VecEnv:
    """
    :param env: a vectorised environment
    :param indices: which of its environments
    :return: a smaller one of the same kind over the same environments
    :raises ValueError: if this kind can't be split
    """
    # by exact type: a subclass may do something that its share would not
    if type(env) is DummyVecEnv:
        return _dummy_vec_env([env.envs[i] for i in indices])
    if type(env) is VecTransposeImage:
        return VecTransposeImage(take_share(env.venv, indices), skip=env.skip)
    if type(env) is VecFrameStack:
        return VecFrameStack(take_share(env.venv, indices), env.stacked_obs.n_stack, _channels_order(env.stacked_obs))
    raise ValueError(
        f"A3C can't deal the environments of a {type(env).__name__} out to worker processes. Use a DummyVecEnv (under "
        "VecFrameStack and VecTransposeImage if you like), or n_workers=0 to train in this process."
    )


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
    data = _dumps(env)
    return _dummy_vec_env([env, *(pickle.loads(data) for _ in range(n_envs - 1))])


def continue_monitor_files(env: VecEnv) -> None:
    """
    Workers have appended to the monitor files that ``env`` holds open too: let it write behind their lines.

    :param env: the user's vectorised environment
    """
    for single in getattr(env.unwrapped, "envs", []):
        monitor = unwrap_wrapper(single, Monitor)
        if isinstance(monitor, Monitor) and monitor.results_writer is not None:
            monitor.results_writer.file_handler.seek(0, io.SEEK_END)


def _dumps(env: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        _EnvPickler(buffer).dump(env)
    except Exception as error:
        raise ValueError(
            f"The environments can't be sent to worker processes: pickling them raised {type(error).__name__}: {error}. "
            "Give them no open files, locks or windows before training, or use n_workers=0 to train in this process."
        ) from error
    return buffer.getvalue()


class _EnvPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, and the few things of Stable-Baselines3 that can't be pickled as they are."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            return _reopen, (obj.file_handler.name, tuple(obj.logger.fieldnames))
        if isinstance(obj, VecEnvWrapper):
            state = {key: value for key, value in obj.__dict__.items() if key != "class_attributes"}
            return _rebuild_wrapper, (type(obj), state)
        return super().reducer_override(obj)


def _reopen(filename: str, fieldnames: tuple[str, ...]) -> ResultsWriter:
    """The monitor file goes on where it is: making the environment anew would empty it."""
    return ResultsWriter(filename, extra_keys=fieldnames[3:], override_existing=False)


def _rebuild_wrapper(kind: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = kind.__new__(kind)
    wrapper.__dict__.update(state, class_attributes=dict(inspect.getmembers(kind)))
    return wrapper
