"""
A worker's share of the user's vectorised environment.

:func:`split_env` deals the environments of a ``VecEnv`` out; each :class:`EnvShare` travels to its worker, where
``open()`` makes a smaller ``VecEnv`` of the same wrappers from it. Environments of a ``DummyVecEnv`` travel as copies, of
a ``SubprocVecEnv`` only the ends of the pipes: worker i drives its slice of the running processes.
"""

import contextlib
import functools
import inspect
import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import is_wrapped, unwrap_wrapper
from stable_baselines3.common.monitor import Monitor, ResultsWriter
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

from sb3_a3c.subproc import lend

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

#: What wrappers count, and how the counts of several workers are put together in the user's wrapper.
_COUNTS: dict[type[VecEnvWrapper], str] = {VecMonitor: "episode_count", VecVideoRecorder: "step_id"}
WrapperCounts = dict[type[VecEnvWrapper], int]


@dataclass(frozen=True)
class FirstReset:
    """What environments get at their first reset: one seed and one dictionary of options each."""

    seeds: tuple[int, ...]
    options: tuple[dict[str, Any], ...]

    def of(self, indices: Sequence[int]) -> "FirstReset":
        """:return: that of some of the environments"""
        return FirstReset(tuple(self.seeds[i] for i in indices), tuple(self.options[i] for i in indices))


@dataclass(frozen=True)
class EnvShare:
    """Environments on their way to a worker."""

    data: bytes
    connections: tuple["Connection[Any, Any]", ...]  #: to the processes of a ``SubprocVecEnv``
    first_reset: FirstReset

    def open(self) -> VecEnv:
        """:return: the environments, which begin new episodes at their first reset"""
        env: VecEnv = _EnvUnpickler(io.BytesIO(self.data), self.connections).load()
        return begin_episodes(env, self.first_reset)


def pending_seeds(env: VecEnv) -> list[int | None]:
    """:return: the seeds that the next reset would use, one for each environment; None where none was set"""
    return list(env.unwrapped._seeds)


def pending_options(env: VecEnv) -> list[dict[str, Any]]:
    """:return: the options that the next reset would use, one dictionary for each environment"""
    return list(env.unwrapped._options)


def begin_episodes(env: VecEnv, first_reset: FirstReset) -> VecEnv:
    """
    Let the next ``reset`` really begin new episodes.

    :param env: at whatever point of its episodes
    :param first_reset: the environments' seeds and options
    :return: the same ``env``
    """
    base = env.unwrapped
    base._seeds = list(first_reset.seeds)
    base._options = list(first_reset.options)
    # EpisodicLifeEnv would answer a reset in mid-game with a no-op step in the old game, and ignore the seed; Monitor may
    # forbid resets in mid-episode
    for kind, attribute in ((EpisodicLifeEnv, "was_real_done"), (Monitor, "needs_reset")):
        _set_in_wrapper(base, kind, attribute, True)
    return env


def _set_in_wrapper(base: VecEnv, kind: type[gym.Wrapper[Any, Any, Any, Any]], attribute: str, value: Any) -> None:
    """Wherever an environment has a wrapper of that kind, set an attribute of it."""
    if isinstance(base, DummyVecEnv):
        for single in base.envs:
            wrapper = unwrap_wrapper(single, kind)
            if wrapper is not None:
                setattr(wrapper, attribute, value)
        return
    with contextlib.suppress(AttributeError, NotImplementedError):  # VecEnv classes of others need not know such calls
        indices = [i for i, wrapped in enumerate(base.env_is_wrapped(kind)) if wrapped]
        base.env_method("set_wrapper_attr", attribute, value, indices=indices)


@contextlib.contextmanager
def unobserved(env: VecEnv) -> Iterator[None]:
    """
    A reset inside this block is not part of the training: no statistics are taken from it, and no video.

    :param env: the user's vectorised environment
    """
    with contextlib.ExitStack() as stack:
        for wrapper in wrappers(env):
            if isinstance(wrapper, VecNormalize):
                stack.callback(setattr, wrapper, "training", wrapper.training)
                wrapper.training = False
            elif isinstance(wrapper, VecVideoRecorder):
                stack.callback(setattr, wrapper, "record_video_trigger", wrapper.record_video_trigger)
                wrapper.record_video_trigger = lambda _: False
        yield


def finish_videos(env: VecEnv) -> None:
    """
    Save what recorders have recorded of the user's environments so far: the workers' will go on elsewhere.

    :param env: the user's vectorised environment
    """
    for wrapper in wrappers(env):
        if isinstance(wrapper, VecVideoRecorder) and wrapper.recording:
            wrapper._stop_recording()


