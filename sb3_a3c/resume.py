"""
Resume a run that was interrupted or killed: find the newest model that loads, and continue its statistics for
``VecNormalize``, monitor files and evaluations. ``examples/train_atari.py`` shows how to use it.
"""

import io
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c.a3c import A3C
from sb3_a3c.save_util import check_archive, read_statistics


def newest_model(folder: Path, with_statistics: bool = False, model_class: type[BaseAlgorithm] = A3C) -> Path | None:
    """
    Find the model with the most timesteps among those that load. Print a line for each model that does not load.

    :param folder: folder of the run, with models in it or in folders below
    :param with_statistics: whether to skip models without statistics for ``VecNormalize``
    :param model_class: the class that loads them
    :return: path of the model; None if there is none
    """
    for path in sorted(folder.glob("**/*.zip"), key=_timesteps, reverse=True):
        try:
            model_class.load(path)
            if with_statistics and not has_statistics(path):
                raise _no_statistics(path)
        except Exception as error:  # of any type: damaged bytes can mean anything
            print(f"Skipping {path}: it can't be used ({error})")
        else:
            return path
    return None


def has_statistics(model: str | Path | io.BufferedIOBase) -> bool:
    """
    :param model: path of a model, or the file opened
    :return: whether the model was saved with a ``VecNormalize``
    :raises ValueError: if the file is damaged, or is not a model
    """
    return _statistics(model) is not None


def load_statistics(model: str | Path | io.BufferedIOBase, env: VecEnv) -> VecNormalize:
    """
    Load the ``VecNormalize`` that was saved with a model, as ``VecNormalize.load`` does from a file.

    :param model: path of a model, or the file opened
    :param env: environments to wrap in the ``VecNormalize``
    :return: the wrapped environments
    :raises ValueError: if the model has no ``VecNormalize``, or the file is damaged, or is not a model
    """
    if (normalize := _statistics(model)) is None:
        raise _no_statistics(model)
    normalize.set_venv(env)
    return normalize


def _statistics(model: str | Path | io.BufferedIOBase) -> VecNormalize | None:
    check_archive(model)
    statistics: VecNormalize | None = read_statistics(model)
    return statistics


def _no_statistics(model: str | Path | io.BufferedIOBase) -> ValueError:
    return ValueError(
        f"{model} has no statistics for VecNormalize: the environments of the model that was saved had none. Use the "
        "environments without it, or load statistics from a file of their own: VecNormalize.load(path, env)."
    )


def carry_over_monitor_files(source: Path, target: Path) -> None:
    """
    Keep the monitor files of a run that is resumed: rename ``0.monitor.csv`` to ``<t_start>.0.monitor.csv``, or copy it to
    that name in another folder; ``t_start`` is when the run started, in whole seconds. ``load_results`` then reads the
    episodes of all runs in order, including episodes after the model was saved.

    :param source: folder of the run that saved the model
    :param target: folder of the run that continues it; may be the same folder
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
