"""Bad arguments raise a ValueError that names them, before any worker process starts."""

import math
import multiprocessing
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
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_a3c import A3C
from sb3_a3c.arguments import check_device


def cartpole() -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=4)


@pytest.fixture
def no_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)


class Spaces(gym.Env[Any, Any]):
    """An environment with these spaces, which is never stepped."""

    render_mode = None

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


class OwnVecEnv(DummyVecEnv):
    """A user's own class, which can't be split."""


BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

#: Name, bad value, and a part of the error; for arguments that can change after the constructor.
CHANGEABLE: list[Any] = [
    ("n_workers", -1, r"`n_workers` must be an integer and at least 0, or None \(one for each core\), not -1"),
    ("n_workers", 1.5, "`n_workers` must be an integer"),
    ("n_workers", True, "`n_workers` must be an integer and at least 0.*not True"),
    ("n_workers", 5, "n_workers=5, but the number of environments is 4.*Use n_workers=4"),
    ("n_steps", 0, "`n_steps` must be an integer and at least 1, not 0"),
    ("n_steps", 5.0, "`n_steps` must be an integer"),
    ("n_steps", np.int64(0), "`n_steps` must be an integer and at least 1"),
    ("envs_per_update", 0, "`envs_per_update` must be an integer and at least 1, not 0"),
    ("learning_rate", -1, "`learning_rate` must be a finite number and at least 0, or a function.*not -1"),
    ("learning_rate", "1e-3", "`learning_rate` must be a finite number.*not '1e-3'"),
    ("learning_rate", lambda progress: math.nan, "`learning_rate` must be.*a function of the remaining progress.*not nan"),
    ("gamma", 1.5, "`gamma` must be a number between 0 and 1.0, not 1.5"),
    ("gae_lambda", math.nan, "`gae_lambda` must be a number between 0 and 1.0, not nan"),
    ("ent_coef", -0.1, "`ent_coef` must be a number between 0 and inf, not -0.1"),
    ("vf_coef", None, "`vf_coef` must be a number"),
    ("max_grad_norm", "40", "`max_grad_norm` must be a number between 0 and inf, not '40'"),
    ("anneal", 0.5, "`anneal` must be True or False, not 0.5"),
    ("take_turns", "no", "`take_turns` must be True or False, not 'no'"),
    ("start_method", "fork", "`start_method` must be None, 'forkserver' or 'spawn', not 'fork'"),
    ("max_worker_restarts", -1, "`max_worker_restarts` must be an integer and at least 0"),
    ("max_worker_restarts", None, "`max_worker_restarts` must be an integer"),
    ("worker_timeout", 0, "`worker_timeout` must be a number of seconds above 0, or None"),
    ("worker_timeout", math.inf, "`worker_timeout` must be a number of seconds above 0, or None for no limit, not inf"),
]
CONSTRUCTOR: list[Any] = [
    ("rollout_buffer_class", RolloutBuffer, "must be None.*has no rollout buffer"),
    ("rollout_buffer_kwargs", {"x": 1}, "must be None.*has no rollout buffer"),
    ("device", "cuda", "device='cuda'.*Use device='cpu' or 'auto'"),
    ("device", th.device("cuda", 0), "device='cuda:0'.*Use device='cpu'"),
    ("policy", ContribMlpLstmPolicy, 'sb3-contrib.*"MlpLstmPolicy"'),
    ("policy", ContribCnnLstmPolicy, 'sb3-contrib.*"CnnLstmPolicy"'),
    ("policy", "GruPolicy", "`policy` must be one of 'MlpPolicy', .* a subclass of ActorCriticPolicy, not 'GruPolicy'"),
    ("policy", 5, "`policy` must be one of .*, not 5"),
    ("policy_kwargs", {"optimizer_class": th.optim.LBFGS}, "LBFGS needs a closure.*Use an optimizer"),
    ("env", "CartPol-v1", "`env`: 'CartPol-v1' can't be made: NameNotFound: .*CartPole"),
    ("env", None, "`env` is None"),
    ("env", Spaces, "`env` must be an environment, or the id of one, not the class Spaces"),
    ("env", Spaces(spaces.Tuple([BOX, BOX]), DISCRETE), "supports Box.*observation spaces, not Tuple"),
    ("env", Spaces(spaces.Dict(a=BOX), DISCRETE), 'use "MultiInputLstmPolicy".*not LstmActorCriticPolicy'),
]