def deal(n_envs: int, n_workers: int) -> list[tuple[int, ...]]:
    """
    Deal environments out as evenly as they go.

    :param n_envs: number of environments
    :param n_workers: number of workers
    :return: for each worker the indices of its environments, in order
    """
    bounds = [n_envs * worker // n_workers for worker in range(n_workers + 1)]
    return [tuple(range(begin, end)) for begin, end in pairwise(bounds)]


def wrappers(env: VecEnv) -> list[VecEnvWrapper]:
    """
    :param env: a vectorised environment
    :return: its wrappers, from the outermost
    """
    found = []
    while isinstance(env, VecEnvWrapper):
        found.append(env)
        env = env.venv
    return found


def split_env(env: VecEnv, shares: Sequence[Sequence[int]], first_reset: FirstReset) -> list[EnvShare]:
    """
    :param env: ``DummyVecEnv`` or ``SubprocVecEnv``, also under SB3's wrappers
    :param shares: for each worker the indices of its environments
    :param first_reset: of all environments
    :return: for each worker its environments
    :raises ValueError: if the environments can't be sent to other processes
    """
    return [EnvShare(*_dumps(take_share(env, indices)), first_reset.of(indices)) for indices in shares]


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
    share: Any = _rebuild_wrapper(type(wrapper), vars(wrapper))
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
    data, _ = _dumps(env)
    return _dummy_vec_env([env, *(pickle.loads(data) for _ in range(n_envs - 1))])


def wrapper_counts(env: VecEnv) -> WrapperCounts:
    """
    :param env: a worker's environments, or the user's
    :return: what their wrappers have counted
    """
    return {type(wrapper): getattr(wrapper, _COUNTS[type(wrapper)]) for wrapper in wrappers(env) if type(wrapper) in _COUNTS}


def continue_from(env: VecEnv, workers_counts: Sequence[WrapperCounts]) -> None:
    """
    Let the user's wrappers go on where the workers' have ended: with their counts, and behind the lines that they have
    appended to monitor files.

    :param env: the user's vectorised environment
    :param workers_counts: of each worker's environments at their end
    """
    for wrapper in wrappers(env):
        if name := _COUNTS.get(type(wrapper)):
            before = getattr(wrapper, name)
            new = sum(ended[type(wrapper)] - before for ended in workers_counts if type(wrapper) in ended)
            setattr(wrapper, name, before + new)
    monitors = [unwrap_wrapper(single, Monitor) for single in getattr(env.unwrapped, "envs", [])]
    for monitor in [*monitors, *wrappers(env)]:
        writer = getattr(monitor, "results_writer", None) if isinstance(monitor, Monitor | VecMonitor) else None
        if writer is not None:
            writer.file_handler.seek(0, io.SEEK_END)


def _dumps(env: Any) -> tuple[bytes, tuple["Connection[Any, Any]", ...]]:
    buffer = io.BytesIO()
    pickler = _EnvPickler(buffer)
    try:
        pickler.dump(env)
    except Exception as error:
        raise ValueError(
            f"The environments can't be sent to worker processes: pickling them raised {type(error).__name__}: {error}. "
            "Give them no open files, locks or windows before training, or use n_workers=0 to train in this process."
        ) from error
    return buffer.getvalue(), tuple(pickler.connections)


class _EnvPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, and the few things of Stable-Baselines3 that can't be pickled as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.connections: list[Connection[Any, Any]] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Connections can only travel at the start of a process, by multiprocessing's own pickler."""
        if not isinstance(obj, Connection):
            return None
        self.connections.append(obj)
        return len(self.connections) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            return _reopen, (obj.file_handler.name, tuple(obj.logger.fieldnames))
        if isinstance(obj, VecEnvWrapper):
            state = {key: value for key, value in obj.__dict__.items() if key != "class_attributes"}
            return _rebuild_wrapper, (type(obj), state)
        return super().reducer_override(obj)


class _EnvUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, connections: Sequence["Connection[Any, Any]"]) -> None:
        super().__init__(file)
        self.connections = connections

    def persistent_load(self, pid: int) -> "Connection[Any, Any]":
        return self.connections[pid]


def _reopen(filename: str, fieldnames: tuple[str, ...]) -> ResultsWriter:
    """The monitor file goes on where it is: making the environment anew would empty it."""
    return ResultsWriter(filename, extra_keys=fieldnames[3:], override_existing=False)


def _rebuild_wrapper(kind: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = kind.__new__(kind)
    vars(wrapper).update(state, class_attributes=dict(inspect.getmembers(kind)))
    return wrapper
