"""
One calling convention for all policies, the recurrent one: everything takes the memory before it. See ``policies`` for the
shapes. A worker knows no other.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_a3c.policies.activation_cache.cache import ActivationCache, ChunkCache
from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.policies.overrides import is_overridden
from sb3_a3c.policies.sampling import sample_actions
from sb3_a3c.policies.torch_layers import LstmState


class RecurrentPolicy(Protocol):
    """What a worker asks of a policy: everything takes the memory before it, and acting returns the memory after it."""

    def initial_state(self, n_envs: int) -> LstmState: ...

    def new_activation_cache(self, n_steps: int, chunks: Sequence[slice]) -> ActivationCache | None: ...

    def act(
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor, cache: ActivationCache | None = None
    ) -> tuple[th.Tensor, th.Tensor, LstmState]: ...

    def predict_values(self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor) -> th.Tensor: ...

    def evaluate_actions(
        self,
        obs: PyTorchObs,
        actions: th.Tensor,
        state: LstmState,
        episode_starts: th.Tensor,
        cache: ChunkCache | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]: ...


def as_recurrent(policy: ActorCriticPolicy) -> RecurrentPolicy:
    """
    :param policy: one of ours, or any feed-forward ``ActorCriticPolicy``
    :return: the same policy behind the recurrent calling convention; a feed-forward one has an empty memory
    """
    return policy if isinstance(policy, LstmActorCriticPolicy) else _Memoryless(policy)


class _Memoryless:
    """A feed-forward policy in the recurrent calling convention."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    def initial_state(self, n_envs: int) -> LstmState:
        return ()

    def new_activation_cache(self, n_steps: int, chunks: Sequence[slice]) -> ActivationCache | None:
        return None

    def act(
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor, cache: ActivationCache | None = None
    ) -> tuple[th.Tensor, th.Tensor, LstmState]:
        policy = self.policy
        if is_overridden(policy, ActorCriticPolicy, "forward"):
            actions, values, _ = policy(obs)
            return actions, values, state
        features: Any = policy.extract_features(obs)
        for_actor, for_critic = (features, features) if policy.share_features_extractor else features
        values = policy.value_net(policy.mlp_extractor.forward_critic(for_critic))
        return sample_actions(policy, policy.mlp_extractor.forward_actor(for_actor)), values, state

    def predict_values(self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor) -> th.Tensor:
        return self.policy.predict_values(obs)

    def evaluate_actions(
        self,
        obs: PyTorchObs,
        actions: th.Tensor,
        state: LstmState,
        episode_starts: th.Tensor,
        cache: ChunkCache | None = None,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        return self.policy.evaluate_actions(obs, actions)
