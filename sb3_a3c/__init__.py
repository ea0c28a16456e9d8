"""A3C (asynchronous advantage actor-critic) for Stable-Baselines3."""

from sb3_a3c.a3c import A3C
from sb3_a3c.errors import A3CError, DivergenceError, WorkerDiedError, WorkerTracebackError
from sb3_a3c.policies import CnnLstmPolicy, CnnPolicy, MlpLstmPolicy, MlpPolicy, MultiInputLstmPolicy, MultiInputPolicy

__version__ = "0.1.0"

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
    "WorkerDiedError",
    "WorkerTracebackError",
    "__version__",
]
