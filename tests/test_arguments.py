"""What can't be used is said before anything starts; what can be used is taken in every form."""

import inspect
import math
import multiprocessing
import os
import random
import re
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
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
from stable_baselines3.common.utils import LinearSchedule
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
    pytest.param({"n_workers": 10**30, "env": "CartPole-v1"}, r"`n_workers`.*\(and at most 10000: each", id="far-too-many"),
    pytest.param({"n_steps": 0}, r"`n_steps` must be an integer and at least 1, not 0", id="no-steps"),
    pytest.param({"n_steps": 10**30}, r"`n_steps`.*at most 1000000000: a rollout is kept in memory", id="endless"),
    pytest.param({"n_steps": 5.0}, r"`n_steps` must be an integer", id="fractional-steps"),
    pytest.param({"n_steps": np.int64(0)}, r"`n_steps` must be an integer and at least 1", id="numpy-no-steps"),
    pytest.param({"envs_per_update": 0}, r"`envs_per_update` must be", id="no-chunk"),
    pytest.param({"envs_per_update": 2**63}, r"`envs_per_update` must be.*at most 2\*\*63 - 1\)", id="huge-chunk"),
    pytest.param(
        {"learning_rate": -1}, r"`learning_rate` must be a number between 0 and 1000000.0, or a f", id="negative-lr"
    ),
    pytest.param({"learning_rate": lambda: 1}, r"`learning_rate`.* function that returns one", id="wrong-function"),
    pytest.param({"gamma": 1.5}, r"`gamma` must be a number between 0 and 1.0, not 1.5", id="gamma"),
    pytest.param({"gae_lambda": float("nan")}, r"`gae_lambda` must be a number", id="nan"),
    pytest.param({"gamma": np.float32(-0.1)}, r"`gamma` must be a number between 0 and 1.0", id="numpy-gamma"),
    pytest.param({"ent_coef": -0.1}, r"`ent_coef` must be a finite number and at least 0, not -0.1", id="ent_coef"),
    pytest.param({"ent_coef": math.inf}, r"`ent_coef` must be a finite number", id="infinite"),
    pytest.param({"use_rms_prop": "False"}, r"`use_rms_prop` must be True or False, not 'False'", id="flag-as-text"),
    pytest.param({"rms_prop_eps": 0}, r"`rms_prop_eps` must be a finite number above 0, not 0 \(RMSprop divides", id="eps"),
    pytest.param({"stats_window_size": 0}, r"`stats_window_size` must be an integer and at least 1", id="no-window"),
    pytest.param({"seed": -1}, r"`seed` must be .* at least 0, not -1 \(and at most 2\*\*32 - 1, or None\)", id="seed"),
    pytest.param({"verbose": "1"}, r"`verbose` must be 0, 1 or 2, not '1'", id="verbose"),
    pytest.param({"tensorboard_log": True}, r"`tensorboard_log` must be a path, or None, not True", id="log"),
    pytest.param({"policy_kwargs": [64]}, r"`policy_kwargs` must be a dictionary", id="list-of-layers"),
    pytest.param({"vf_coef": None}, r"`vf_coef` must be a finite number", id="none"),
    pytest.param({"gae_lambda": True}, r"`gae_lambda` must be a number", id="bool"),
    pytest.param({"max_grad_norm": "40"}, r"`max_grad_norm` must be a number", id="string"),
    pytest.param({"rollout_buffer_class": RolloutBuffer}, r"must be left out.*has no rollout buffer", id="buffer"),
    pytest.param({"rollout_buffer_kwargs": {"x": 1}}, r"must be left out.*has no rollout buffer", id="buffer-kwargs"),
    pytest.param({"device": "cuda"}, r"device='cuda'.*Use device='cpu' or 'auto'", id="cuda"),
    pytest.param({"device": th.device("cuda", 0)}, r"device='cuda:0'.*Use device='cpu'", id="cuda:0"),
    pytest.param({"start_method": "fork"}, r"`start_method` must be None, 'forkserver' or 'spawn'", id="fork"),
    pytest.param({"max_worker_restarts": -1}, r"`max_worker_restarts` must be an integer and at least 0", id="restarts"),
    pytest.param({"max_worker_restarts": None}, r"`max_worker_restarts` must be an integer", id="no-restarts"),
    pytest.param({"worker_timeout": 0}, r"`worker_timeout` must be a number of seconds above 0, or None", id="no-time"),
    pytest.param({"worker_timeout": "5"}, r"`worker_timeout` must be a number of seconds", id="time-as-text"),
    pytest.param({"worker_timeout": math.inf}, r"`worker_timeout` .*above 0, or None, not inf", id="infinite-time"),
    pytest.param({"worker_timeout": True}, r"`worker_timeout` must be a number of seconds", id="time-as-bool"),
    pytest.param({"policy": ContribMlpLstmPolicy}, r'sb3-contrib.*"MlpLstmPolicy"', id="contrib-mlp"),
    pytest.param({"policy": ContribCnnLstmPolicy}, r'sb3-contrib.*"CnnLstmPolicy"', id="contrib-cnn"),
    pytest.param({"policy": "GruPolicy"}, r"GruPolicy unknown", id="unknown-policy"),
    pytest.param({"policy": 5}, r"`policy` must be one of 'MlpPolicy', .* a subclass of ActorCriticPolicy", id="no-policy"),
    pytest.param({"env": "CartPol-v1"}, r"`env`: 'CartPol-v1' can't be made: NameNotFound: .*CartPole", id="unknown-env"),
    pytest.param({"env": None}, r"`env` is None", id="no-env"),
    pytest.param({"env": OtherSpace}, r"`env` must be an environment, or the id of one, not <class", id="class-of-env"),
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
    pytest.param("learning_rate", "1e-3", r"`learning_rate` must be a number", id="learning_rate"),
    pytest.param("normalize_advantage", "no", r"`normalize_advantage` must be True or False", id="normalize_advantage"),
    pytest.param("_stats_window_size", 0, r"`stats_window_size` must be an integer and at least 1", id="window"),
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


