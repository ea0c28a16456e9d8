"""A small policy with convolutions, an LSTM and two heads, and what tests of stores do with it."""

import pickle
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.policies import CnnLstmPolicy

SPACE = spaces.Box(0, 255, (1, 36, 36), np.uint8)


def make_policy(
    optimizer_class: type[th.optim.Optimizer] = th.optim.Adam, optimizer_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> CnnLstmPolicy:
    return CnnLstmPolicy(
        SPACE,
        spaces.Discrete(4),
        lambda _: 1e-2,
        lstm_hidden_size=8,
        optimizer_class=optimizer_class,
        optimizer_kwargs=optimizer_kwargs or {},
        **kwargs,
    )


def cnn(policy: ActorCriticPolicy) -> Any:
    return policy.features_extractor.cnn


def copied(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy_copy: ActorCriticPolicy = pickle.loads(cloudpickle.dumps(policy))  # as it travels to a worker
    return policy_copy


def random_gradients(policy: ActorCriticPolicy, generator: th.Generator) -> list[th.Tensor]:
    return [th.empty_like(p).copy_(th.randn(p.shape, generator=generator)) for p in policy.parameters()]


def set_gradients(policy: ActorCriticPolicy, gradients: list[th.Tensor]) -> None:
    for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()


def assert_equal(actual: ActorCriticPolicy, expected: ActorCriticPolicy, tolerance: float) -> None:
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance, name
