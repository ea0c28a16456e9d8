"""Saving and loading models, and setting parameters and environments."""

import base64
import io
import json
import time
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C, __version__
from tests.toy_envs import Images

BOTH = pytest.mark.parametrize("n_workers", [0, 2])
SMALL_LSTM: dict[str, Any] = dict(policy_kwargs=dict(lstm_hidden_size=16))


def cartpole(n_envs: int = 4, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, **kwargs)


def parameters_of(model: A3C) -> dict[str, Any]:
    """Parameters and moments, copied."""
    return deepcopy(model.get_parameters())


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def difference(one: Any, other: Any) -> list[str]:
    """Paths at which two trees of parameters are not bit-identical."""
    left, right = dict(leaves(one)), dict(leaves(other))
    unequal = [
        path
        for path in left.keys() & right.keys()
        if not (th.equal(left[path], right[path]) if isinstance(left[path], th.Tensor) else left[path] == right[path])
    ]
    return sorted(unequal + list(left.keys() ^ right.keys()))


# --- save and load ----------------------------------------------------------------------------------------------------

PENDULUM: dict[str, Any] = dict(use_sde=True, policy_kwargs=dict(squash_output=True))
MOMENTUM: dict[str, Any] = dict(policy_kwargs=dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.9)))
MODELS: list[Any] = [
    pytest.param("MlpPolicy", "CartPole-v1", {}, id="MLP, Adam"),
    pytest.param("MlpPolicy", "CartPole-v1", dict(use_rms_prop=True), id="MLP, RMSprop"),
    pytest.param("MlpPolicy", "CartPole-v1", MOMENTUM, id="MLP, momentum"),
    pytest.param("MlpLstmPolicy", "CartPole-v1", dict(use_rms_prop=True), id="LSTM, RMSprop"),
    pytest.param("MlpLstmPolicy", "Pendulum-v1", PENDULUM, id="LSTM, gSDE"),
    pytest.param("CnnLstmPolicy", Images, {}, id="CNN, Adam"),
]


@pytest.mark.parametrize(("policy", "env_id", "kwargs"), MODELS)
def test_loaded_model_learns_as_the_saved_one(policy: str, env_id: Any, kwargs: dict[str, Any]) -> None:
    env = make_vec_env(env_id, n_envs=3)
    kwargs = dict(learning_rate=lambda progress: 1e-2 * progress, envs_per_update=2, **kwargs)
    model = A3C(policy, env, n_workers=0, seed=1, **kwargs).learn(300)
    file, before = io.BytesIO(), parameters_of(model)
    model.save(file)
    results = []
    for each in (model, A3C.load(file, env=make_vec_env(env_id, n_envs=3))):
        assert not difference(before, each.get_parameters())
        each.set_random_seed(2)
        each.learn(300, reset_num_timesteps=False)
        results.append(parameters_of(each))
        assert (each.num_timesteps, each._n_updates) == (600, 20)
        assert difference(before, results[-1])
    assert not difference(*results)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_loaded_models_and_policies_predict_the_same(policy: str, tmp_path: Path) -> None:
    model = A3C(policy, cartpole(), n_workers=0, learning_rate=1e-3).learn(400)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pt"))
    loaded = A3C.load(tmp_path / "model")
    policies = [model.policy, loaded.policy, type(model.policy).load(str(tmp_path / "policy.pt"))]
    fresh = A3C(policy, cartpole())
    fresh.policy.load_state_dict(policies[2].state_dict())
    policies.append(fresh.policy)
    observations, starts = np.random.default_rng(0).normal(size=(30, 5, 4)), np.zeros(5, dtype=bool)
    for deterministic in (True, False):
        predictions = []
        for each in policies:
            th.manual_seed(0)
            state, actions = None, []
            for obs in observations.astype(np.float32):
                action, state = each.predict(obs, state, starts, deterministic)
                actions.append(action)
            predictions.append((np.stack(actions), *(state or ())))
        assert 0 < predictions[0][0].mean() < 1
        for others in predictions[1:]:
            assert len(others) == (3 if "Lstm" in policy else 1)
            for one, other in zip(predictions[0], others, strict=True):
                np.testing.assert_array_equal(one, other)


