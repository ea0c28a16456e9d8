"""What `-optimize` tries: always settings that A3C accepts, and again the same when they come back from a study."""

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_a3c import A3C
from sb3_a3c.zoo.hyperparams_opt import convert_a3c_params, sample_a3c_params

EITHER_POLICY = pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
ANY_NUMBER = pytest.mark.parametrize("n_envs", [1, 3, 8])

#: A trial's values as optuna stores them, and what they are for A3C.
VALUES = {
    "n_steps_pow": 5,
    "envs_per_update_pow": 1,
    "one_minus_gamma": 0.01,
    "one_minus_gae_lambda": 0.125,
    "learning_rate": 1e-3,
    "ent_coef": 1e-4,
    "vf_coef": 0.25,
    "max_grad_norm": 10.0,
    "normalize_advantage": True,
    "net_arch": "small",
    "activation_fn": "relu",
}
ARGUMENTS = {
    "n_steps": 32,
    "envs_per_update": 2,
    "gamma": 0.99,
    "gae_lambda": 0.875,
    "learning_rate": 1e-3,
    "ent_coef": 1e-4,
    "vf_coef": 0.25,
    "max_grad_norm": 10.0,
    "normalize_advantage": True,
    "policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": nn.ReLU},
}


def trials(policy: str, n: int = 10) -> Iterator[optuna.Trial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(n):
        trial = study.ask()
        trial.set_user_attr("recurrent", "Lstm" in policy)
        yield trial


def fixed(policy: str, **values: Any) -> Any:
    trial = optuna.trial.FixedTrial(VALUES | values)
    trial.set_user_attr("recurrent", "Lstm" in policy)
    return trial


@pytest.fixture(params=[1, 3, 8])
def env(request: pytest.FixtureRequest) -> Iterator[VecEnv]:
    vec_env = make_vec_env("CartPole-v1", n_envs=request.param)
    yield vec_env
    vec_env.close()


@EITHER_POLICY
def test_a3c_accepts_what_is_sampled(policy: str, env: VecEnv) -> None:
    for trial in trials(policy):
        sampled = sample_a3c_params(trial, 0, env.num_envs, {})
        model = A3C(policy, env, n_workers=1, **sampled)
        assert model.n_steps == 2 ** trial.params["n_steps_pow"]
        assert model.envs_per_update <= env.num_envs
        assert model.gamma == trial.user_attrs["gamma"]
        assert model.gae_lambda == trial.user_attrs["gae_lambda"]
        assert all(model.policy_kwargs[key] == value for key, value in sampled["policy_kwargs"].items())


@EITHER_POLICY
@ANY_NUMBER
def test_a_trial_is_converted_to_what_was_sampled(policy: str, n_envs: int) -> None:
    for trial in trials(policy):
        sampled = sample_a3c_params(trial, 0, n_envs, {})
        assert sampled == convert_a3c_params(trial.params)


@pytest.mark.parametrize(("n_envs", "expected"), [(1, {1}), (3, {1, 2}), (8, {1, 2, 4, 8})])
def test_an_update_learns_from_at_most_all_environments(n_envs: int, expected: set[int]) -> None:
    sampled = {sample_a3c_params(trial, 0, n_envs, {})["envs_per_update"] for trial in trials("MlpPolicy", n=50)}
    assert sampled == expected


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy"])
def test_the_size_of_the_lstm(policy: str) -> None:
    sampled = sample_a3c_params(fixed(policy, lstm_hidden_size_pow=6), 0, 8, {})
    assert sampled == ARGUMENTS | {"policy_kwargs": {**ARGUMENTS["policy_kwargs"], "lstm_hidden_size": 64}}  # type: ignore[dict-item]


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
def test_no_lstm_no_size(policy: str) -> None:
    trial = fixed(policy, lstm_hidden_size_pow=6)
    assert sample_a3c_params(trial, 0, 8, {}) == ARGUMENTS
    assert "lstm_hidden_size_pow" not in trial.params


def test_conversion_leaves_the_trial_alone() -> None:
    values = VALUES | {"lstm_hidden_size_pow": 4}
    before = dict(values)
    convert_a3c_params(values)
    assert values == before


def test_fewer_settings_than_a3c_has_are_sampled() -> None:
    """Those of the file remain: the policy, the processes, and whatever the search does not name."""
    (trial,) = trials("MlpLstmPolicy", n=1)
    sampled = sample_a3c_params(trial, 0, 8, {})
    assert sampled.keys() == ARGUMENTS.keys()


def test_it_must_be_said_whether_the_policy_is_recurrent() -> None:
    trial = optuna.trial.FixedTrial(VALUES)
    with pytest.raises(KeyError, match="recurrent"):
        sample_a3c_params(trial, 0, 8, {})  # type: ignore[arg-type]
