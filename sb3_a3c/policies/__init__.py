"""The networks, and what they computed while acting, kept for learning."""

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
