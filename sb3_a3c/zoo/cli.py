"""
RL Zoo's commands, with A3C among the algorithms: ``python -m sb3_a3c.zoo train --algo a3c --env CartPole-v1``.

Options, folders and files are RL Zoo's. Only where no ``--conf-file`` is given, A3C's hyper-parameters come from
``sb3_a3c/zoo/hyperparams/a3c.yml``. For scripts of your own, call :func:`register`, then what you need of ``rl_zoo3``.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

#: RL Zoo's commands that are functions of a module, and those that are scripts.
_FUNCTIONS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "plot_train": "rl_zoo3.plots",
    "plot_from_file": "rl_zoo3.plots",
    "all_plots": "rl_zoo3.plots",
}
_SCRIPTS = ("record_video", "record_training", "benchmark")
#: Those that call other commands as subprocesses.
_CALLERS = ("record_training", "benchmark")


def register() -> None:
    """
    Make A3C known to RL Zoo in this process: as an algorithm, with what can be tuned, and with what A3C does differently
    (:class:`sb3_a3c.zoo.experiment_manager.A3CExperiment`). To be called before RL Zoo's functions parse their arguments.

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
        kind = A3CExperiment if algo == "a3c" else ExperimentManager
        return kind(args, algo, *others, **kwargs)

    vars(train)["ExperimentManager"] = experiment


def main() -> None:
    """Run the command that the command line names; what follows on the line is for RL Zoo."""
    name = "sb3-a3c" if Path(sys.argv[0]).stem == "sb3-a3c" else "python -m sb3_a3c.zoo"
    parser = argparse.ArgumentParser(name, description=f"RL Zoo's commands, with A3C. Options: {name} COMMAND --help")
    parser.add_argument("command", choices=[*_FUNCTIONS, *_SCRIPTS])
    command = parser.parse_args(sys.argv[1:2]).command
    register()
    sys.argv = [f"{name} {command}", *sys.argv[2:]]
    sys.path.insert(0, os.getcwd())  # where wrappers and environments of one's own may be; `python -m` has done so too
    multiprocessing.set_forkserver_preload(["rl_zoo3.train"])  # or each process of `--vec-env subproc` imports it for itself
    with contextlib.ExitStack() as stack:
        if command in _CALLERS:
            stack.enter_context(_subprocesses_know_a3c())
        if command == "record_training":
            if any(" " in path for path in (os.getcwd(), *sys.argv[1:])):  # RL Zoo does not quote them for the shell
                sys.exit("record_training can't work with folders that have spaces in their names. Rename them.")
            stack.enter_context(_ffmpeg_on_path())
        if "plot" in command:
            stack.enter_context(_plots_are_kept(command))
        if command in _FUNCTIONS:
            getattr(importlib.import_module(_FUNCTIONS[command]), command)()
        else:
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


@contextlib.contextmanager
def _subprocesses_know_a3c() -> Iterator[None]:
    """RL Zoo's ``record_training`` and ``benchmark`` call other commands of it: let them call ours."""
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
def _ffmpeg_on_path() -> Iterator[None]:
    """Where the system has no ``ffmpeg``, let programs find the one that moviepy (by imageio-ffmpeg) has brought along."""
    if shutil.which("ffmpeg"):
        yield
        return
    try:
        import imageio_ffmpeg
    except ImportError:
        sys.exit("record_training puts videos together with ffmpeg, which is not there. Install it, or: pip install moviepy")
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(imageio_ffmpeg.get_ffmpeg_exe(), Path(folder) / "ffmpeg")
        with mock.patch.dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"):
            yield


@contextlib.contextmanager
def _plots_are_kept(command: str) -> Iterator[None]:
    """RL Zoo opens windows. Where there is no screen, save as a picture what they would have shown."""
    from matplotlib import pyplot as plt

    def save() -> None:
        for number in plt.get_fignums():
            filename = f"{command}_{number}.png"
            plt.figure(number).savefig(filename)
            print(f"Saved {filename}, as there is no screen to show it on")

    # "agg" is what matplotlib falls back to where it finds no screen
    with mock.patch("matplotlib.pyplot.show", save) if plt.get_backend() == "agg" else contextlib.nullcontext():
        yield


if __name__ == "__main__":
    main()