# --- any argument ---------------------------------------------------------------------------------------------------


NASTY: list[Any] = [
    *(None, True, False, np.bool_(True), np.array(True)),
    *(-1, 0, 1, 2, 3, 10**9 + 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 10**30, -(10**30), 10**400, 10**5000),
    *(-0.5, 0.0, 0.5, 1.0, 1.5, 1e-50, 1e30, 1e300, math.nan, math.inf, -math.inf, 1e-3 + 0j),
    *(Decimal(1), Decimal("nan"), Fraction(1, 2), timedelta(1)),
    *(np.int64(1), np.uint8(3), np.int8(-1), np.uint64(2**64 - 1), np.float16(0.5), np.float32(0.1), np.float64("nan")),
    *(np.complex64(1), np.longdouble("1e4000"), np.timedelta64(1, "s"), np.datetime64("2000"), np.str_("auto")),
    *(np.array(1), np.array(0.5), np.array([1]), np.array([0.5, 2]), np.array([]), np.array("cpu"), np.array([None, "x"])),
    *(th.tensor(1), th.tensor(0.5), th.tensor([1, 2]), th.tensor([]), th.tensor(True), th.float32, th.device("meta")),
    *("", "auto", "cpu", "cuda:0", "a:b:c", "Nonsense", "1", "True", "\0", "spawn", "fork", "MlpLstmPolicy", "x" * 100),
    *(b"bytes", b"", [], [1], (), (1, 2), set(), {1}, {}, {"x": 1}, {1: 2}, range(3), (i for i in range(3)), slice(3)),
    *(object(), object, int, RolloutBuffer, gym.Env, Path("log"), A3C, NotImplemented, ..., BOX, memoryview(b"x")),
    *(lambda: 1, lambda _: 1e-3, lambda _: "x", lambda _: math.nan, lambda _: -1, lambda _: None, lambda x: 1 / (x - 1)),
    *(abs, print, LinearSchedule(1e-3, 0, 0.5), gym.spaces, gym.make("Pendulum-v1"), th.nn.Linear(1, 1)),
]
ARGUMENTS = [name for name in inspect.signature(A3C).parameters if not name.startswith("_")]
#: Errors of others that say as well which argument it is.
IN_OTHER_WORDS = {"use_sde": "gSDE", "policy_kwargs": "got an unexpected keyword argument 'x'"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(200))
def test_any_argument_is_refused_by_its_name_or_works(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_process_may_start(monkeypatch)
    monkeypatch.chdir(tmp_path)  # any string is a path for `tensorboard_log`
    rng = random.Random(seed)
    base: dict[str, Any] = rng.choice([dict(env="CartPole-v1"), dict(env="Pendulum-v1", use_sde=True)])
    changes = {name: rng.choice(NASTY) for name in rng.sample(ARGUMENTS, rng.choice([1, 2]))}
    arguments: dict[str, Any] = dict(policy="MlpPolicy", n_workers=0, n_steps=5, policy_kwargs=dict(net_arch=[4]))
    before, refusal = children(), ""
    try:
        model = A3C(**{**arguments, **base, **changes})
        if model.n_workers == 0:
            model.learn(20).logger.close()
        assert all(parameter.isfinite().all() for parameter in model.policy.parameters()), changes
    except (TypeError, ValueError) as error:
        refusal = str(error)
    words = [rf"\b{name}\b" for name in changes] + [IN_OTHER_WORDS[name] for name in changes if name in IN_OTHER_WORDS]
    assert not refusal or any(re.search(word, refusal) for word in words), (changes, refusal)
    assert len(refusal) < 500
    assert children() == before


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


def test_numpys_small_numbers_do_not_overflow() -> None:
    numbers: dict[str, Any] = dict(
        n_steps=np.uint8(100),
        learning_rate=np.float32(0.5),
        use_rms_prop=np.bool_(True),
        stats_window_size=np.int8(5),
        seed=np.int64(1),
        max_grad_norm=10**30,
    )
    model = A3C("MlpPolicy", cartpole(), n_workers=0, **numbers).learn(800)
    assert (model.num_timesteps, model._n_updates) == (800, 2)
    assert model.ep_info_buffer is not None
    assert model.ep_info_buffer.maxlen == 5
    assert isinstance(model.policy.optimizer, th.optim.RMSprop)
    assert [model.seed, model.n_steps, model.learning_rate] == [1, 100, 0.5]
    assert {type(model.seed), type(model.n_steps), type(model.learning_rate)} == {int, float}


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
