"""The search space of `-optimize`: A3C accepts what is sampled, and a stored trial is converted to the same arguments."""

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_a3c import A3C
from sb3_a3c.zoo.hyperparams_opt import convert_a3c_params, sample_a3c_params

#: A trial's values as optuna stores them, and A3C's arguments made of them.
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


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_a3c_accepts_what_is_sampled(policy: str, n_envs: int) -> None:
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    for trial in trials(policy):
        sampled = sample_a3c_params(trial, 0, n_envs, {})
        assert sampled == convert_a3c_params(trial.params)
        assert sampled.keys() == ARGUMENTS.keys()
        model = A3C(policy, env, n_workers=1, **sampled)
        assert model.n_steps == 2 ** trial.params["n_steps_pow"]
        assert model.gamma == trial.user_attrs["gamma"]
        assert model.gae_lambda == trial.user_attrs["gae_lambda"]
        assert all(model.policy_kwargs[key] == value for key, value in sampled["policy_kwargs"].items())
    env.close()


@pytest.mark.parametrize(("n_envs", "expected"), [(1, {1}), (3, {1, 2}), (8, {1, 2, 4, 8})])
def test_envs_per_update_is_at_most_n_envs(n_envs: int, expected: set[int]) -> None:
    sampled = {sample_a3c_params(trial, 0, n_envs, {})["envs_per_update"] for trial in trials("MlpPolicy", n=50)}
    assert sampled == expected


@pytest.mark.parametrize("recurrent", [True, False])
def test_only_recurrent_policies_have_an_lstm_size(recurrent: bool) -> None:
    trial: Any = optuna.trial.FixedTrial(VALUES | {"lstm_hidden_size_pow": 6})
    trial.set_user_attr("recurrent", recurrent)
    policy_kwargs: Any = ARGUMENTS["policy_kwargs"]
    expected = policy_kwargs | {"lstm_hidden_size": 64} if recurrent else policy_kwargs
    assert sample_a3c_params(trial, 0, 8, {}) == ARGUMENTS | {"policy_kwargs": expected}
    assert ("lstm_hidden_size_pow" in trial.params) == recurrent


def test_conversion_does_not_change_the_trial() -> None:
    values = VALUES | {"lstm_hidden_size_pow": 4}
    before = dict(values)
    convert_a3c_params(values)
    assert values == before
