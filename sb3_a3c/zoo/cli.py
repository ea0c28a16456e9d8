"""
The command ``sb3-a3c`` (or ``python -m sb3_a3c.zoo``): RL Zoo's commands, with A3C among the algorithms, and the doctor.

Options, folders and files are RL Zoo's. The defaults are A3C, the folder ``logs``, into which ``train`` writes, and
hyperparameters from ``sb3_a3c/zoo/hyperparams/a3c.yml``. ``benchmark`` downloads models only with ``--hub``. Scripts call
:func:`register` first, then functions of ``rl_zoo3``.
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

from sb3_a3c.doctor import cli as doctor

#: RL Zoo's commands that are functions, with their modules, and those that are scripts.
_FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
}
_SCRIPTS = ("record_video", "record_training", "benchmark")

#: Options that are put before the user's, which override them. (RL Zoo's defaults: PPO, and models of the Hugging Face hub.)
_PLAYED = ("--algo", "a3c", "--folder", "logs")
_DEFAULTS: dict[str, tuple[str, ...]] = {
    "train": ("--algo", "a3c"),
    "enjoy": _PLAYED,
    "record_video": _PLAYED,
    "record_training": _PLAYED,
    "plot_train": ("--algo", "a3c", "--exp-folder", "logs"),
    "all_plots": ("--algos", "a3c", "--exp-folders", "logs"),
    "benchmark": ("--log-dir", "logs", "--no-hub"),
}


def register() -> None:
    """
    Add A3C to RL Zoo in this process: to its algorithms, with a search space and hyperparameters. For training, the other
    algorithms get :class:`~sb3_a3c.zoo.experiment_manager.Experiment`, too. Call it before RL Zoo parses arguments.

    :raises ImportError: if RL Zoo is not installed
    """
    try:
        from rl_zoo3 import ALGOS, hyperparams_opt, train
    except ImportError as error:
        raise ImportError(
            f"RL Zoo can't be imported ({error}). Install what it needs, in the checkout of sb3_a3c: "
            'pip install -c constraints.txt -e ".[zoo]"'
        ) from error
    from sb3_a3c.a3c import A3C
    from sb3_a3c.zoo.experiment_manager import A3CExperiment, Experiment
    from sb3_a3c.zoo.hyperparams_opt import convert_a3c_params, sample_a3c_params

    ALGOS["a3c"] = A3C
    hyperparams_opt.HYPERPARAMS_SAMPLER["a3c"] = sample_a3c_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["a3c"] = convert_a3c_params

    def experiment(args: argparse.Namespace, algo: str, *others: Any, **kwargs: Any) -> Experiment:
        manager = A3CExperiment if algo == "a3c" else Experiment
        return manager(args, algo, *others, **kwargs)

    vars(train)["ExperimentManager"] = experiment


def main() -> None:
    """Run the command named by the first argument; RL Zoo, or the doctor, parses the others."""
    name = "sb3-a3c" if Path(sys.argv[0]).stem == "sb3-a3c" else "python -m sb3_a3c.zoo"
    parser = argparse.ArgumentParser(
        name,
        description="RL Zoo's commands, with A3C as the default algorithm; doctor checks this machine before a long run.",
        epilog=f"Options: {name} COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=doctor.versions().text)
    parser.add_argument("command", choices=[*_FUNCTIONS, *_SCRIPTS, "doctor"])
    command = parser.parse_args(sys.argv[1:2]).command
    options = sys.argv[2:]
    if command == "doctor":
        sys.exit(doctor.main(options, f"{name} doctor"))
    if command == "benchmark" and "--hub" in options:
        options.remove("--hub")
    else:
        options = [*_DEFAULTS.get(command, ()), *options]
    if "--no-hub" in options:
        # else RL Zoo would download what a folder lacks; read when huggingface_hub is imported, here and in subprocesses
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        register()
    except ImportError as error:
        parser.exit(1, f"{name}: error: {error}\n")
    sys.argv = [f"{name} {command}", *options]
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
