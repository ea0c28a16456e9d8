"""The learning rate of ``A3C(learning_rate=None)``, and the factor of ``A3C(anneal=True)``."""

import math

#: It was found with 4 updates that begin from about the same parameters.
FULL_RATE = 3e-4
N_UPDATES = 4


class DefaultLearningRate:
    """
    A constant schedule: 3e-4 with up to 4 updates that begin from about the same parameters, and less with more.

    Together, n such updates are one step with a batch n times as large. By Adam's scaling rule (Malladi et al. 2022,
    https://arxiv.org/abs/2205.10287) it may be sqrt(n) times as long, so each of the updates gets 1/sqrt(n) of the rate.
    """

    def __init__(self) -> None:
        self.n_updates = N_UPDATES  #: that begin from about the same parameters; known once workers are assigned

    def __call__(self, progress_remaining: float) -> float:
        return FULL_RATE * min(1.0, math.sqrt(N_UPDATES / self.n_updates))

    def summary(self) -> str | None:
        """A line for the user, if the rate is lower than usual."""
        if (rate := self(1.0)) == FULL_RATE:
            return None
        return (
            f"The learning rate is {rate:.3g} and not {FULL_RATE:.3g}, because {self.n_updates} updates begin from about "
            "the same parameters."
        )


def annealing(progress_remaining: float) -> float:
    """What ``anneal=True`` multiplies the learning rate by: 1 over the first half of the timesteps, then down to 0."""
    return min(1.0, 2.0 * progress_remaining)