class SaveWhileWorkersRun(BaseCallback):
    """Saves once, when the workers wait for this callback, so that the shared parameters do not change."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.seen: dict[str, Any] = {}

    def _on_step(self) -> bool:
        if self.n_calls == 25:
            assert isinstance(self.model, A3C)
            while difference(self.seen, parameters_of(self.model)):
                self.seen = parameters_of(self.model)
                time.sleep(0.2)
            self.counts = (self.num_timesteps, self.model._n_updates)
            self.model.save(self.path)
        return True


@pytest.mark.parametrize(("policy", "use_rms_prop", "n_workers"), [("MlpPolicy", True, 0), ("MlpLstmPolicy", False, 2)])
def test_checkpoint_is_the_model_that_the_callback_sees(
    policy: str, use_rms_prop: bool, n_workers: int, tmp_path: Path
) -> None:
    kwargs: dict[str, Any] = dict(n_steps=5, use_rms_prop=use_rms_prop, learning_rate=1e-3)
    model = A3C(policy, cartpole(), n_workers=n_workers, take_turns=True, envs_per_update=2, **kwargs)
    before, checkpoint = parameters_of(model), SaveWhileWorkersRun(tmp_path / "checkpoint.zip")
    model.learn(400, callback=checkpoint)
    assert difference(checkpoint.seen["policy"], before["policy"])
    assert difference(checkpoint.seen["policy"], model.get_parameters()["policy"])

    loaded = A3C.load(tmp_path / "checkpoint.zip", env=cartpole())
    assert not difference(checkpoint.seen, loaded.get_parameters())
    assert (loaded.num_timesteps, loaded._n_updates) == checkpoint.counts
    moments = checkpoint.seen["policy.optimizer"]["state"]
    assert len(moments) == len(list(model.policy.parameters()))
    for state in moments.values():
        assert float(state["step"]) >= checkpoint.counts[1] >= 8  # workers may be ahead of the callbacks
        assert state["square_avg" if use_rms_prop else "exp_avg_sq"].max() > 0

    loaded.learn(200, reset_num_timesteps=False)
    assert loaded.num_timesteps == 100 + 200
    assert difference(checkpoint.seen, loaded.get_parameters())
    first = loaded.get_parameters()["policy.optimizer"]["state"][0]["step"]
    assert float(first) == float(moments[0]["step"]) + 2 * 200 / 20  # two chunks of environments in each rollout


def read_zip(path: Path) -> tuple[set[str], dict[str, Any]]:
    with zipfile.ZipFile(path) as file:
        return set(file.namelist()), json.loads(file.read("data"))


@BOTH
def test_checkpoint_contains_neither_workers_nor_environments(n_workers: int, tmp_path: Path) -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers, n_steps=5, take_turns=True)
    model.learn(200, callback=SaveWhileWorkersRun(tmp_path / "a3c.zip"))
    A2C("MlpPolicy", cartpole()).learn(20).save(tmp_path / "a2c.zip")
    names, data = read_zip(tmp_path / "a3c.zip")
    names_in_a2c, data_in_a2c = read_zip(tmp_path / "a2c.zip")
    assert names == names_in_a2c | {"_sb3_a3c_version"}
    own = {"n_workers", "envs_per_update", "anneal", "take_turns", "start_method", "max_worker_restarts", "worker_timeout"}
    own |= {"use_rms_prop", "rms_prop_eps"}
    assert data.keys() - data_in_a2c.keys() == own | {"_n_updates_at_start"}
    assert data_in_a2c.keys() <= data.keys() | {"rollout_buffer_class", "rollout_buffer_kwargs"}
    pickles = {
        key: base64.b64decode(value[":serialized:"])
        for key, value in data.items()
        if isinstance(value, dict) and ":serialized:" in value
    }
    assert b"LstmActorCriticPolicy" in pickles["policy_class"]  # names can be read there
    for key, pickled in pickles.items():
        for name in (b"multiprocessing", b"socket", b"vec_env", b"CartPole", b"collector", b"supervisor", b"sb3_a3c.store"):
            assert name not in pickled, (key, name)


def test_exclude_and_include(tmp_path: Path) -> None:
    path, env = tmp_path / "model.zip", cartpole(2)
    model = A3C("MlpPolicy", env, tensorboard_log=str(tmp_path), n_workers=2, take_turns=True, n_steps=5).learn(20)
    model.save(path, exclude=["tensorboard_log", "ep_info_buffer"], include=["env"])
    _, data = read_zip(path)
    assert "env" in data
    assert not {"tensorboard_log", "ep_info_buffer"} & data.keys()
    loaded = A3C.load(path)
    assert loaded.tensorboard_log is None
    assert loaded.get_env() is not None
    assert loaded.get_env() is not env
    loaded.learn(20, reset_num_timesteps=False)  # in the environments that were saved
    assert loaded.num_timesteps == model.num_timesteps + 20


# --- what can be changed on loading -----------------------------------------------------------------------------------


class EnvIndices(BaseCallback):
    """Collects ``env_index`` and ``mark`` of all infos."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: set[int] = set()
        self.marks: set[Any] = set()

    def _on_step(self) -> bool:
        self.indices |= {info["env_index"] for info in self.locals["infos"]}
        self.marks |= {info.get("mark") for info in self.locals["infos"]}
        return True


