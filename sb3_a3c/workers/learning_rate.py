"""The learning rate of ``A3C(learning_rate=None)``, and the factor of ``A3C(anneal=True)``."""

#: It was found with 4 updates that begin from about the same parameters.
FULL_RATE = 5e-4
N_UPDATES = 4


class DefaultLearningRate:
    """
    A constant schedule: 5e-4 with up to 4 updates that begin from about the same parameters, and 4/n of it with n.

    Each of Adam's steps is about as long as the learning rate, whatever the gradients are. So n updates from the same
    parameters move them at most as far as 4 do at the full rate.
    """

    def __init__(self) -> None:
        self.n_updates = N_UPDATES  #: that begin from about the same parameters; known once workers are assigned

    def __call__(self, progress_remaining: float) -> float:
        return FULL_RATE * min(1.0, N_UPDATES / self.n_updates)

    def summary(self) -> str | None:
        """A line for the user, if the rate is lower than usual."""
        if (rate := self(1.0)) == FULL_RATE:
            return None
        return (
            f"The learning rate is {rate:.3g} and not {FULL_RATE:.3g}, because {self.n_updates} updates begin from about "
            "the same parameters."
        )


def annealing(progress_remaining: float) -> float:
    """What ``anneal=True`` multiplies the learning rate by: 1 over three quarters of the timesteps, then down to 0."""
    return min(1.0, 4.0 * progress_remaining)
