"""The learning rate of A3C(learning_rate=None), and with anneal=True."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C
from sb3_a3c.workers.learning_rate import annealing

SAID = "The learning rate is {:.3g} and not 0.0005, because {} updates begin from about the same parameters."


def rate_of(model: A3C) -> float:
    """The rate that the last update was made with."""
    rate: float = model.learn(1, log_interval=1000).policy.optimizer.param_groups[0]["lr"]
    return rate


@pytest.mark.parametrize(
    ("n_envs", "kwargs", "n_updates"),
    [
        (1, {"n_workers": 1}, 1),
        (16, {"n_workers": 2}, 4),  # each worker has two chunks of 4 environments
        (16, {"n_workers": 0}, 4),
        (6, {"n_workers": 6}, 6),  # each worker has one environment, fewer than envs_per_update
        (12, {"n_workers": 1, "envs_per_update": 1}, 12),
        (5, {"n_workers": 2, "envs_per_update": 1}, 5),
        (6, {"n_workers": 6, "take_turns": True}, 1),  # each pulls what the one before it has pushed
    ],
)
def test_many_updates_from_the_same_parameters_are_shorter(
    n_envs: int, kwargs: dict[str, Any], n_updates: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = 5e-4 if n_updates <= 4 else 5e-4 * 4 / n_updates
    env = make_vec_env("CartPole-v1", n_envs)
    assert rate_of(A3C("MlpPolicy", env, verbose=1, **kwargs)) == pytest.approx(expected, rel=1e-12)
    assert (SAID.format(expected, n_updates) in capsys.readouterr().out) == (n_updates > 4)


@pytest.mark.parametrize("given", [3e-4, lambda progress: 3e-4])
def test_a_rate_that_is_given_is_used(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", 8), learning_rate=given, n_workers=0, envs_per_update=1, verbose=1)
    assert rate_of(model) == 3e-4
    assert "The learning rate is" not in capsys.readouterr().out


def test_the_default_fits_the_environments_after_loading(tmp_path: Path) -> None:
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", 16), n_workers=0, envs_per_update=1)
    assert rate_of(model) == 1.25e-4
    model.save(tmp_path / "model")
    assert rate_of(A3C.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 9))) == pytest.approx(5e-4 * 4 / 9)
    assert rate_of(A3C.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 9), learning_rate=1e-3)) == 1e-3


def test_a_schedule_that_replaces_the_default_is_used() -> None:
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", 16), n_workers=0, envs_per_update=1)
    model.lr_schedule = lambda progress: 1e-3
    assert rate_of(model) == 1e-3


def test_annealing_is_in_the_last_quarter() -> None:
    assert [annealing(progress) for progress in (1.0, 0.5, 0.25, 0.125, 0.0)] == [1.0, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("rate", [1e-3, lambda progress: 1e-3 * progress, None])
def test_anneal_multiplies_the_learning_rate(rate: Any) -> None:
    """Trained in two calls of ``learn``, whose progress is that of all timesteps."""
    full = rate if callable(rate) else lambda progress: rate or 5e-4
    weights = []
    for settings in (dict(learning_rate=rate, anneal=True), dict(learning_rate=lambda p: full(p) * min(1.0, 4 * p))):
        model = A3C("MlpPolicy", "CartPole-v1", n_workers=1, n_steps=5, seed=0, **settings)
        model.learn(200).learn(100, reset_num_timesteps=False)
        weights.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert th.equal(*weights)
    constant = A3C("MlpPolicy", "CartPole-v1", n_workers=1, n_steps=5, seed=0, learning_rate=rate)
    constant.learn(200).learn(100, reset_num_timesteps=False)
    assert not th.equal(th.nn.utils.parameters_to_vector(constant.policy.parameters()), weights[0])


def test_anneal_is_saved_with_the_model(tmp_path: Path) -> None:
    A3C("MlpPolicy", "CartPole-v1", anneal=True).save(tmp_path / "model")
    assert A3C.load(tmp_path / "model").anneal
    assert not A3C.load(tmp_path / "model", anneal=False).anneal
