"""The learning rate of ``A3C(learning_rate=None)``."""

import math


class DefaultLearningRate:
    """
    A constant schedule: 3e-4, which was found with 4 updates that begin from about the same parameters, and less with more.

    Together, n such updates are one step with a batch n times as large. By Adam's scaling rule (Malladi et al. 2022,
    https://arxiv.org/abs/2205.10287) it may be sqrt(n) times as long, so each of the updates gets 1/sqrt(n) of the rate.
    """

    def __init__(self) -> None:
        self.n_updates = 4  #: that begin from about the same parameters; known once workers are assigned

    def __call__(self, progress_remaining: float) -> float:
        return 3e-4 * min(1.0, math.sqrt(4 / self.n_updates))
