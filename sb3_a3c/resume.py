"""What a run that goes on in its folder needs of what it left there, also if it was killed: only what is whole."""

import csv
import io
import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_a3c.a3c import A3C
from sb3_a3c.save_util import write_whole


def newest_model(folder: Path, with_statistics: bool = False) -> Path | None:
    """
    The model that was trained for most timesteps, of those whose parts all load; the others on the way to it are printed.

    :param folder: of the run, with models in it and in folders below
    :param with_statistics: whether statistics for ``VecNormalize`` are a part of each model
    :return: its path; None if there is no such model
    """
    for path in sorted(folder.glob("**/*.zip"), key=_timesteps, reverse=True):
        try:
            A3C.load(path)
            if with_statistics:
                _check_statistics(statistics_path(path))
        except (ValueError, OSError) as error:
            print(f"Passed over: {error}")
        except Exception as error:  # of many kinds, if what is in the file does not fit together
            print(f"Passed over: {path} can't be loaded ({error}).")
        else:
            return path
    return None


def statistics_path(model: Path) -> Path:
    """
    :param model: path of a model
    :return: where its statistics for ``VecNormalize`` are: for a checkpoint, where ``CheckpointCallback`` saves them
    """
    checkpoint = re.search(r"_\d+_steps$", model.stem)
    timesteps = checkpoint[0] if checkpoint else ""
    return model.with_name(f"{model.stem.removesuffix(timesteps)}_vecnormalize{timesteps}.pkl")


def save_with_statistics(model: A3C, path: Path) -> None:
    """
    Save a model and, if its environments have them, statistics for ``VecNormalize``. Whenever this is killed, no model is
    left with the statistics of another one; if it raises, the old ones are there.

    :param model: an initialized RL model
    :param path: where to
    """
    statistics = statistics_path(path)
    old = statistics.with_name(f"{statistics.name}.old")
    if statistics.exists():
        statistics.replace(old)
    try:
        model.save(path)
    except BaseException:
        if old.exists():
            old.replace(statistics)
        raise
    if (normalize := model.get_vec_normalize_env()) is not None:
        write_whole(statistics, lambda file: pickle.dump(normalize, file))
    old.unlink(missing_ok=True)


def carry_over_monitor_files(source: Path, target: Path, until: float = math.inf) -> None:
    """
    Copy the episodes before a model was saved, so that plots of the continued run show all of it. The copies' names begin
    with the second in which their run began; next to them, the files of the new run begin anew. (Monitor itself can append
    to a file, but then counts its times from the beginning of the first run.)

    :param source: folder of the run that left the model
    :param target: folder of the run that goes on with it. If that is the same one, there are only copies afterwards
    :param until: when the model was saved (seconds since 1970): later episodes are no part of it
    """
    originals = []
    for path in sorted(source.glob(f"*{Monitor.EXT}")):
        episodes = _episodes(path, until)
        began = "" if episodes is None else f"{episodes.t_start:.0f}."
        is_copy = episodes is not None and path.name.startswith(began)
        if not is_copy:
            originals.append(path)
        if episodes is not None:
            write_whole(target / (path.name if is_copy else began + path.name), episodes.write)
    if target.resolve() == source.resolve():
        for path in originals:  # only now: whenever this is killed, it can be done again
            path.unlink()


def continue_evaluations(callback: EvalCallback, path: Path) -> None:
    """
    Let the best score so far be the one to beat, and keep the old evaluations in the file.

    :param callback: that goes on with the evaluations
    :param path: of ``evaluations.npz``; if that is not there, or damaged, evaluations begin anew
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            old = {name: arrays[name].tolist() for name in arrays.files}
        timesteps, results, lengths = old["timesteps"], old["results"], old["ep_lengths"]
        best = max(float(np.mean(returns)) for returns in results)
    except FileNotFoundError:
        return
    except Exception as error:  # of many kinds: whatever the bytes in a wrong place happen to mean
        print(f"{path} is damaged ({error}): evaluations begin anew.")
        return
    callback.evaluations_timesteps, callback.evaluations_results, callback.evaluations_length = timesteps, results, lengths
    callback.evaluations_successes = old.get("successes", [])
    callback.best_mean_reward = best


def _timesteps(model: Path) -> float:
    """Without loading all of it. If it is damaged: more than any other, so that loading it says why it is passed over."""
    try:
        with zipfile.ZipFile(model) as archive:
            return float(json.loads(archive.read("data"))["num_timesteps"])
    except Exception:  # of many kinds, as above
        return math.inf


def _check_statistics(path: Path) -> None:
    try:
        with path.open("rb") as file:
            statistics = pickle.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path}, a model's statistics for VecNormalize, is missing.") from error
    except Exception as error:  # of many kinds, as above
        raise ValueError(f"{path} is not the file of statistics for VecNormalize, or it is damaged ({error}).") from error
    if not isinstance(statistics, VecNormalize):
        raise ValueError(f"{path} has no statistics for VecNormalize, but a {type(statistics).__name__}.")


class _Episodes(NamedTuple):
    """Of a monitor file."""

    t_start: float  #: when its run began (seconds since 1970)
    lines: list[str]  #: header and columns too

    def write(self, file: io.BytesIO) -> None:
        file.write("".join(self.lines).encode())


def _episodes(path: Path, until: float) -> _Episodes | None:
    """The episodes that had ended by then. None: the file has not even got its columns."""
    with path.open(newline="") as file:
        lines = [line for line in file if line.endswith("\n")]  # of a killed run, the last one may be cut off
    if len(lines) < 2:
        return None
    header, columns, *rows = lines
    t_start = json.loads(header[1:])["t_start"]
    ends = [t_start + float(row[2]) for row in csv.reader(rows)]
    return _Episodes(t_start, [header, columns, *(row for row, end in zip(rows, ends, strict=True) if end <= until)])
