"""RL Zoo's experiment, where A3C needs it to be different: the file of hyper-parameters, ``-i``, errors, and searches."""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c.a3c import A3C
from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.resume import carry_over_monitor_files

#: The hyper-parameters that ``--algo a3c`` uses by default.
HYPERPARAMS = Path(__file__).parent / "hyperparams" / "a3c.yml"


class A3CExperiment(ExperimentManager):
    """
    RL Zoo's ``ExperimentManager``, with these differences:

    - ``--conf-file`` is by default the file that comes with A3C.
    - ``-i`` goes on with the run that left the model: with its count of timesteps, its schedules, its statistics for
      ``VecNormalize`` and its monitor files, until ``-n`` timesteps *in total*.
    - A training that raises leaves its model, and so does one whose output nobody reads any more (``| tee`` and Ctrl-C).
    - A trial that raises, whatever it raises, does not end the search; ``--trial-id 0`` is a trial too.

    :param args: those of ``ExperimentManager``
    :param config: the file of hyper-parameters. None: A3C's own
    :param kwargs: those of ``ExperimentManager``
    """

    def __init__(self, *args: Any, config: str | None = None, **kwargs: Any) -> None:
        kwargs["config"] = config or str(HYPERPARAMS)
        super().__init__(*args, **kwargs)
        if self.trial_id is not None:
            self.trial_id: Any = str(self.trial_id)  # RL Zoo asks whether it is true, and the number 0 is not

    def load_trial(
        self, storage: str, study_name: str, trial_id: int | str | None = None, convert: bool = True
    ) -> dict[str, Any]:
        """
        :param storage: of the study
        :param study_name: its name
        :param trial_id: number of the trial. None: the best
        :param convert: to A3C's arguments
        :return: hyper-parameters of a trial
        """
        return super().load_trial(storage, study_name, None if trial_id is None else int(trial_id), convert)

    def create_log_folder(self) -> None:
        """
        Create the folder of the run; with ``-i``, put the monitor files of the runs before into it.

        :raises ValueError: if the model is not to be trained any further, or its statistics are not there
        """
        if self.continue_training:
            self._check_that_it_can_go_on()  # before there is a folder, which `enjoy` would take for the latest run
        super().create_log_folder()  # type: ignore[no-untyped-call]
        if self.continue_training:
            model = Path(self.trained_agent).resolve()
            carry_over_monitor_files(model.parent, Path(self.save_path), until=model.stat().st_mtime)

    def create_callbacks(self) -> None:
        """As RL Zoo's; with each checkpoint, statistics for ``VecNormalize`` are saved."""
        super().create_callbacks()  # type: ignore[no-untyped-call]
        if self.save_freq > 0:
            self.callbacks.append(SaveVecNormalizeCallback(self.save_freq, self.params_path, name_prefix="vecnormalize"))

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train. If it raises, the model is saved with what it has learned so far; Ctrl-C only ends the training.

        :param model: an initialized RL model
        """
        trained = _Trained(model, self.continue_training)
        try:
            super().learn(trained)  # type: ignore[arg-type]
        except Exception as error:
            # a terminal's Ctrl-C ends the processes of a SubprocVecEnv too, so that they can't be closed any more
            if trained.interrupted and isinstance(error, ConnectionError):
                return
            self.save_trained_model(model)
            raise

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model, and statistics for ``VecNormalize``.

        :param model: a trained one
        """
        try:
            super().save_trained_model(model)
            sys.stdout.flush()
        except BrokenPipeError:  # of the output: a terminal's Ctrl-C ends what reads it too, such as `| tee`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            super().save_trained_model(model)

    def hyperparameters_optimization(self) -> None:
        """Search. What is found is printed, and written into the log folder."""
        try:
            super().hyperparameters_optimization()
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            sys.exit("No trial was completed, so there is no best one: see what they raised above.")

    def objective(self, trial: optuna.Trial) -> float:
        """
        :param trial: of hyper-parameters
        :return: mean return of its last evaluation
        :raises TrialPruned: also if the trial has raised anything else
        """
        policy = self._hyperparams["policy"]
        trial.set_user_attr("recurrent", issubclass(A3C.policy_aliases.get(policy, policy), LstmActorCriticPolicy))
        try:
            return super().objective(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            traceback.print_exc()
            raise optuna.TrialPruned(f"{type(error).__name__}: {error}") from error

    def _check_that_it_can_go_on(self) -> None:
        data, _, _ = load_from_zip_file(self.trained_agent)
        assert data is not None
        done: int = data["num_timesteps"]
        if done >= self.n_timesteps:
            raise ValueError(
                f"{self.trained_agent} has been trained for {done} timesteps, and -n (or n_timesteps in the file) is the "
                f"number of timesteps in total: {self.n_timesteps}. Use a larger one, such as -n {2 * done}."
            )
        statistics = self._statistics_path()
        if self.normalize and not statistics.exists():
            raise ValueError(
                f"{self.trained_agent} is to go on with VecNormalize, but its statistics are not at {statistics}. "
                "Without them it would see other numbers than it has learned from. Use a model that has them, or "
                "-params normalize:False if it was trained without."
            )

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if not (self.continue_training and self.normalize):
            return super()._maybe_normalize(env, eval_env)
        print("Loading saved VecNormalize stats")
        normalized = VecNormalize.load(str(self._statistics_path()), env)
        if eval_env:
            normalized.training = normalized.norm_reward = False
        return normalized

    def _statistics_path(self) -> Path:
        """Where the statistics of ``-i``'s model are: a checkpoint has its own, other models share those of their run."""
        model = Path(self.trained_agent)
        checkpoint = re.search(r"_\d+_steps$", model.stem)
        return model.parent / str(self.env_name) / f"vecnormalize{checkpoint[0] if checkpoint else ''}.pkl"


class _Trained:
    """
    What ``ExperimentManager.learn`` needs of a model.

    :param model: that is to learn
    :param continued: whether to go on until the given number of timesteps in total
    """

    def __init__(self, model: BaseAlgorithm, continued: bool) -> None:
        self.env = model.env
        self.interrupted = False
        self._model = model
        self._continued = continued

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        done = self._model.num_timesteps if self._continued else 0
        try:
            self._model.learn(total_timesteps - done, reset_num_timesteps=not self._continued, **kwargs)
        except KeyboardInterrupt:  # RL Zoo too goes on to save the model
            self.interrupted = True
