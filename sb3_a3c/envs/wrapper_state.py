"""What SB3's wrappers keep between steps: set when episodes begin, and brought back from the workers after training."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize, VecVideoRecorder
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

#: Counters of wrappers, by class; those of several workers are added up in the user's wrapper.
_COUNTERS: dict[type[VecEnvWrapper], str] = {VecMonitor: "episode_count", VecVideoRecorder: "step_id"}
WrapperCounts = dict[type[VecEnvWrapper], int]


def wrappers(env: VecEnv) -> list[VecEnvWrapper]:
    """Return the wrappers around a vectorised environment, the outermost first."""
    found = []
    while isinstance(env, VecEnvWrapper):
        found.append(env)
        env = env.venv
    return found


@dataclass(frozen=True)
class FirstReset:
    """Seed and options of each environment for its first reset."""

    seeds: tuple[int, ...]
    options: tuple[dict[str, Any], ...]

    def of(self, indices: Sequence[int]) -> "FirstReset":
        """Return those of some of the environments."""
        return FirstReset(tuple(self.seeds[i] for i in indices), tuple(self.options[i] for i in indices))


def pending_seeds(env: VecEnv) -> list[int | None]:
    """Return the seed that each environment's next reset will use; None where none was set."""
    return list(env.unwrapped._seeds)


def pending_options(env: VecEnv) -> list[dict[str, Any]]:
    """Return the options that each environment's next reset will use."""
    return list(env.unwrapped._options)


def begin_episodes(env: VecEnv, first_reset: FirstReset) -> VecEnv:
    """Make the next ``reset`` of ``env`` begin new episodes, wherever it is in the present ones, and return ``env``."""
    base = env.unwrapped
    base._seeds, base._options = list(first_reset.seeds), list(first_reset.options)
    # In mid-episode, EpisodicLifeEnv would ignore the seed and continue the game, and a Monitor may forbid the reset
    for kind, attribute in ((EpisodicLifeEnv, "was_real_done"), (Monitor, "needs_reset")):
        with contextlib.suppress(AttributeError, NotImplementedError):  # VecEnv classes of others may lack these calls
            indices = [i for i, is_wrapped in enumerate(base.env_is_wrapped(kind)) if is_wrapped]
            base.env_method("set_wrapper_attr", attribute, True, indices=indices)
    return env


@contextlib.contextmanager
def next_reset_skipped(env: VecEnv) -> Iterator[None]:
    """Let the next call of ``env.reset`` in this context do nothing, and return None."""
    attributes = vars(env)
    own = {"reset": attributes["reset"]} if "reset" in attributes else {}
    never_reset = [each for each in wrappers(env) if isinstance(each, VecNormalize) and "old_obs" not in vars(each)]

    def restore() -> None:
        attributes.pop("reset", None)
        attributes.update(own)

    attributes["reset"] = restore
    for normalizer in never_reset:
        vars(normalizer)["old_obs"] = None  # for SB3, which asks for it behind a reset
    try:
        yield
    finally:
        restore()
        for normalizer in never_reset:
            vars(normalizer).pop("old_obs", None)


def finish_videos(env: VecEnv) -> None:
    """Save videos that were begun before training: the workers' environments do not continue them."""
    for wrapper in wrappers(env):
        if isinstance(wrapper, VecVideoRecorder) and wrapper.recording:
            wrapper._stop_recording()


def wrapper_counts(env: VecEnv) -> WrapperCounts:
    """Return the counters of the wrappers around ``env``."""
    return {type(wrapper): getattr(wrapper, name) for wrapper in wrappers(env) if (name := _COUNTERS.get(type(wrapper)))}


def continue_from(env: VecEnv, workers_counts: Sequence[WrapperCounts]) -> None:
    """Let the user's wrappers continue where each worker's wrappers ended."""
    for wrapper in wrappers(env):
        if name := _COUNTERS.get(type(wrapper)):
            before = getattr(wrapper, name)
            added = [counts[type(wrapper)] - before for counts in workers_counts if type(wrapper) in counts]
            setattr(wrapper, name, before + sum(added))
    # the workers have appended to monitor files: write behind their lines
    monitors = [unwrap_wrapper(single, Monitor) for single in getattr(env.unwrapped, "envs", [])]
    for monitor in [*monitors, *wrappers(env)]:
        writer = monitor.results_writer if isinstance(monitor, Monitor | VecMonitor) else None
        if writer is not None:
            writer.file_handler.seek(0, io.SEEK_END)
