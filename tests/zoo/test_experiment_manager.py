"""RL Zoo's experiment with A3C: its file, runs that go on where others ended, trials that may fail."""

import argparse
import pickle
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch as th
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import ALGOS
from rl_zoo3 import train as train_module
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_a3c import A3C, MlpLstmPolicy, MlpPolicy
from sb3_a3c.actor_learner import actor_learner as worker
from sb3_a3c.zoo.experiment_manager import HYPERPARAMS, A3CExperiment
from sb3_a3c.zoo.hyperparams_opt import convert_a3c_params, sample_a3c_params

N_ENVS, N_STEPS = 2, 8
FIRST, TOTAL = 64, 160
#: In this process, so that each run has exactly as many timesteps as it is told.
SETTINGS = [
    *["--algo", "a3c", "--env", "CartPole-v1", "--eval-freq", "-1", "--seed", "1", "-params", f"n_envs:{N_ENVS}"],
    *[
        f"n_steps:{N_STEPS}",
        "n_workers:0",
        "policy_kwargs:dict(net_arch=[8])",
        "normalize:True",
        "learning_rate:'lin_0.001'",
    ],
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def experiment(folder: Path, **kwargs: Any) -> A3CExperiment:
    return A3CExperiment(argparse.Namespace(), "a3c", "CartPole-v1", str(folder), **kwargs)


def test_the_file_of_hyperparameters(tmp_path: Path) -> None:
    assert HYPERPARAMS.is_file()
    assert experiment(tmp_path).config == str(HYPERPARAMS)
    assert experiment(tmp_path, config=None).config == str(HYPERPARAMS)
    assert experiment(tmp_path, config="mine.yml").config == "mine.yml"


def objective_that_raises(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> optuna.Trial:
    def objective(_self: Any, _trial: optuna.Trial) -> float:
        raise error

    monkeypatch.setattr(ExperimentManager, "objective", objective)
    manager = experiment(folder)
    manager._hyperparams = {"policy": "MlpPolicy"}
    trial = optuna.create_study().ask()
    manager.objective(trial)
    return trial


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, ValueError, EOFError, MemoryError])
def test_a_trial_that_raises_is_pruned(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("broken")
    with pytest.raises(optuna.TrialPruned, match=f"^{kind.__name__}: broken$") as raised:
        objective_that_raises(error, tmp_path, monkeypatch)
    assert raised.value.__cause__ is error
    assert f"{kind.__name__}: broken" in capsys.readouterr().err  # with its traceback, for whoever watches


def test_a_pruned_trial_is_pruned_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = optuna.TrialPruned("hopeless")
    with pytest.raises(optuna.TrialPruned) as raised:
        objective_that_raises(error, tmp_path, monkeypatch)
    assert raised.value is error
    assert capsys.readouterr().err.count("Traceback") == 0


def test_ctrl_c_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        objective_that_raises(KeyboardInterrupt(), tmp_path, monkeypatch)


class OwnPolicy(MlpLstmPolicy):
    """A user's, of any name."""


@pytest.mark.parametrize(
    ("policy", "recurrent"), [("CnnLstmPolicy", True), (OwnPolicy, True), ("MlpPolicy", False), (MlpPolicy, False)]
)
def test_a_trial_knows_whether_its_policy_is_recurrent(
    policy: Any, recurrent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExperimentManager, "objective", lambda _self, trial: trial.user_attrs["recurrent"])
    manager: Any = experiment(tmp_path)
    manager._hyperparams = {"policy": policy}
    assert manager.objective(optuna.create_study().ask()) is recurrent


def test_a_search_without_any_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExperimentManager, "hyperparameters_optimization", lambda _: optuna.create_study().best_trial)
    with pytest.raises(SystemExit, match="No trial was completed"):
        experiment(tmp_path).hyperparameters_optimization()


def test_trial_0_is_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HYPERPARAMS_CONVERTER, "a3c", convert_a3c_params)
    journal = str(tmp_path / "study.log")
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(journal)), study_name="study")
    for _ in range(2):
        trial = study.ask()
        trial.set_user_attr("recurrent", False)
        sample_a3c_params(trial, 0, 4, {})
        study.tell(trial, 1.0)
    kwargs: Any = dict(storage=journal, study_name="study")
    for number in range(2):
        hyperparams, _ = experiment(tmp_path, trial_id=number, **kwargs).read_hyperparameters()
        assert hyperparams["learning_rate"] == study.trials[number].params["learning_rate"]
    hyperparams, _ = experiment(tmp_path, **kwargs).read_hyperparameters()
    assert isinstance(hyperparams["learning_rate"], str)  # of the file


