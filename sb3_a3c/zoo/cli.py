"""
RL Zoo's commands, with A3C among the algorithms: ``python -m sb3_a3c.zoo train --algo a3c --env CartPole-v1``.

Options, folders and files are RL Zoo's. Only A3C's hyperparameters come from ``sb3_a3c/zoo/hyperparams/a3c.yml``, unless
``--conf-file`` is given. Scripts call :func:`register` first, then functions of ``rl_zoo3``.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

#: RL Zoo's commands that are functions, with their modules, and those that are scripts.
_FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
}
_SCRIPTS = ("record_video", "record_training", "benchmark")


def register() -> None:
    """
    Add A3C to RL Zoo in this process: to its algorithms, with a search space, and with
    :class:`~sb3_a3c.zoo.experiment_manager.A3CExperiment` for training. Call it before RL Zoo parses arguments.

    :raises ImportError: if RL Zoo is not installed
    """
    try:
        from rl_zoo3 import ALGOS, hyperparams_opt, train
        from rl_zoo3.exp_manager import ExperimentManager
    except ImportError as error:
        raise ImportError(
            f'RL Zoo can\'t be imported ({error}). Install it: pip install "sb3-a3c[zoo]", or rl-zoo3, requests and seaborn.'
        ) from error
    from sb3_a3c.a3c import A3C
    from sb3_a3c.zoo.experiment_manager import A3CExperiment
    from sb3_a3c.zoo.hyperparams_opt import convert_a3c_params, sample_a3c_params

    ALGOS["a3c"] = A3C
    hyperparams_opt.HYPERPARAMS_SAMPLER["a3c"] = sample_a3c_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["a3c"] = convert_a3c_params

    def experiment(args: argparse.Namespace, algo: str, *others: Any, **kwargs: Any) -> ExperimentManager:
        manager = A3CExperiment if algo == "a3c" else ExperimentManager
        return manager(args, algo, *others, **kwargs)

    vars(train)["ExperimentManager"] = experiment


def main() -> None:
    """Run the command named by the first argument; RL Zoo parses the others."""
    name = "sb3-a3c" if Path(sys.argv[0]).stem == "sb3-a3c" else "python -m sb3_a3c.zoo"
    parser = argparse.ArgumentParser(name, description=f"RL Zoo's commands, with A3C. Options: {name} COMMAND --help")
    parser.add_argument("command", choices=[*_FUNCTIONS, *_SCRIPTS])
    command = parser.parse_args(sys.argv[1:2]).command
    register()
    sys.argv = [f"{name} {command}", *sys.argv[2:]]
    sys.path.insert(0, os.getcwd())  # for the user's wrappers and environments, as `python -m` does
    multiprocessing.set_forkserver_preload(["rl_zoo3.train"])  # else each process of `--vec-env subproc` imports it
    with _subprocesses_know_a3c(), _plots_are_kept(command) if "plot" in command else contextlib.nullcontext():
        if command in _FUNCTIONS:
            getattr(importlib.import_module(_FUNCTIONS[command]), command)()
        else:
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


@contextlib.contextmanager
def _subprocesses_know_a3c() -> Iterator[None]:
    """RL Zoo's ``record_training`` and ``benchmark`` run other commands as subprocesses: run those of this module."""
    call: Callable[..., int] = subprocess.call

    def call_ours(arguments: Any, *others: Any, **kwargs: Any) -> int:
        match arguments:
            case ["python", "-m", "rl_zoo3.record_video", *options]:
                arguments = [sys.executable, "-m", "sb3_a3c.zoo", "record_video", *options]
            case ["python", "enjoy.py", *options]:
                arguments = [sys.executable, "-m", "sb3_a3c.zoo", "enjoy", *options]
        return call(arguments, *others, **kwargs)

    with mock.patch("subprocess.call", call_ours):
        yield


@contextlib.contextmanager
def _plots_are_kept(command: str) -> Iterator[None]:
    """RL Zoo shows plots in windows. Without a screen, save them as pictures instead."""
    from matplotlib import pyplot as plt

    def save() -> None:
        for number in plt.get_fignums():
            filename = f"{command}_{number}.png"
            plt.figure(number).savefig(filename)
            print(f"Saved {filename}, as there is no screen to show it on")

    # "agg" is what matplotlib falls back to where it finds no screen
    with mock.patch("matplotlib.pyplot.show", save) if plt.get_backend() == "agg" else contextlib.nullcontext():
        yield
