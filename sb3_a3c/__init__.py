"""A3C (asynchronous advantage actor-critic) for Stable-Baselines3."""

import sys

from sb3_a3c.a3c import A3C
from sb3_a3c.errors import A3CError, DivergenceError, RemoteTraceback, WorkerDiedError, WorkerTracebackError
from sb3_a3c.policies import CnnLstmPolicy, CnnPolicy, MlpLstmPolicy, MlpPolicy, MultiInputLstmPolicy, MultiInputPolicy
from sb3_a3c.policies import torch_layers as _torch_layers
from sb3_a3c.version import __version__

# models that 0.1.0 has saved may name BabyCNN by this path
sys.modules["sb3_a3c.convolutions"] = _torch_layers

__all__ = [
    "A3C",
    "A3CError",
    "CnnLstmPolicy",
    "CnnPolicy",
    "DivergenceError",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
    "RemoteTraceback",
    "WorkerDiedError",
    "WorkerTracebackError",
    "__version__",
]