@pytest.mark.parametrize(("n_envs", "n_workers", "policy"), [(1, 0, "MlpPolicy"), (6, None, "MlpLstmPolicy")])
def test_different_number_of_environments_and_workers(
    n_envs: int, n_workers: int | None, policy: str, tmp_path: Path
) -> None:
    model = A3C(policy, cartpole(4), n_workers=2, n_steps=5, take_turns=True).learn(100)
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=cartpole(n_envs), n_workers=n_workers)
    assert not difference(model.get_parameters(), loaded.get_parameters())
    assert (loaded.n_envs, loaded.n_workers) == (n_envs, n_workers)
    seen = EnvIndices()
    loaded.learn(10 * n_envs, callback=seen, reset_num_timesteps=False)
    assert seen.indices == set(range(n_envs))
    assert loaded.num_timesteps == 100 + 10 * n_envs


def test_model_of_several_workers_predicts_with_a_single_environment(tmp_path: Path) -> None:
    model = A3C("MlpLstmPolicy", cartpole(4), n_workers=2).learn(100)
    model.save(tmp_path / "model")
    for env in (gym.make("CartPole-v1"), cartpole(1)):
        loaded = A3C.load(tmp_path / "model", env=env)
        assert not difference(model.get_parameters(), loaded.get_parameters())
        rewards, _ = evaluate_policy(loaded, loaded.get_env(), 2, return_episode_rewards=True, warn=False)  # type: ignore[arg-type]
        assert len(rewards) == 2  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"n_workers=2"):
            loaded.learn(20)
    loaded.n_workers = 0
    loaded.learn(20)
    assert difference(model.get_parameters(), loaded.get_parameters())


