"""Sampling of actions, and their conversion to what environments take."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.policies.overrides import is_overridden, is_traced


@contextlib.contextmanager
def unvalidated_if_traced() -> Iterator[None]:
    """While operations are traced, distributions do not check their parameters: what depends on values can't be traced."""
    if not is_traced():
        yield
        return
    before = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(before)


def sample_actions(policy: ActorCriticPolicy, latent: th.Tensor) -> th.Tensor:
    """
    Sample actions, (n_envs, …), from the input of the action head, (n_envs, …): in a fraction of the time that
    ``torch.distributions`` needs for a small batch.
    """
    assert policy.action_space.shape is not None
    own_distribution = is_overridden(policy, ActorCriticPolicy, "_get_action_dist_from_latent")
    if type(policy.action_dist) is CategoricalDistribution and not own_distribution:
        logits: th.Tensor = policy.action_net(latent)
        if logits.sum().isfinite():  # otherwise torch.distributions raises, saying what is wrong
            # Gumbel-max: minus the logarithm of exponential noise is Gumbel noise, and logits need not be normalized
            return (logits - th.empty_like(logits).exponential_().log_()).argmax(dim=1)
    actions = policy._get_action_dist_from_latent(latent).get_actions()
    return actions.reshape((-1, *policy.action_space.shape))


def to_env_actions(policy: ActorCriticPolicy, actions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """
    Convert the policy's actions, (n_envs, …), as A2C does: squashed ones are scaled to the bounds of the action space,
    Gaussian ones are clipped to them, discrete ones stay as they are.
    """
    if not isinstance(policy.action_space, spaces.Box):
        return actions
    if policy.squash_output:
        scaled: npt.NDArray[Any] = policy.unscale_action(actions)
        return scaled
    clipped: npt.NDArray[Any] = np.clip(actions, policy.action_space.low, policy.action_space.high)
    return clipped
