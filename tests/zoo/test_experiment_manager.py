"""RL Zoo's experiment manager with A3C: its hyperparameters, continued runs, and trials that fail."""

import argparse
import contextlib
import pickle
import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
from rl_zoo3 import ALGOS
from rl_zoo3 import train as train_module
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_a3c import A3C, MlpLstmPolicy, MlpPolicy
from sb3_a3c.actor_learner import actor_learner
from sb3_a3c.resume import load_statistics
from sb3_a3c.zoo.experiment_manager import HYPERPARAMS, A3CExperiment, Experiment
from sb3_a3c.zoo.hyperparams_opt import sample_a3c_params

N_ENVS, N_STEPS = 2, 8
FIRST, TOTAL = 64, 160
#: In this process, so that each run has exactly as many timesteps as it is told.
SETTINGS = [
    *["--algo", "a3c", "--env", "CartPole-v1", "--eval-freq", "-1", "--seed", "1", "-params", f"n_envs:{N_ENVS}"],
    *[f"n_steps:{N_STEPS}", "n_workers:0", "policy_kwargs:dict(net_arch=[8])", "normalize:True"],
    "learning_rate:'lin_0.001'",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def experiment(folder: Path, **kwargs: Any) -> A3CExperiment:
    return A3CExperiment(argparse.Namespace(), "a3c", "CartPole-v1", str(folder), **kwargs)


def test_the_file_of_hyperparameters(tmp_path: Path) -> None:
    assert HYPERPARAMS.is_file()
    assert experiment(tmp_path, config=None).config == str(HYPERPARAMS)
    assert experiment(tmp_path, config="mine.yml").config == "mine.yml"


# --- trials ---------------------------------------------------------------------------------------------------------


def objective_that_raises(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(_self: Any, _trial: optuna.Trial) -> float:
        raise error

    monkeypatch.setattr(ExperimentManager, "objective", objective)
    manager = experiment(folder)
    manager._hyperparams = {"policy": "MlpPolicy"}
    manager.objective(optuna.create_study().ask())


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_trial_that_raises_is_pruned(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("broken")
    with pytest.raises(optuna.TrialPruned, match=f"^{kind.__name__}: broken$") as raised:
        objective_that_raises(error, tmp_path, monkeypatch)
    assert raised.value.__cause__ is error
    assert f"{kind.__name__}: broken" in capsys.readouterr().err  # with its traceback


@pytest.mark.parametrize("error", [optuna.TrialPruned("hopeless"), KeyboardInterrupt()])
def test_pruning_and_ctrl_c_in_a_trial(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)) as raised:
        objective_that_raises(error, tmp_path, monkeypatch)
    assert raised.value is error
    assert "Traceback" not in capsys.readouterr().err


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


# --- training -------------------------------------------------------------------------------------------------------


class RecordingOther(Experiment):
    """Keeps the model before and after training."""

    created: list["RecordingOther"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.created.append(self)

    def learn(self, model: BaseAlgorithm) -> None:
        self.optimizer_before = deepcopy(model.policy.optimizer.state_dict())
        self.n_timesteps_before = model.num_timesteps
        super().learn(model)
        self.model = model


class Recording(RecordingOther, A3CExperiment):
    """The same of A3C."""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """RL Zoo's train, in this process."""

    def run(*options: str, manager: type[RecordingOther] = Recording, settings: Sequence[str] = SETTINGS) -> RecordingOther:
        RecordingOther.created = []
        monkeypatch.setitem(ALGOS, "a3c", A3C)
        monkeypatch.setitem(HYPERPARAMS_SAMPLER, "a3c", sample_a3c_params)
        monkeypatch.setattr(train_module, "ExperimentManager", manager)
        monkeypatch.setattr(sys, "argv", ["train", "-f", str(tmp_path), *options, *settings])
        train_module.train()
        (created,) = RecordingOther.created
        return created

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the first run."""
    return tmp_path / "a3c" / "CartPole-v1_1"


@pytest.fixture
def continued(tmp_path: Path) -> Path:
    """Folder of the second run."""
    return tmp_path / "a3c" / "CartPole-v1_2"


def moments(state: dict[str, Any]) -> dict[str, th.Tensor]:
    return {f"{index}/{key}": value for index, entry in state["state"].items() for key, value in entry.items()}


def statistics(folder: Path) -> Any:
    return pickle.loads((folder / "CartPole-v1" / "vecnormalize.pkl").read_bytes())


def check_episodes(folder: Path, continued: Path) -> None:
    """The second run's monitor files begin with the episodes of the first."""
    before, after = (load_results(str(path))["l"].tolist() for path in (folder, continued))
    assert len(after) > len(before) > 0
    assert after[: len(before)] == before
    assert sum(after) <= TOTAL


def test_a_run_continues(train: Any, folder: Path, continued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def update_learning_rate(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        original(optimizer, rate)

    original = actor_learner.update_learning_rate  # type: ignore[attr-defined]
    monkeypatch.setattr(actor_learner, "update_learning_rate", update_learning_rate)

    first = train("-n", str(FIRST))
    assert first.model.num_timesteps == FIRST
    each = N_ENVS * N_STEPS
    assert rates == pytest.approx([0.001 * (1 - steps / FIRST) for steps in range(each, FIRST + 1, each)])
    saved = A3C.load(folder / "CartPole-v1.zip")
    rates.clear()

    second = train("-n", str(TOTAL), "-i", str(folder / "CartPole-v1.zip"))
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

    check_episodes(folder, continued)
    own = ["0.monitor.csv", "1.monitor.csv", "CartPole-v1", "CartPole-v1.zip"]
    copies = [name for name in names(continued) if name not in own]
    assert [re.sub(r"^\d{10}\.", "", name) for name in copies] == own[:2]


def test_a_run_of_another_algorithm_continues(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO: its timesteps, schedule, optimizer's state, statistics and episodes, as for A3C."""
    rates: list[float] = []
    original = PPO._update_learning_rate

    def update_learning_rate(self: PPO, optimizers: Any) -> None:
        rates.append(self.lr_schedule(self._current_progress_remaining))
        original(self, optimizers)

    monkeypatch.setattr(PPO, "_update_learning_rate", update_learning_rate)
    settings = ["--algo", "ppo", *SETTINGS[2:], "batch_size:8", "n_epochs:1"]
    settings.remove("n_workers:0")
    train("-n", str(FIRST), settings=settings, manager=RecordingOther)
    first, second = (tmp_path / "ppo" / f"CartPole-v1_{number}" for number in (1, 2))
    rates.clear()

    again = train("-n", str(TOTAL), "-i", str(first / "CartPole-v1.zip"), settings=settings, manager=RecordingOther)
    assert again.n_timesteps_before == FIRST
    assert PPO.load(second / "CartPole-v1.zip").num_timesteps == TOTAL
    each = N_ENVS * N_STEPS
    assert rates == pytest.approx([0.001 * (1 - done / TOTAL) for done in range(FIRST + each, TOTAL + 1, each)])
    n_updates = {int(entry["step"]) for entry in again.optimizer_before["state"].values()}
    assert n_updates == {FIRST // 8}
    assert statistics(second).ret_rms.count - statistics(first).ret_rms.count == pytest.approx(TOTAL - FIRST)
    check_episodes(first, second)


def test_a_run_continues_from_within_its_folder(
    train: Any, folder: Path, continued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("-n", str(FIRST))
    monkeypatch.chdir(folder)
    train("-n", str(TOTAL), "-i", "CartPole-v1.zip")
    check_episodes(folder, continued)


def test_a_checkpoint_continues_with_its_own_statistics(train: Any, folder: Path, continued: Path) -> None:
    train("-n", str(TOTAL), "--save-freq", str(FIRST))
    assert names(folder / "CartPole-v1") == ["args.yml", "command.txt", "config.yml", "vecnormalize.pkl"]
    model = folder / f"rl_model_{FIRST}_steps.zip"
    loaded: Any = load_statistics(model, make_vec_env("CartPole-v1"))
    before = loaded.obs_rms.count
    assert FIRST <= before < statistics(folder).obs_rms.count
    (folder / "CartPole-v1" / "vecnormalize.pkl").unlink()
    train("-n", str(TOTAL), "-i", str(model))
    assert statistics(continued).obs_rms.count == pytest.approx(before + TOTAL - FIRST, abs=N_ENVS)


def without_statistics(model: Path) -> None:
    """Save a model again, as it would be without ``VecNormalize``."""
    loaded = A3C.load(model)
    assert loaded.get_env() is None
    loaded.save(model)


@pytest.mark.parametrize("name", ["CartPole-v1", f"rl_model_{FIRST}_steps"])
def test_statistics_in_a_file_of_their_own(name: str, train: Any, folder: Path, continued: Path) -> None:
    """RL Zoo's own, for a model that has none; a checkpoint does not get those of the end of the run."""
    train("-n", str(TOTAL), "--save-freq", str(FIRST))
    model, own = folder / f"{name}.zip", folder / "CartPole-v1" / "vecnormalize.pkl"
    without_statistics(model)
    if name != "CartPole-v1":
        with pytest.raises(ValueError, match=rf"has no statistics for VecNormalize, and .*vecnormalize_{FIRST}_steps\.pkl"):
            train("-n", str(2 * TOTAL), "-i", str(model))
        own = own.rename(own.with_name(f"vecnormalize_{FIRST}_steps.pkl"))
    before = pickle.loads(own.read_bytes()).obs_rms.count
    done = A3C.load(model).num_timesteps
    train("-n", str(2 * TOTAL), "-i", str(model))
    assert statistics(continued).obs_rms.count == pytest.approx(before + 2 * TOTAL - done, abs=N_ENVS)


def test_models_that_cannot_be_continued(train: Any, folder: Path) -> None:
    train("-n", str(FIRST))
    model = folder / "CartPole-v1.zip"
    for n_timesteps in (FIRST - 1, FIRST):
        advice = rf"in total: {n_timesteps}\. Use a larger one, such as -n {2 * FIRST}\."
        with pytest.raises(ValueError, match=advice) as raised:
            train("-n", str(n_timesteps), "-i", str(model))
        assert f"{model} has been trained for {FIRST} timesteps" in str(raised.value)
    (folder / "CartPole-v1" / "vecnormalize.pkl").unlink()
    without_statistics(model)
    with pytest.raises(ValueError, match=r"has no statistics for VecNormalize, and .*vecnormalize\.pkl does not exist"):
        train("-n", str(TOTAL), "-i", str(model))
    assert names(folder.parent) == ["CartPole-v1_1"]  # the folder that `enjoy` takes for the latest run has a model


def test_a_new_run_does_not_continue(train: Any, continued: Path) -> None:
    train("-n", str(FIRST))
    second = train("-n", str(FIRST))
    assert second.n_timesteps_before == 0
    assert second.model.num_timesteps == FIRST
    assert names(continued) == ["0.monitor.csv", "1.monitor.csv", "CartPole-v1", "CartPole-v1.zip"]


def test_only_runs_with_a_model_leave_a_folder(train: Any, folder: Path) -> None:
    """``enjoy`` takes the latest folder for the latest run."""
    train("-n", str(FIRST))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        train("-n", str(FIRST), "--env-kwargs", "nonsense:1")
    assert names(folder.parent) == [folder.name]
    search = ["-optimize", "--n-trials", "1", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    train("-n", str(FIRST), *search)
    left = names(folder.parent)
    assert left[0] == folder.name
    assert all(name.startswith("report_CartPole-v1_1-trials-") for name in left[1:])
    assert sorted(Path(name).suffix for name in left[1:]) == [".csv", ".pkl"]


def test_a_folder_of_a_run_that_started_at_the_same_moment_stays(train: Any, folder: Path) -> None:
    class Late(Recording):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            folder.mkdir(parents=True)

    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        train("-n", str(FIRST), "--env-kwargs", "nonsense:1", manager=Late)
    assert folder.is_dir()


CLASSIC = ["Acrobot-v1", "Blackjack-v1", "CliffWalking-v1", "FrozenLake-v1", "MountainCarContinuous-v0", "Pendulum-v1"]
CLASSIC += [max(name for name in gym.registry if name.startswith("Taxi-v")), "LunarLander-v3"]


@pytest.mark.filterwarnings("ignore:builtin type [Ss]wig:DeprecationWarning")
@pytest.mark.parametrize("env", CLASSIC)
def test_classic_environments_train_and_are_evaluated_with_the_defaults(env: str, train: Any, tmp_path: Path) -> None:
    """One worker in this process is enough to see that. CliffWalking has no time limit of its own."""
    if env not in gym.registry:
        pytest.skip(f"this gymnasium has no {env}")
    short = ["--eval-freq", "100", "--eval-episodes", "1", "-params", "n_workers:0", "n_envs:2", "n_steps:10"]
    train("-n", "200", settings=["--algo", "a3c", "--env", env, *short])
    (folder,) = (tmp_path / "a3c").iterdir()
    assert A3C.load(folder / f"{env}.zip").num_timesteps == 200
    with np.load(folder / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [100, 200]
        assert evaluations["ep_lengths"].max() <= (
            200 if env == "CliffWalking-v1" else gym.spec(env).max_episode_steps or 50
        )


# RL Zoo leaves the environments open if the model can't be made
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_spaces_that_a3c_does_not_support(train: Any, tmp_path: Path) -> None:
    """Blackjack without the wrapper of the file."""
    config = tmp_path / "mine.yml"
    config.write_text("default: {policy: MlpPolicy, n_timesteps: 100, normalize: true}")
    with pytest.raises(ValueError, match=r"^A3C supports Box, Discrete, .* as observation spaces, not Tuple\(.*Wrap the"):
        train("--conf-file", str(config), settings=["--algo", "a3c", "--env", "Blackjack-v1"])


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError])
def test_the_model_is_saved_if_training_raises(
    error: type[Exception], train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollout(self: Any, learning_rate: float) -> Any:
        rollouts.append(self)
        if len(rollouts) > 3:
            raise error("broken on purpose")
        return original(self, learning_rate)

    rollouts: list[Any] = []
    original = actor_learner.ActorLearner.rollout
    monkeypatch.setattr(actor_learner.ActorLearner, "rollout", rollout)
    with pytest.raises(error, match="broken on purpose"):
        train("-n", str(TOTAL))
    saved = A3C.load(folder / "CartPole-v1.zip")
    assert saved.num_timesteps == 3 * N_ENVS * N_STEPS
    assert saved._n_updates == 3
    assert statistics(folder).obs_rms.count >= saved.num_timesteps


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
@pytest.mark.parametrize("interrupted", [True, False])
def test_environments_that_ctrl_c_has_ended(
    interrupted: bool, error: type[Exception], train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C ends the processes of a SubprocVecEnv. Without Ctrl-C, a broken connection is an error."""

    def learn(*_args: Any, **_kwargs: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt

    def close(self: VecNormalize) -> None:
        self.venv.close()
        raise error

    monkeypatch.setattr(A3C, "learn", learn)
    monkeypatch.setattr(VecNormalize, "close", close)
    with contextlib.nullcontext() if interrupted else pytest.raises(error):
        train("-n", str(FIRST))
    assert (folder / "CartPole-v1.zip").exists()
