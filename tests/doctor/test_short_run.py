"""What the doctor measures: good and broken stores, and workers that train, hang or do not answer."""

import os
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C, WorkerDiedError
from sb3_a3c.doctor import short_run
from sb3_a3c.store.replica import SharedMemoryReplica

MB, GB = 2**20, 2**30


@pytest.mark.parametrize(
    ("space", "policy"),
    [
        (spaces.Box(0, 255, (84, 84, 1), np.uint8), "CnnLstmPolicy"),
        (spaces.Box(-1, 1, (4,)), "MlpLstmPolicy"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "MultiInputLstmPolicy"),
    ],
)
def test_default_policy(space: gym.Space[Any], policy: str) -> None:
    assert short_run.default_policy(space) == policy


def keep_first_gradient(replica: SharedMemoryReplica) -> int:
    """What many implementations do with torch 2: `if shared.grad is None: shared.grad = local.grad`."""
    for parameter, shared in replica._shared_of.items():
        if shared.grad is None:
            shared.grad = parameter.grad
        parameter.grad = None
    replica.optimizer.step()
    return 0


def skip_step(replica: SharedMemoryReplica) -> int:
    replica._policy.zero_grad()
    return 0


RMSPROP = dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(momentum=0.9))


@pytest.mark.parametrize(
    ("policy", "env_id", "kwargs"), [("MlpPolicy", "Pendulum-v1", RMSPROP), ("MlpLstmPolicy", "CartPole-v1", {})]
)
def test_gradient_mismatch(policy: str, env_id: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = A3C(policy, make_vec_env(env_id, n_envs=3), policy_kwargs=kwargs, seed=0)
    assert model.env is not None
    obs: Any = model.env.reset()
    assert short_run.gradient_mismatch(model.policy, obs) is None
    for method, broken, first in [
        ("push", keep_first_gradient, "push 2: "),
        ("push", skip_step, "push 1: "),
        ("pull", lambda replica: None, "push 1: "),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(SharedMemoryReplica, method, broken)
            assert str(short_run.gradient_mismatch(model.policy, obs)).startswith(first)
    monkeypatch.setattr(short_run, "a3c_loss", lambda *args: type("Loss", (), {"loss": (0 * args[0]).sum()}))
    assert short_run.gradient_mismatch(model.policy, obs) == "push 1: the gradient's norm is 0.0"


def test_hanging_worker() -> None:
    main = os.getpid()

    class HangsInWorker(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **kwargs: Any) -> Any:
            if os.getpid() != main:
                time.sleep(1000)
            return super().reset(**kwargs)

    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2, wrapper_class=HangsInWorker), n_workers=1)
    with pytest.raises(TimeoutError, match=r"environment 0 made no rollout within 0.5 s") as error:
        short_run.train(model, timeout=0.5)
    assert isinstance(error.value.__cause__, WorkerDiedError)  # it was not replaced, to hang again


class SetsThreads(gym.Wrapper[Any, Any, Any, Any]):
    def reset(self, **kwargs: Any) -> Any:
        th.set_num_threads(3)
        return super().reset(**kwargs)


def test_train() -> None:
    before = th.get_num_threads()
    try:
        model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=4, wrapper_class=SetsThreads), n_workers=2)
        short = short_run.train(model, timeout=60.0)
    finally:
        th.set_num_threads(before)
    assert short.n_workers == len(short.memory) == 2
    assert short.n_threads == 3
    assert short.n_steps >= model.n_steps * 4
    assert short.n_updates > 0
    assert 0 < short.start_seconds < 60 and 0 < short.seconds < 60
    assert all(size is None or 10 * MB < size < GB for size in short.memory)
