"""
Resume a run in its folder, also one that was killed: the newest model that loads, its ``VecNormalize`` statistics,
monitor files and evaluations. ``examples/train_atari.py`` shows how to use it.
"""

import json
import math
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_a3c.a3c import A3C
from sb3_a3c.save_util import atomic_write


def newest_model(folder: Path, with_statistics: bool = False) -> Path | None:
    """
    The model that was trained for the most timesteps, among those that load. Models that don't are printed.

    :param folder: folder of the run, with models in it or in folders below
    :param with_statistics: whether a model's statistics for ``VecNormalize`` must load, too
    :return: path of the model; None if there is none
    """
    for path in sorted(folder.glob("**/*.zip"), key=_timesteps, reverse=True):
        part = path
        try:
            A3C.load(path)
            if with_statistics:
                part = statistics_path(path)
                with part.open("rb") as file:
                    pickle.load(file)
        except Exception as error:  # of any type: damaged bytes can mean anything
            print(f"Skipping {path}: {part.name} can't be loaded ({error})")
        else:
            return path
    return None


def statistics_path(model: Path) -> Path:
    """
    :param model: path of a model
    :return: path of its statistics for ``VecNormalize``; for a checkpoint, where ``CheckpointCallback`` saves them
    """
    checkpoint = re.search(r"_\d+_steps$", model.stem)
    timesteps = checkpoint[0] if checkpoint else ""
    return model.with_name(f"{model.stem.removesuffix(timesteps)}_vecnormalize{timesteps}.pkl")


def save_with_statistics(model: A3C, path: Path) -> None:
    """
    Save a model and, if its environments have them, its statistics for ``VecNormalize``. If this is killed halfway, the
    model can be left without statistics, but not with those of another one.

    :param model: the model to save
    :param path: path of the model
    """
    statistics = statistics_path(path)
    statistics.unlink(missing_ok=True)
    model.save(path)
    if (normalize := model.get_vec_normalize_env()) is not None:
        atomic_write(statistics, lambda file: pickle.dump(normalize, file))


def carry_over_monitor_files(source: Path, target: Path) -> None:
    """
    Keep the monitor files of a run that is resumed: ``0.monitor.csv`` is renamed to ``<t_start>.0.monitor.csv``, or copied
    to that name in another folder; ``t_start`` is when its run started, in whole seconds. ``load_results`` then reads the
    episodes of all runs in order, including those that the old run played after the model was saved.

    :param source: folder of the run that left the model
    :param target: folder of the run that continues it; may be the same one
    """
    # Monitor(override_existing=False) would append to the old files. But it writes times since its own run started, and the
    # files say when the first run started: load_results would place the new episodes among the old ones.
    keep = Path.replace if source.samefile(target) else shutil.copyfile
    for path in sorted(source.glob(f"*{Monitor.EXT}")):
        with path.open() as file:
            header = file.readline()
        if header == "":  # the run was killed as it created the file
            continue
        prefix = f"{json.loads(header[1:])['t_start']:.0f}."
        keep(path, target / (prefix + path.name.removeprefix(prefix)))


def continue_evaluations(callback: EvalCallback, path: Path) -> None:
    """
    Continue a run's evaluations: its best mean return is the one to beat, and the old evaluations stay in the file.

    :param callback: the callback of the run that continues
    :param path: path of ``evaluations.npz``; if it is missing or damaged, evaluations start from scratch
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            old = {name: arrays[name].tolist() for name in arrays.files}
        timesteps, results, lengths = old["timesteps"], old["results"], old["ep_lengths"]
        best = max(float(np.mean(returns)) for returns in results)
    except FileNotFoundError:
        return
    except Exception as error:  # of any type, as above
        print(f"{path} is damaged ({error}): evaluations start from scratch")
        return
    callback.evaluations_timesteps, callback.evaluations_results, callback.evaluations_length = timesteps, results, lengths
    callback.evaluations_successes = old.get("successes", [])
    callback.best_mean_reward = best


def _timesteps(model: Path) -> float:
    """Timesteps that a model was trained for, without loading all of it; infinity if the file is damaged."""
    try:
        with zipfile.ZipFile(model) as archive:
            return float(json.loads(archive.read("data"))["num_timesteps"])
    except Exception:  # of any type, as above
        return math.inf  # so that newest_model tries it, and prints what is wrong
