"""What can't be used is said before anything starts; what can be used is taken in every form."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.ppo_recurrent import CnnLstmPolicy as ContribCnnLstmPolicy
from sb3_contrib.ppo_recurrent import MlpLstmPolicy as ContribMlpLstmPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C
from sb3_a3c.arguments import check_device


def cartpole() -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=4)


def children() -> set[int]:
    """Living child processes of this one."""
    path = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()}


def no_process_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)


# --- bad arguments --------------------------------------------------------------------------------------------------


class OtherSpace(gym.Env[Any, Any]):
    """An environment with a space of the user's."""

    render_mode = None

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
BAD_ARGUMENTS: list[Any] = [
    pytest.param({"n_workers": -1}, r"`n_workers` must be an integer and at least 0, not -1", id="negative-workers"),
    pytest.param({"n_workers": 1.5}, r"`n_workers` must be an integer", id="fractional-workers"),
    pytest.param({"n_workers": True}, r"`n_workers` must be an integer and at least 0, not True", id="bool-workers"),
    pytest.param({"n_workers": 5}, r"n_workers=5, but there are only 4 environments.*Use n_workers=4", id="too-many"),
    pytest.param({"n_steps": 0}, r"`n_steps` must be an integer and at least 1, not 0", id="no-steps"),
    pytest.param({"n_steps": 5.0}, r"`n_steps` must be an integer", id="fractional-steps"),
    pytest.param({"n_steps": np.int64(0)}, r"`n_steps` must be an integer and at least 1", id="numpy-no-steps"),
    pytest.param({"envs_per_update": 0}, r"`envs_per_update` must be", id="no-chunk"),
    pytest.param({"gamma": 1.5}, r"`gamma` must be a number between 0 and 1.0, not 1.5", id="gamma"),
    pytest.param({"gae_lambda": float("nan")}, r"`gae_lambda` must be a number", id="nan"),
    pytest.param({"gamma": np.float32(-0.1)}, r"`gamma` must be a number between 0 and 1.0", id="numpy-gamma"),
    pytest.param({"ent_coef": -0.1}, r"`ent_coef` must be a number between 0 and inf, not -0.1", id="ent_coef"),
    pytest.param({"vf_coef": None}, r"`vf_coef` must be a number", id="none"),
    pytest.param({"gae_lambda": True}, r"`gae_lambda` must be a number", id="bool"),
    pytest.param({"max_grad_norm": "40"}, r"`max_grad_norm` must be a number", id="string"),
    pytest.param({"rollout_buffer_class": RolloutBuffer}, r"has no rollout buffer.*Leave", id="buffer"),
    pytest.param({"rollout_buffer_kwargs": {"x": 1}}, r"has no rollout buffer.*Leave", id="buffer-kwargs"),
    pytest.param({"device": "cuda"}, r"device='cuda'.*Use device='cpu' or 'auto'", id="cuda"),
    pytest.param({"device": th.device("cuda", 0)}, r"device='cuda:0'.*Use device='cpu'", id="cuda:0"),
    pytest.param({"start_method": "fork"}, r"`start_method` must be None, 'forkserver' or 'spawn'", id="fork"),
    pytest.param({"max_worker_restarts": -1}, r"`max_worker_restarts` must be an integer and at least 0", id="restarts"),
    pytest.param({"max_worker_restarts": None}, r"`max_worker_restarts` must be an integer", id="no-restarts"),
    pytest.param({"worker_timeout": 0}, r"`worker_timeout` must be a number of seconds above 0, or None", id="no-time"),
    pytest.param({"worker_timeout": "5"}, r"`worker_timeout` must be a number of seconds", id="time-as-text"),
    pytest.param({"worker_timeout": True}, r"`worker_timeout` must be a number of seconds", id="time-as-bool"),
    pytest.param({"policy": ContribMlpLstmPolicy}, r'sb3-contrib.*"MlpLstmPolicy"', id="contrib-mlp"),
    pytest.param({"policy": ContribCnnLstmPolicy}, r'sb3-contrib.*"CnnLstmPolicy"', id="contrib-cnn"),
    pytest.param({"policy": "GruPolicy"}, r"GruPolicy unknown", id="unknown-policy"),
    pytest.param({"policy": "CnnLstmPolicy"}, r"needs images.*Use `MlpLstmPolicy`", id="no-image"),
    pytest.param(
        {"policy_kwargs": {"optimizer_class": th.optim.LBFGS}}, r"LBFGS needs a closure.*Use an optimizer", id="closure"
    ),
    pytest.param(
        {"env": OtherSpace(spaces.Tuple([BOX, BOX]), DISCRETE)}, r"supports Box.*observation spaces", id="tuple-obs"
    ),
    pytest.param({"env": OtherSpace(BOX, spaces.Tuple([DISCRETE]))}, r"supports Box.*action spaces", id="tuple-action"),
    pytest.param({"env": OtherSpace(spaces.Dict(a=BOX), DISCRETE)}, r"MultiInputLstmPolicy", id="dict-obs"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_raise_before_any_process_starts(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_process_may_start(monkeypatch)
    arguments = {"policy": "MlpLstmPolicy", "env": cartpole(), **arguments}
    before = children()
    with pytest.raises(ValueError, match=message):
        A3C(**arguments)
    assert children() == before


LATER: list[Any] = [
    pytest.param("n_workers", -1, r"`n_workers` must be an integer and at least 0, not -1", id="n_workers"),
    pytest.param("n_workers", 1.5, r"`n_workers` must be an integer", id="fractional-workers"),
    pytest.param("n_workers", 5, r"n_workers=5, but there are only 4 environments", id="too-many"),
    pytest.param("start_method", "fork", r"`start_method` must be None, 'forkserver' or 'spawn'", id="fork"),
    pytest.param("max_worker_restarts", 1.5, r"`max_worker_restarts` must be an integer", id="restarts"),
    pytest.param("worker_timeout", -1.0, r"`worker_timeout` must be a number of seconds", id="timeout"),
    pytest.param("n_steps", 0, r"`n_steps` must be an integer and at least 1, not 0", id="n_steps"),
    pytest.param("envs_per_update", 0, r"`envs_per_update` must be an integer", id="envs_per_update"),
    pytest.param("gamma", 2, r"`gamma` must be a number between 0 and 1.0, not 2", id="gamma"),
    pytest.param("max_grad_norm", -1, r"`max_grad_norm` must be a number between 0 and inf", id="max_grad_norm"),
]


@pytest.mark.parametrize(("name", "value", "message"), LATER)
def test_what_is_changed_on_loading_is_checked(
    name: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    A3C("MlpPolicy", cartpole()).save(tmp_path / "model")
    no_process_may_start(monkeypatch)
    with pytest.raises(ValueError, match=message):
        A3C.load(tmp_path / "model", env=cartpole(), **{name: value}).learn(100)


@pytest.mark.parametrize("loaded", [False, True], ids=["", "loaded"])
@pytest.mark.parametrize(("name", "value", "message"), LATER)
def test_what_is_changed_later_is_checked_before_learning(
    name: str, value: Any, message: str, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = A3C("MlpPolicy", cartpole(), n_workers=2)
    if loaded:
        model.save(tmp_path / "model")
        model = A3C.load(tmp_path / "model", env=cartpole())
    no_process_may_start(monkeypatch)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        model.learn(100)


# --- good ones ------------------------------------------------------------------------------------------------------


def test_numpys_numbers_are_numbers(tmp_path: Path) -> None:
    one: Any = np.int64(1)
    hundred: Any = np.float32(100)
    numbers: dict[str, Any] = dict(
        n_workers=np.int64(2),
        n_steps=np.int32(5),
        envs_per_update=np.uint8(1),
        gamma=np.float32(0.9),
        gae_lambda=np.float64(0.8),
        ent_coef=np.float32(0.0),
        vf_coef=np.int64(1),
        max_grad_norm=np.float16(0.5),
        learning_rate=np.float64(1e-3),
    )
    model = A3C("MlpPolicy", cartpole(), take_turns=True, **numbers).learn(100 * one)
    assert (model.num_timesteps, model._n_updates) == (100, 20)
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-3
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=cartpole(), n_workers=one).learn(hundred)
    assert (loaded.num_timesteps, loaded._n_updates) == (100, 20 + 20)
    assert A3C("MlpPolicy", "CartPole-v1", n_workers=3 * one).n_envs == 3


def test_limits_are_allowed() -> None:
    limits: dict[str, Any] = dict(gamma=0, gae_lambda=1, ent_coef=0, vf_coef=0.0, max_grad_norm=float("inf"), n_steps=1)
    model = A3C("MlpPolicy", cartpole(), n_workers=4, envs_per_update=1, take_turns=True, **limits)
    assert model.learn(40)._n_updates == 40


def test_the_device_is_the_cpu_and_a_gpu_left_unused_is_mentioned_to_the_talkative(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    assert check_device("auto", 0) == check_device("cpu", 1) == check_device(th.device("cpu"), 1) == th.device("cpu")
    assert capsys.readouterr().out == ""
    assert check_device("auto", 1) == th.device("cpu")
    assert "There is a GPU" in capsys.readouterr().out
