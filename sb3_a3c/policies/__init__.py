"""LSTM policies, SB3's feed-forward policies, and a cache of their activations."""

from sb3_a3c.policies.lstm_policies import (
    CnnLstmPolicy,
    CnnPolicy,
    LstmActorCriticCnnPolicy,
    LstmActorCriticPolicy,
    LstmMultiInputActorCriticPolicy,
    MlpLstmPolicy,
    MlpPolicy,
    MultiInputLstmPolicy,
    MultiInputPolicy,
)

__all__ = [
    "CnnLstmPolicy",
    "CnnPolicy",
    "LstmActorCriticCnnPolicy",
    "LstmActorCriticPolicy",
    "LstmMultiInputActorCriticPolicy",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
]
