"""The calling convention of :class:`LstmActorCriticPolicy`, also for feed-forward policies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.policies.overrides import is_overridden
from sb3_a3c.policies.sampling import sample_actions
from sb3_a3c.policies.torch_layers import LstmState


class FeedForwardAdapter:
    """A feed-forward policy, called like an LSTM policy: its state is empty, and there is no activation cache."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy

    def initial_state(self, n_envs: int) -> LstmState:
        return ()

    def new_activation_cache(self, n_steps: int, chunks: Sequence[slice]) -> None:
        return None

    def update_value_scale(self, targets: npt.NDArray[np.floating]) -> float:
        return 1.0

    def act(
        self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor, cache: object = None
    ) -> tuple[th.Tensor, th.Tensor, LstmState]:
        policy = self.policy
        if is_overridden(policy, ActorCriticPolicy, "forward"):
            actions, values, _ = policy(obs)
            return actions, values, state
        features: Any = policy.extract_features(obs)
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(features)
        else:
            latent_pi = policy.mlp_extractor.forward_actor(features[0])
            latent_vf = policy.mlp_extractor.forward_critic(features[1])
        values = policy.value_net(latent_vf)
        return sample_actions(policy, latent_pi), values, state

    def predict_values(self, obs: PyTorchObs, state: LstmState, episode_starts: th.Tensor) -> th.Tensor:
        return self.policy.predict_values(obs)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: th.Tensor, state: LstmState, episode_starts: th.Tensor, cache: object = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        return self.policy.evaluate_actions(obs, actions)


def as_recurrent(policy: ActorCriticPolicy) -> LstmActorCriticPolicy | FeedForwardAdapter:
    return policy if isinstance(policy, LstmActorCriticPolicy) else FeedForwardAdapter(policy)