@pytest.mark.usefixtures("no_process_starts")
@pytest.mark.parametrize(("name", "value", "message"), CHANGEABLE + CONSTRUCTOR)
def test_constructor(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {"policy": "MlpLstmPolicy", "env": cartpole(), name: value}
    with pytest.raises(ValueError, match=message):
        A3C(**arguments)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, of two workers."""
    path = tmp_path_factory.mktemp("arguments") / "model.zip"
    A3C("MlpPolicy", cartpole(), n_workers=2).save(path)
    return path


@pytest.mark.usefixtures("no_process_starts")
@pytest.mark.parametrize(("name", "value", "message"), [*CHANGEABLE, ("device", "cuda", "device='cuda'")])
def test_load(name: str, value: Any, message: str, path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        A3C.load(path, env=cartpole(), **{name: value}).learn(100)


def test_load_with_a_single_environment(path: Path) -> None:
    """It is not copied for each worker, as it is in the constructor; what the error proposes works."""
    env = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match=r"the number of environments is 1,.* `load\(…, n_workers=1\)`"):
        A3C.load(path, env=env).learn(100)
    assert A3C.load(path, env=env, n_workers=1).learn(100).num_timesteps == 100


@pytest.mark.usefixtures("no_process_starts")
@pytest.mark.parametrize(("name", "value", "message"), [case for case in CHANGEABLE if case[0] != "learning_rate"])
def test_attributes_changed_before_learn(name: str, value: Any, message: str, path: Path) -> None:
    model = A3C.load(path, env=cartpole())
    setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        model.learn(100)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_steps", 0, "`n_steps` must be an integer"),
        ("gamma", 2, "`gamma` must be a number"),
        ("max_grad_norm", -1, "`max_grad_norm` must be"),
        ("lr_schedule", lambda progress: -1.0, "`lr_schedule` must be a finite number and at least 0, or a function"),
        ("lr_schedule", 1e-3, "`lr_schedule` must be a function of the remaining progress.*not 0.001"),
        ("take_turns", True, "`take_turns` can't be changed while workers run"),
    ],
)
def test_attributes_changed_by_a_callback(name: str, value: Any, message: str) -> None:
    def change(local: dict[str, Any], _: dict[str, Any]) -> bool:
        setattr(local["self"], name, value)
        return True

    model = A3C("MlpPolicy", cartpole(), n_workers=0)
    with pytest.raises(ValueError, match=message):
        model.learn(1000, callback=change)
    assert 0 < model.num_timesteps < 1000


@pytest.mark.usefixtures("no_process_starts")
@pytest.mark.parametrize(
    ("kwargs", "has_ray", "message"),
    [
        (dict(cluster="somewhere"), True, "`cluster` must be 'auto', 'host:port' of the head.*not 'somewhere'"),
        (dict(cluster=6379), True, "`cluster` must be 'auto', 'host:port'"),
        (dict(cluster=dict(adress="auto")), True, "`cluster` must be .*a dictionary with `address`.*'adress'"),
        (dict(cluster="auto"), False, r"needs Ray, which is not installed: pip install \"ray"),
        (dict(cluster="auto", take_turns=True), True, "`take_turns` is not possible on a cluster"),
        (dict(cluster="auto", n_workers=0), True, "n_workers=0 trains in this process: leave out `cluster`"),
    ],
)
def test_cluster(kwargs: dict[str, Any], has_ray: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_a3c.arguments._has_ray", lambda: has_ray)
    with pytest.raises(ValueError, match=message):
        A3C("MlpPolicy", cartpole(), **kwargs)


@pytest.mark.usefixtures("no_process_starts")
def test_environments_that_do_not_suit_the_workers(path: Path) -> None:
    vec_env = OwnVecEnv([lambda: gym.make("CartPole-v1")] * 4)
    with pytest.raises(ValueError, match=r"can't deal the environments of a OwnVecEnv out.*n_workers=0"):
        A3C("MlpPolicy", vec_env, n_workers=2)
    model = A3C.load(path)
    with pytest.raises(ValueError, match=r"call `set_env\(env\)`"):
        model.learn(100)
    model = A3C.load(path, env=cartpole())
    model.set_env(vec_env)
    with pytest.raises(ValueError, match=r"OwnVecEnv out.*n_workers=0"):
        model.learn(100)


def test_numbers_of_numpy(tmp_path: Path) -> None:
    integers: dict[str, Any] = dict(n_workers=2, n_steps=5, envs_per_update=1, max_worker_restarts=1, seed=1)
    floats: dict[str, Any] = dict(
        gamma=0.9, gae_lambda=0.8, ent_coef=0.0, vf_coef=1.0, max_grad_norm=0.75, learning_rate=0.5
    )
    floats["worker_timeout"] = 100.0
    numbers = {k: np.int64(v) for k, v in integers.items()} | {k: np.float32(v) for k, v in floats.items()}
    model = A3C("MlpPolicy", cartpole(), take_turns=True, **numbers).learn(100 * np.int64(1))  # type: ignore[arg-type]
    assert (model.num_timesteps, model._n_updates) == (100, 20)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.5
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=cartpole(), n_workers=np.int64(0)).learn(np.float32(100))  # type: ignore[arg-type]
    assert (loaded.num_timesteps, loaded._n_updates) == (100, 20 + 20)
    assert A3C("MlpPolicy", "CartPole-v1", n_workers=np.int64(3)).n_envs == 3  # type: ignore[arg-type]


def test_limits_are_allowed() -> None:
    limits: dict[str, Any] = dict(gamma=0, gae_lambda=1, ent_coef=0, vf_coef=0.0, max_grad_norm=math.inf, n_steps=1)
    model = A3C("MlpPolicy", cartpole(), n_workers=0, envs_per_update=1, learning_rate=0, rollout_buffer_kwargs={}, **limits)
    assert model.learn(40)._n_updates == 40


def test_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    assert check_device("auto", 0) == check_device("cpu", 1) == check_device(th.device("cpu"), 1) == th.device("cpu")
    assert capsys.readouterr().out == ""
    assert check_device("auto", 1) == th.device("cpu")
    assert "There is a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("total", ["1000", None, math.nan, -math.inf, [10]])
def test_total_timesteps(total: Any) -> None:
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=0)
    with pytest.raises(ValueError, match=r"`total_timesteps` must be a number of timesteps, not "):
        model.learn(total)


def test_arguments_of_other_algorithms_are_listed_at_once() -> None:
    ppo: dict[str, Any] = dict(n_epochs=10, batch_size=128, clip_range=0.2, clip_range_vf=None, target_kl=0.1, n_stacks=1)
    policy_kwargs = dict(enable_critic_lstm=True, share_features_extractor=False, lstm_kwargs=dict(bidirectional=True))
    with pytest.raises(ValueError, match="not possible in A3C") as caught:
        A3C("MlpLstmPolicy", cartpole(), **ppo, policy_kwargs=policy_kwargs)
    first, *lines = str(caught.value).splitlines()
    assert first == "These arguments are not possible in A3C:"
    assert [line.split(":")[0] for line in lines] == [*(f"`{name}`" for name in ppo), *["policy_kwargs"] * 3]
    assert (
        lines[1] == "`batch_size`: leave it out, each update learns from `n_steps` steps of `envs_per_update` environments"
    )
    assert lines[5] == "`n_stacks`: A3C has no such argument"
    for line, name in zip(lines[6:], ("enable_critic_lstm", "share_features_extractor", "bidirectional"), strict=True):
        assert f"`{name}" in line
    A3C("MlpPolicy", cartpole(), policy_kwargs=dict(share_features_extractor=False))  # as in A2C


def test_the_clipping_of_a2c_is_small() -> None:
    with pytest.warns(UserWarning, match=r"sum over the 8 steps of a rollout.*: 4 clips as theirs does") as caught:
        A3C("MlpPolicy", cartpole(), max_grad_norm=0.5, n_steps=8)
    assert [warning.filename for warning in caught] == [__file__]
