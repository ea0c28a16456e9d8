"""The learning rate of ``A3C(learning_rate=None)``."""

import math


class DefaultLearningRate:
    """
    A constant schedule: 3e-4, which was found with 4 updates from one rollout of every worker, and less with more updates.

    While a worker acts, the others push. So these ``n_updates`` updates begin from about the same parameters, and together
    they are one step with a batch ``n_updates`` times as large. Adam can make such a step longer by the square root of that
    (Malladi et al. 2022, https://arxiv.org/abs/2205.10287), so each of the updates is made shorter by the square root.
    """

    def __init__(self) -> None:
        self.n_updates = 4  #: made by one rollout of every worker

    def __call__(self, progress_remaining: float) -> float:
        return 3e-4 * min(1.0, math.sqrt(4 / self.n_updates))
