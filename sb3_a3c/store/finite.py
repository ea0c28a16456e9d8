"""Checks that tensors and the parameters of a policy are finite."""

import math
from collections.abc import Iterable

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy


def all_finite(tensors: Iterable[th.Tensor]) -> bool:
    """Whether all numbers of these tensors, which are of floating point, are finite."""
    # a finite sum has finite terms, and is found far sooner; only absurd terms have none
    return all(math.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all()) for tensor in tensors)


def check_finite(policy: ActorCriticPolicy) -> None:
    """Raise a ValueError if a trainable parameter is NaN or infinite."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and not all_finite([parameter]):
            raise ValueError(
                f"The policy's parameter `{name}` is NaN or infinite: nothing can be learned from there. Load an earlier "
                "checkpoint, or make a new model."
            )
