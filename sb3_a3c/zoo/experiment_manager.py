"""RL Zoo's ``ExperimentManager``, whose ``-i`` continues a run and which saves models after errors; and that of A3C."""

import contextlib
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import optuna
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c.a3c import A3C
from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.resume import carry_over_monitor_files, has_statistics, load_statistics

#: The hyperparameters that ``--algo a3c`` uses by default.
HYPERPARAMS = Path(__file__).parent / "hyperparams" / "a3c.yml"


class Experiment(ExperimentManager):
    """
    RL Zoo's ``ExperimentManager``, for any algorithm, with these differences:

    - ``-i`` continues the run that saved the model, with its timesteps, schedules, statistics for ``VecNormalize`` and
      monitor files, until ``-n`` timesteps *in total*.
    - If training raises, the model is saved. It is also saved if Ctrl-C ends the reader of the output (``| tee``).
    - A run without a model, because its set-up raised or for a search, leaves no folder.
    - ``normalize: true`` leaves out observations that ``VecNormalize`` can't normalize, such as ``Discrete`` ones.
    - ``env_kwargs`` of the file also apply to the environments of evaluations.

    :param args: as for ``ExperimentManager``
    :param kwargs: as for ``ExperimentManager``
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made_folder = False

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        results = None
        try:
            results = super().setup_experiment()
        finally:
            if results is None and self._made_folder:  # `enjoy` would take it for the latest run
                shutil.rmtree(self.save_path)
        return results

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> tuple[dict[str, Any], Any, list[BaseCallback], Any]:
        processed, *others = super()._preprocess_hyperparams(hyperparams)
        self.eval_env_kwargs = self._eval_env_kwargs_args or self.env_kwargs
        return processed, *others  # type: ignore[return-value]

    def create_log_folder(self) -> None:
        if self.continue_training:
            self._check_model_can_continue()
        with contextlib.suppress(FileExistsError):  # made by a run that started at the same moment
            os.makedirs(self.save_path)
            self._made_folder = True
        super().create_log_folder()  # type: ignore[no-untyped-call]
        if self.continue_training:
            carry_over_monitor_files(Path(self.trained_agent).parent, Path(self.save_path))

    def learn(self, model: BaseAlgorithm) -> None:
        trained = _Trained(model, self.continue_training)
        try:
            super().learn(trained)  # type: ignore[arg-type]
        except Exception as error:
            # a terminal's Ctrl-C also ends the processes of a SubprocVecEnv: closing it fails, but RL Zoo can save the model
            if trained.interrupted and isinstance(error, ConnectionError):
                return
            self.save_trained_model(model)
            raise

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        try:
            super().save_trained_model(model)
            sys.stdout.flush()
        except BrokenPipeError:  # a terminal's Ctrl-C also ends what reads the output, such as `| tee`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            super().save_trained_model(model)

    def _check_model_can_continue(self) -> None:
        """
        :raises ValueError: if the model has no timesteps left to train, or no statistics for ``VecNormalize``
        """
        data, _, _ = load_from_zip_file(self.trained_agent)
        assert data is not None
        done: int = data["num_timesteps"]
        if done >= self.n_timesteps:
            raise ValueError(
                f"{self.trained_agent} has been trained for {done} timesteps, and -n (or n_timesteps in the file) is the "
                f"number of timesteps in total: {self.n_timesteps}. Use a larger one, such as -n {2 * done}."
            )
        if self.normalize and not has_statistics(self.trained_agent) and not self._statistics_path().exists():
            raise ValueError(
                f"{self.trained_agent} has no statistics for VecNormalize, and {self._statistics_path()} does not exist. "
                "Use a model that has them, or -params normalize:False if it was trained without."
            )

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if not (self.continue_training and self.normalize):
            if not isinstance(env.observation_space, spaces.Box | spaces.Dict):
                self.normalize_kwargs.setdefault("norm_obs", False)
            return super()._maybe_normalize(env, eval_env)
        print("Loading saved VecNormalize stats")
        if has_statistics(self.trained_agent):
            normalized = load_statistics(self.trained_agent, env)
        else:
            normalized = VecNormalize.load(str(self._statistics_path()), env)
        if eval_env:
            normalized.training = normalized.norm_reward = False
        return normalized

    def _statistics_path(self) -> Path:
        """Statistics of the model of ``-i``: a checkpoint has its own, final and best model share those of their run."""
        model = Path(self.trained_agent)
        checkpoint = re.search(r"_\d+_steps$", model.stem)
        return model.parent / str(self.env_name) / f"vecnormalize{checkpoint[0] if checkpoint else ''}.pkl"


class A3CExperiment(Experiment):
    """
    An :class:`Experiment` with A3C. Also, a trial that raises anything is pruned and does not end the search.

    :param args: as for ``ExperimentManager``
    :param config: path of the hyperparameters; None: :data:`HYPERPARAMS`
    :param kwargs: as for ``ExperimentManager``
    """

    def __init__(self, *args: Any, config: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, config=config or str(HYPERPARAMS), **kwargs)

    def objective(self, trial: optuna.Trial) -> float:
        policy = self._hyperparams["policy"]
        trial.set_user_attr("recurrent", issubclass(A3C.policy_aliases.get(policy, policy), LstmActorCriticPolicy))
        try:
            return super().objective(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            traceback.print_exc()
            raise optuna.TrialPruned(f"{type(error).__name__}: {error}") from error


class _Trained:
    """The model as ``ExperimentManager.learn`` needs it; with ``-i``, ``learn`` trains until a total number of timesteps."""

    def __init__(self, model: BaseAlgorithm, continued: bool) -> None:
        self.env = model.env
        self.interrupted = False
        self._model = model
        self._continued = continued

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        done = self._model.num_timesteps if self._continued else 0
        try:
            self._model.learn(total_timesteps - done, reset_num_timesteps=not self._continued, **kwargs)
        except KeyboardInterrupt:  # RL Zoo continues, too, and saves the model
            self.interrupted = True