class Kept(A3CExperiment):
    """Says what it was about to train, what it did, and what has been learned."""

    created: list["Kept"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.created.append(self)

    def learn(self, model: BaseAlgorithm) -> None:
        self.optimizer_before = deepcopy(model.policy.optimizer.state_dict())
        self.n_timesteps_before = model.num_timesteps
        super().learn(model)
        self.model = model


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """RL Zoo's train, in this process."""

    def run(*options: str) -> Kept:
        Kept.created = []
        monkeypatch.setitem(ALGOS, "a3c", A3C)
        monkeypatch.setattr(train_module, "ExperimentManager", Kept)
        monkeypatch.setattr(sys, "argv", ["train", "-f", str(tmp_path), *options, *SETTINGS])
        train_module.train()
        (manager,) = Kept.created
        return manager

    return run


def moments(state: dict[str, Any]) -> dict[str, th.Tensor]:
    return {f"{index}/{key}": value for index, entry in state["state"].items() for key, value in entry.items()}


def statistics(folder: Path) -> Any:
    env = VecNormalize.load(str(folder / "CartPole-v1" / "vecnormalize.pkl"), make_vec_env("CartPole-v1"))
    env.close()
    return env


def test_a_run_goes_on(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def update_learning_rate(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        original(optimizer, rate)

    original = worker.update_learning_rate  # type: ignore[attr-defined]
    monkeypatch.setattr(worker, "update_learning_rate", update_learning_rate)

    first = train("-n", str(FIRST))
    folder = tmp_path / "a3c" / "CartPole-v1_1"
    assert first.model.num_timesteps == FIRST
    each = N_ENVS * N_STEPS
    assert rates == pytest.approx([0.001 * (1 - steps / FIRST) for steps in range(each, FIRST + 1, each)])
    saved = A3C.load(folder / "CartPole-v1.zip")
    rates.clear()

    second = train("-n", str(TOTAL), "-i", str(folder / "CartPole-v1.zip"))
    continued = tmp_path / "a3c" / "CartPole-v1_2"
    assert second.n_timesteps_before == FIRST
    assert A3C.load(continued / "CartPole-v1.zip").num_timesteps == second.model.num_timesteps == TOTAL

    before, loaded = moments(saved.policy.optimizer.state_dict()), moments(second.optimizer_before)
    assert before.keys() == loaded.keys() and len(before) > 0
    assert all(th.equal(before[key], loaded[key]) for key in before)
    after = moments(second.model.policy.optimizer.state_dict())
    updates = {float(after[key]) - float(before[key]) for key in before if key.endswith("/step")}
    assert updates == {(TOTAL - FIRST) / each}
    assert second.model._n_updates == TOTAL / each

    # the schedule is that of a single run with the new total
    steps = range(FIRST + each, TOTAL + 1, each)
    assert rates == pytest.approx([0.001 * (1 - done / TOTAL) for done in steps])

    old, new = statistics(folder), statistics(continued)
    assert old.obs_rms.count >= FIRST
    assert new.obs_rms.count - old.obs_rms.count >= TOTAL - FIRST
    assert new.ret_rms.count - old.ret_rms.count == pytest.approx(TOTAL - FIRST)

    lengths = load_results(str(continued))["l"].tolist()
    kept = load_results(str(folder))["l"].tolist()
    assert len(kept) > 0 and lengths[: len(kept)] == kept
    assert len(lengths) > len(kept)
    assert np.sum(lengths) <= TOTAL
    own = ["0.monitor.csv", "1.monitor.csv", "CartPole-v1", "CartPole-v1.zip"]
    copies = [name for name in names(continued) if name not in own]
    assert [re.sub(r"^\d{10}\.", "", name) for name in copies] == own[:2]


@pytest.mark.parametrize("n_timesteps", [FIRST - 1, FIRST])
def test_nothing_is_left_to_train(n_timesteps: int, train: Any, tmp_path: Path) -> None:
    train("-n", str(FIRST))
    model = tmp_path / "a3c" / "CartPole-v1_1" / "CartPole-v1.zip"
    with pytest.raises(ValueError, match=rf"in total: {n_timesteps}\. Use a larger one, such as -n {2 * FIRST}\.") as raised:
        train("-n", str(n_timesteps), "-i", str(model))
    assert f"{model} has been trained for {FIRST} timesteps" in str(raised.value)
    assert names(tmp_path / "a3c") == ["CartPole-v1_1"]  # what `enjoy` plays is still the run that has a model


def test_a_new_run_carries_nothing_over(train: Any, tmp_path: Path) -> None:
    train("-n", str(FIRST))
    second = train("-n", str(FIRST))
    assert second.n_timesteps_before == 0
    assert second.model.num_timesteps == FIRST
    assert names(tmp_path / "a3c" / "CartPole-v1_2") == ["0.monitor.csv", "1.monitor.csv", "CartPole-v1", "CartPole-v1.zip"]


def test_what_was_learned_before_an_error_is_saved(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollout(self: Any) -> Any:
        rollouts.append(self)
        if len(rollouts) > 3:
            raise RuntimeError("broken on purpose")
        return original(self)

    rollouts: list[Any] = []
    original = worker.ActorLearner.rollout
    monkeypatch.setattr(worker.ActorLearner, "rollout", rollout)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        train("-n", str(TOTAL))
    folder = tmp_path / "a3c" / "CartPole-v1_1"
    saved = A3C.load(folder / "CartPole-v1.zip")
    assert saved.num_timesteps == 3 * N_ENVS * N_STEPS
    assert saved._n_updates == 3
    assert statistics(folder).obs_rms.count >= saved.num_timesteps


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
@pytest.mark.parametrize("interrupted", [True, False])
def test_environments_that_are_gone_when_they_are_to_be_closed(
    interrupted: bool, error: type[Exception], train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a terminal's Ctrl-C leaves those of a SubprocVecEnv. Without one, a broken connection is an error."""

    def learn(*_args: Any, **_kwargs: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt

    def close(self: VecNormalize) -> None:
        self.venv.close()
        raise error

    monkeypatch.setattr(A3C, "learn", learn)
    monkeypatch.setattr(VecNormalize, "close", close)
    if interrupted:
        train("-n", str(FIRST))
    else:
        with pytest.raises(error):
            train("-n", str(FIRST))
    assert (tmp_path / "a3c" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


@pytest.mark.parametrize("raised_by", [BrokenPipeError, ConnectionResetError])
def test_a_broken_connection_in_training_is_an_error(
    raised_by: type[Exception], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(*_args: Any, **_kwargs: Any) -> None:
        raise raised_by

    monkeypatch.setattr(A3C, "learn", learn)
    with pytest.raises(raised_by):
        train("-n", str(FIRST))


def test_a_checkpoint_goes_on_with_statistics_of_its_own(train: Any, tmp_path: Path) -> None:
    train("-n", str(TOTAL), "--save-freq", str(FIRST))
    folder = tmp_path / "a3c" / "CartPole-v1_1"
    checkpoint = folder / f"rl_model_{FIRST}_steps.zip"
    with (folder / "CartPole-v1" / f"vecnormalize_{FIRST}_steps.pkl").open("rb") as file:
        before = pickle.load(file).obs_rms.count
    assert FIRST <= before < statistics(folder).obs_rms.count
    train("-n", str(TOTAL), "-i", str(checkpoint))
    assert statistics(tmp_path / "a3c" / "CartPole-v1_2").obs_rms.count == pytest.approx(before + TOTAL - FIRST, abs=N_ENVS)


def test_statistics_that_are_not_there(train: Any, tmp_path: Path) -> None:
    train("-n", str(FIRST))
    folder = tmp_path / "a3c" / "CartPole-v1_1"
    (folder / "CartPole-v1" / "vecnormalize.pkl").unlink()
    with pytest.raises(ValueError, match=r"its statistics are not at .*vecnormalize\.pkl"):
        train("-n", str(TOTAL), "-i", str(folder / "CartPole-v1.zip"))
    assert names(tmp_path / "a3c") == ["CartPole-v1_1"]


def test_from_within_the_folder_of_the_run(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("-n", str(FIRST))
    monkeypatch.chdir(tmp_path / "a3c" / "CartPole-v1_1")
    train("-n", str(TOTAL), "-i", "CartPole-v1.zip")
    lengths = [load_results(str(tmp_path / "a3c" / f"CartPole-v1_{number}"))["l"].tolist() for number in (1, 2)]
    assert len(lengths[0]) > 0
    assert lengths[1][: len(lengths[0])] == lengths[0]
