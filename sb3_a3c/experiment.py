"""RL Zoo's experiment, where A3C needs it to be different: the file of hyper-parameters, ``-i`` and failing trials."""

import csv
import json
import re
import traceback
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import load_from_zip_file

#: The hyper-parameters that ``--algo a3c`` uses by default.
HYPERPARAMS = Path(__file__).parent / "hyperparams" / "a3c.yml"


class A3CExperiment(ExperimentManager):
    """
    RL Zoo's ``ExperimentManager``, with three differences. ``--conf-file`` is by default the file that comes with A3C.
    ``-i`` goes on with the run that left the model: with its count of timesteps, its schedules and its monitor files, until
    ``-n`` timesteps *in total*. A trial that raises, whatever it raises, does not end the search.

    :param args: those of ``ExperimentManager``
    :param config: the file of hyper-parameters. None: A3C's own
    :param kwargs: those of ``ExperimentManager``
    """

    def __init__(self, *args: Any, config: str | None = None, **kwargs: Any) -> None:
        kwargs["config"] = config or str(HYPERPARAMS)
        super().__init__(*args, **kwargs)

    def create_log_folder(self) -> None:
        """
        Create the folder of the run; with ``-i``, put the monitor files of the runs before into it.

        :raises ValueError: if the model is not to be trained any further
        """
        if not self.continue_training:
            super().create_log_folder()  # type: ignore[no-untyped-call]
            return
        data, _, _ = load_from_zip_file(self.trained_agent)
        assert data is not None
        done: int = data["num_timesteps"]
        if done >= self.n_timesteps:  # said before there is a folder, which `enjoy` would take for the latest run
            raise ValueError(
                f"{self.trained_agent} has been trained for {done} timesteps, and -n (or n_timesteps in the file) is the "
                f"number of timesteps in total: {self.n_timesteps}. Use a larger one, such as -n {2 * done}."
            )
        super().create_log_folder()  # type: ignore[no-untyped-call]
        carry_over_monitor_files(Path(self.trained_agent).parent, Path(self.save_path), done)

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train. If it raises, the model is saved with what it has learned so far; Ctrl-C only ends the training.

        :param model: an initialized RL model
        """
        try:
            super().learn(_Continued(model) if self.continue_training else model)  # type: ignore[arg-type]
        except Exception as error:
            # a terminal's Ctrl-C ends the processes of a SubprocVecEnv too, so that closing it fails
            if isinstance(error, BrokenPipeError) and error.__context__ is None:
                return
            self.save_trained_model(model)
            raise

    def objective(self, trial: optuna.Trial) -> float:
        """
        :param trial: of hyper-parameters
        :return: mean return of its last evaluation
        :raises TrialPruned: also if the trial has raised anything else
        """
        policy = self._hyperparams["policy"]
        trial.set_user_attr("policy", policy if isinstance(policy, str) else policy.__name__)
        try:
            return super().objective(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            traceback.print_exc()
            raise optuna.TrialPruned(f"{type(error).__name__}: {error}") from error


class _Continued:
    """What ``ExperimentManager.learn`` needs of a model, which goes on until the given number of timesteps in total."""

    def __init__(self, model: BaseAlgorithm) -> None:
        self.env = model.env
        self._model = model

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        remaining = total_timesteps - self._model.num_timesteps
        self._model.learn(remaining, reset_num_timesteps=False, **kwargs)


def carry_over_monitor_files(source: Path, target: Path, n_timesteps: int) -> None:
    """
    Copy the episodes before a model was saved, so that plots of the continued run show all of it. The copies' names begin
    with that of their run; next to them, the files of the new run begin anew.

    :param source: folder of the run that left the model
    :param target: folder of the run that goes on with it
    :param n_timesteps: how long the model had been trained: later episodes of that run are not copied
    """
    episodes: list[tuple[float, int, Path, list[str]]] = []  # (time of its end, length, copy, row)
    for path in sorted(source.glob(f"*.{Monitor.EXT}")):
        copy = target / (f"{source.name}.{path.name}" if re.fullmatch(rf"\d+\.{Monitor.EXT}", path.name) else path.name)
        with path.open(newline="") as file:
            header, columns, *lines = file
        copy.write_text(header + columns, newline="")
        t_start = json.loads(header[1:])["t_start"]
        rows = csv.reader(line for line in lines if line.endswith("\n"))  # of a killed run, the last row may be cut off
        episodes += [(t_start + float(row[2]), int(row[1]), copy, row) for row in rows]
    for _, length, copy, row in sorted(episodes, key=lambda episode: episode[0]):
        n_timesteps -= length
        if n_timesteps < 0:
            break
        with copy.open("a", newline="") as file:
            csv.writer(file).writerow(row)
