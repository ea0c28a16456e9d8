"""Rows of monitor files, written in the main process: environments on other hosts can't write to its files."""

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from sb3_a3c.envs.wrapper_state import wrappers


class MonitorRows:
    """Writes what a ``Monitor`` or ``VecMonitor`` without a file has put into ``info["episode"]`` to the user's own file."""

    def __init__(self, env: VecEnv) -> None:
        of_all = [wrapper.results_writer for wrapper in wrappers(env) if isinstance(wrapper, VecMonitor)]
        monitors = [unwrap_wrapper(single, Monitor) for single in getattr(env.unwrapped, "envs", [])]
        of_each = [[*of_all, monitor.results_writer if isinstance(monitor, Monitor) else None] for monitor in monitors]
        #: for each environment
        self._writers = [[writer for writer in writers if writer is not None] for writers in of_each]

    def write(self, env_indices: Sequence[int], infos: Sequence[Sequence[dict[str, Any]]]) -> None:
        """
        Write a row for each episode that has ended.

        :param infos: of the steps of these environments, (T, N)
        """
        for step in infos:
            for env_index, info in zip(env_indices, step, strict=True):
                if "episode" in info:
                    for writer in self._writers[env_index]:
                        _write(writer, info["episode"])


def _write(writer: ResultsWriter, episode: dict[str, Any]) -> None:
    writer.write_row({key: value for key, value in episode.items() if key in writer.logger.fieldnames})
