"""What SB3's wrappers keep between steps: how it is set when episodes begin, and put together after training."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize, VecVideoRecorder
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

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
