"""Equal seeds lead to bit-identical parameters wherever the same work is done in the same order."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C


@pytest.fixture(autouse=True)
def _torch_has_two_threads() -> Iterator[None]:
    """As on a user's machine: more than one thread in the main process, and no environment variable that limits them."""
    assert "OMP_NUM_THREADS" not in os.environ
    before = th.get_num_threads()
    th.set_num_threads(2)
    yield
    assert th.get_num_threads() == 2
    th.set_num_threads(before)


def make_env(env_id: str, seed: int | None = None) -> VecEnv:
    make = make_atari_env if "NoFrameskip" in env_id else make_vec_env
    return make(env_id, n_envs=4, seed=seed)


def make_model(env_id: str, **kwargs: Any) -> A3C:
    policy = "CnnLstmPolicy" if "NoFrameskip" in env_id else "MlpLstmPolicy"
    return A3C(policy, make_env(env_id), seed=11, **kwargs)


def parameters_of(model: A3C) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def learned(env_id: str, **kwargs: Any) -> th.Tensor:
    total_timesteps = 240 if "NoFrameskip" in env_id else 800
    return parameters_of(make_model(env_id, **kwargs).learn(total_timesteps))


@pytest.mark.parametrize("env_id", ["CartPole-v1", pytest.param("PongNoFrameskip-v4", marks=pytest.mark.slow)])
def test_one_worker_in_this_process_or_another(env_id: str) -> None:
    in_process = learned(env_id, n_workers=0)
    assert not th.equal(in_process, parameters_of(make_model(env_id)))
    assert th.equal(in_process, learned(env_id, n_workers=0))
    assert th.equal(in_process, learned(env_id, n_workers=1))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "PongNoFrameskip-v4"])
def test_two_workers_that_take_turns(env_id: str) -> None:
    kwargs: dict[str, Any] = {"n_workers": 2, "take_turns": True, "learning_rate": lambda progress: 1e-3 * progress}
    first = learned(env_id, **kwargs)
    assert th.equal(first, learned(env_id, **kwargs))
    assert not th.equal(first, parameters_of(make_model(env_id)))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loaded_model_learns_like_the_saved_one(n_workers: int, tmp_path: Path) -> None:
    model = make_model("CartPole-v1", n_workers=n_workers, take_turns=True).learn(400)
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model")
    results = []
    for each in (model, loaded):
        each.set_env(make_env("CartPole-v1"))
        each.set_random_seed(5)
        each.learn(400, reset_num_timesteps=False)
        assert each.num_timesteps == model.num_timesteps
        results.append(parameters_of(each))
    assert th.equal(*results)


def test_other_seeds_and_second_learns_differ() -> None:
    first = learned("CartPole-v1", n_workers=0)
    other_seed = A3C("MlpLstmPolicy", make_env("CartPole-v1"), seed=12, n_workers=0)
    other_seed.policy.load_state_dict(make_model("CartPole-v1").policy.state_dict())
    assert not th.equal(first, parameters_of(other_seed.learn(800)))

    model = make_model("CartPole-v1", n_workers=0, learning_rate=0.0)
    actions: list[list[int]] = []
    for _ in range(2):  # the second call draws new seeds and must not repeat the episodes of the first
        seen: list[int] = []
        model.learn(400, callback=lambda local, _, seen=seen: bool(seen.extend(local["actions"].tolist()) or True))
        actions.append(seen)
    assert actions[0] != actions[1]
