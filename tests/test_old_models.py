"""Models that 0.1.0 saved load, predict and train as then, and public import paths stay."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C
from sb3_a3c.policies.torch_layers import BabyCNN

DATA = Path(__file__).parent / "data"
IMAGES = dict(screen_height=16, screen_width=16, n_channels=1, discrete=True)
MODELS = pytest.mark.parametrize("name", ["mlp_lstm", "cnn_lstm"])


def make_env(name: str) -> VecEnv:
    if name == "mlp_lstm":
        return make_vec_env("CartPole-v1", n_envs=4)
    return make_vec_env(FakeImageEnv, n_envs=2, env_kwargs=IMAGES)


@MODELS
def test_predictions(name: str) -> None:
    """The .npz file has what 0.1.0 predicted, deterministically and with the state passed on."""
    model = A3C.load(DATA / f"a3c_0_1_0_{name}.zip")
    saved = np.load(DATA / f"a3c_0_1_0_{name}.npz")
    state = None
    for t, obs in enumerate(saved["observations"]):
        actions, state = model.predict(obs, state, np.full(len(obs), t == 0), deterministic=True)
        np.testing.assert_array_equal(actions, saved["actions"][t])
    np.testing.assert_allclose(np.stack(state), saved["state"], atol=1e-5)  # type: ignore[arg-type]
    assert isinstance(model.policy.features_extractor, BabyCNN) == (name == "cnn_lstm")


@MODELS
def test_training_continues(name: str) -> None:
    model = A3C.load(DATA / f"a3c_0_1_0_{name}.zip", env=make_env(name), n_workers=2, take_turns=True)
    timesteps, n_updates = model.num_timesteps, model._n_updates
    steps = [float(state["step"]) for state in model.policy.optimizer.state.values()]
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    assert timesteps > 0
    assert min(steps) > 0
    model.learn(300, reset_num_timesteps=False)
    assert model.num_timesteps >= timesteps + 300
    assert model._n_updates > n_updates
    n_new = model._n_updates - n_updates
    assert [float(state["step"]) for state in model.policy.optimizer.state.values()] == [step + n_new for step in steps]
    assert not any(th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))


def test_old_defaults_stay(tmp_path: Path) -> None:
    """0.1.0 had other defaults: its models keep them, also when they are saved again."""
    model = A3C.load(DATA / "a3c_0_1_0_mlp_lstm.zip", env=make_env("mlp_lstm"), n_workers=0)
    model.learn(300).save(tmp_path / "model")
    again = A3C.load(tmp_path / "model")
    assert again.policy_kwargs == model.policy_kwargs
    assert again.policy.value_normalizer is None
    assert (again.policy.net_arch, again.policy.value_net.in_features) == ([], again.policy.lstm_hidden_size)
    for before, after in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        th.testing.assert_close(after, before, rtol=0, atol=0)


def without_version(path: Path) -> Path:
    """The file of a model as 0.1.0 would have written it."""
    old_path = path.with_name("old.zip")
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(old_path, "w") as old:
        for name in set(new.namelist()) - {"_sb3_a3c_version"}:
            old.writestr(name, new.read(name))
    return old_path


def test_old_feed_forward_models_load(tmp_path: Path) -> None:
    A3C("MlpPolicy", make_env("mlp_lstm")).save(tmp_path / "model.zip")
    assert A3C.load(without_version(tmp_path / "model.zip")).policy_kwargs == {}


def test_old_models_for_dictionaries_load(tmp_path: Path) -> None:
    network = dict(
        net_arch=[],
        lstm_hidden_size=256,
        normalize_values=False,
        features_extractor_class=CombinedExtractor,
    )
    model = A3C("MultiInputLstmPolicy", SimpleMultiObsEnv(random_start=False), policy_kwargs=network)
    del model.policy_kwargs["features_extractor_class"]  # as 0.1.0 saved it
    model.save(tmp_path / "model.zip")
    policy = A3C.load(without_version(tmp_path / "model.zip")).policy
    for new, old in zip(policy.state_dict().items(), model.policy.state_dict().items(), strict=True):
        assert new[0] == old[0]
        assert th.equal(new[1], old[1])


IMPORTS = """
import runpy, sys
from sb3_a3c import *
from sb3_a3c.errors import A3CError, DivergenceError, WorkerDiedError, WorkerTracebackError
from sb3_a3c.policies import LstmActorCriticCnnPolicy, LstmActorCriticPolicy, LstmMultiInputActorCriticPolicy
from sb3_a3c.convolutions import BabyCNN
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.resume import carry_over_monitor_files, continue_evaluations, newest_model
from sb3_a3c.zoo import main, register

for module in ("zoo", "doctor"):  # as `python -m` does
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(f"sb3_a3c.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_public_imports_and_commands() -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"usage: python -m sb3_a3c.{module}" in result.stdout for module in ("zoo", "doctor"))