def test_custom_objects_replace_the_learning_rate(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = dict(n_steps=5, n_workers=0, envs_per_update=2)
    model = A3C("MlpPolicy", cartpole(), learning_rate=lambda progress: 0.1, **kwargs).learn(20)
    model.save(tmp_path / "model")
    saved = parameters_of(model)
    frozen = A3C.load(
        tmp_path / "model", env=cartpole(), custom_objects={"learning_rate": 0.0, "lr_schedule": lambda progress: 0.0}
    )
    frozen.learn(100)
    assert frozen._n_updates >= 10
    assert not difference(saved["policy"], frozen.get_parameters()["policy"])
    slow = A3C.load(tmp_path / "model", env=cartpole(), custom_objects={"learning_rate": lambda progress: 1e-4})
    slow.learn(100)
    assert difference(saved["policy"], slow.get_parameters()["policy"])
    assert slow.policy.optimizer.param_groups[0]["lr"] == 1e-4
    largest = max(float((p - saved["policy"][name]).abs().max()) for name, p in slow.policy.state_dict().items())
    assert 0 < largest < 3e-3  # each of Adam's 10 steps is about as long as the rate


def test_print_system_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A3C("MlpPolicy", cartpole(1)).save(tmp_path / "model")
    A3C.load(tmp_path / "model", print_system_info=True)
    output = capsys.readouterr().out
    assert output.index("== CURRENT SYSTEM INFO ==") < output.index("== SAVED MODEL SYSTEM INFO ==")
    assert output.count(f"PyTorch: {th.__version__}") == 2
    assert f"== sb3_a3c: {__version__}; the model was saved by {__version__} ==" in output
    old = Path(__file__).parent.parent / "data" / "a3c_0_1_0_mlp_lstm.zip"
    A3C.load(old, print_system_info=True)
    assert f"== sb3_a3c: {__version__}; the model was saved by 0.1.0 or before ==" in capsys.readouterr().out


# --- continuing -------------------------------------------------------------------------------------------------------


class RolloutFinished(BaseCallback):
    """Timesteps, progress and learning rate at the start of each of SB3's rollouts, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, ...]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.seen.append((self.num_timesteps, self.model._current_progress_remaining, self._rate()))

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _rate(self) -> float:
        rate: float = self.model.lr_schedule(self.model._current_progress_remaining)
        return rate


@pytest.mark.parametrize(("n_workers", "loaded"), [(0, True), (2, False)], ids=["loaded", "2 workers"])
def test_counts_and_schedules_continue_as_in_a2c(n_workers: int, loaded: bool, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = dict(n_steps=5, learning_rate=lambda progress: 1e-3 * progress)
    runs = []
    a3c = dict(n_workers=n_workers, take_turns=True, envs_per_update=4 if n_workers == 0 else 2)
    for model in (A2C("MlpPolicy", cartpole(), **kwargs), A3C("MlpPolicy", cartpole(), **kwargs, **a3c)):  # type: ignore[arg-type]
        each: Any = model
        run: list[Any] = []
        for n_timesteps, reset in ((100, True), (60, False), (140, False), (60, True)):
            progress = RolloutFinished()
            each.learn(n_timesteps, callback=progress, reset_num_timesteps=reset)
            rate = each.policy.optimizer.param_groups[0]["lr"]
            if isinstance(each, A2C):  # sets the rate before its last update, A3C after it
                rate = progress.seen[-1][2]
            run.append((progress.seen, each.num_timesteps, each._total_timesteps, rate))
            if loaded:
                each.save(tmp_path / "model")
                each = type(each).load(tmp_path / "model", env=cartpole())
        run.append(each._n_updates)
        runs.append(run)
    assert runs[0][:-1] == runs[1][:-1]
    assert runs[0][-1] == 360 / 20
    assert runs[1][-1] == runs[0][-1] * (1 if n_workers == 0 else 2)  # each of 2 workers makes updates
    assert [timesteps for _, timesteps, _, _ in runs[1][:-1]] == [100, 160, 300, 60]


# --- setting parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "policy", "use_rms_prop"),
    [("dict", "MlpLstmPolicy", False), ("path", "MlpPolicy", True), ("file", "MlpPolicy", False)],
)
def test_set_parameters_sets_weights_and_optimizer_state(
    source: str, policy: str, use_rms_prop: bool, tmp_path: Path
) -> None:
    kwargs: dict[str, Any] = dict(n_steps=5, n_workers=0, use_rms_prop=use_rms_prop)
    model, other = (A3C(policy, cartpole(), **kwargs, seed=seed).learn(n) for seed, n in ((1, 100), (2, 60)))
    model.save(tmp_path / "model.zip")
    assert difference(model.get_parameters(), other.get_parameters())
    given: Any = model.get_parameters() if source == "dict" else str(tmp_path / "model.zip")
    if source == "file":
        given = io.BytesIO((tmp_path / "model.zip").read_bytes())
    assert source != "dict" or given.keys() == {"policy", "policy.optimizer"}
    other.set_parameters(given)
    assert not difference(model.get_parameters(), other.get_parameters())
    for each in (model, other):
        each.set_random_seed(3)
        each.learn(100)
    assert not difference(model.get_parameters(), other.get_parameters())
    other.set_random_seed(4)
    model.set_random_seed(3)
    assert difference(*(parameters_of(each.learn(100)) for each in (model, other)))


@BOTH
def test_workers_start_from_parameters_and_optimizer_state_that_were_set(n_workers: int) -> None:
    policy_kwargs = dict(lstm_hidden_size=8, normalize_values=False)  # their statistics would change without learning too
    kwargs: dict[str, Any] = dict(n_steps=5, envs_per_update=2, take_turns=True, policy_kwargs=policy_kwargs)
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers, learning_rate=0.0, **kwargs).learn(100)
    new = parameters_of(A3C("MlpLstmPolicy", cartpole(), n_workers=0, learning_rate=1e-2, **kwargs).learn(40))
    new["policy.optimizer"]["param_groups"][0]["lr"] = 0.0
    assert difference(model.get_parameters()["policy"], new["policy"])
    model.set_parameters(new)
    model.learn(60)
    after = model.get_parameters()
    assert not difference(after["policy"], new["policy"])
    assert {float(state["step"]) for state in new["policy.optimizer"]["state"].values()} == {4.0}
    assert {float(state["step"]) for state in after["policy.optimizer"]["state"].values()} == {4.0 + 6.0}


def test_set_some_parameters() -> None:
    model = A3C("MlpPolicy", cartpole(), n_workers=0).learn(40)
    before, part = parameters_of(model), {"policy": {"value_net.bias": th.ones(1)}}
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        model.set_parameters({"policy": before["policy"]})
    model.set_parameters(part, exact_match=False)
    assert difference(before, model.get_parameters()) == ["/policy/value_net.bias"]
    assert model.get_parameters()["policy"]["value_net.bias"] == 1


# --- setting environments ---------------------------------------------------------------------------------------------


class Marked(gym.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {**info, "mark": "new"}


@pytest.mark.parametrize(("n_workers", "loaded"), [(0, False), (2, True)])
def test_training_continues_in_environments_that_were_set(n_workers: int, loaded: bool, tmp_path: Path) -> None:
    model, seen = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers, n_steps=5, take_turns=True), EnvIndices()
    model.learn(100, callback=seen)
    assert seen.marks == {None}
    if loaded:
        model.save(tmp_path / "model")
        model = A3C.load(tmp_path / "model")
    env, before, seen = cartpole(wrapper_class=Marked), parameters_of(model), EnvIndices()
    model.set_env(env)
    assert model.get_env() is env
    model.learn(100, callback=seen, reset_num_timesteps=False)
    assert seen.marks == {"new"}
    assert seen.indices == {0, 1, 2, 3}
    assert model.num_timesteps == 200
    assert difference(before["policy"], model.get_parameters()["policy"])


def test_environments_that_do_not_fit(tmp_path: Path) -> None:
    model = A3C("MlpPolicy", cartpole())
    with pytest.raises(AssertionError, match=r"A3C\.load\(path, env\)"):
        model.set_env(cartpole(2))
    model.save(tmp_path / "model")
    for use in (model.set_env, lambda env: A3C.load(tmp_path / "model", env=env)):
        with pytest.raises(ValueError, match="Observation spaces do not match"):
            use(make_vec_env("Acrobot-v1", n_envs=4))
