"""Values in the units of the rewards, from a value head whose outputs stay near 1 whatever the size of the rewards."""

import math

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn

#: Weight of the targets of the newest update in the statistics: they follow the last 100 updates or so of each worker. (With
#: several workers one that pushes replaces what others have pushed since its pull, as with all module buffers.)
STEP_SIZE = 0.01
#: Targets that are smaller than 1 are not magnified, so that sparse rewards of -1, 0 and 1 stay as they are.
MIN_SCALE = 1.0


class ValueNormalizer(nn.Module):
    """
    ``values = mean + scale * outputs of the value head``, with the mean and the root mean square of recent value targets,
    and the whole loss in units of ``scale``: adaptive normalization as in PopArt (van Hasselt et al. 2016, arXiv:1602.07714,
    section 2.1). The other half of PopArt, which changes the head's weights so that all values stay as they were under a new
    mean or scale, is left out: values follow the targets sooner without it.

    The statistics are a module buffer, so the store shares them.
    """

    #: (3,), decayed sums, over updates, of the mean target, of the mean squared target, and of 1
    statistics: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", th.zeros(3))

    @property
    def mean_and_scale(self) -> tuple[float, float]:
        """Of recent targets; 0 and 1 before the first."""
        total, squares, weight = self.statistics.tolist()
        return (total / weight, max(MIN_SCALE, math.sqrt(squares / weight))) if weight > 0 else (0.0, MIN_SCALE)

    def forward(self, outputs: th.Tensor) -> th.Tensor:
        """Outputs of the value head -> values in the units of the rewards."""
        mean, scale = self.mean_and_scale
        return mean + scale * outputs

    def update(self, targets: npt.NDArray[np.floating]) -> None:
        """Take the value targets of one update into the statistics."""
        targets = targets.astype(np.float64)  # whose squares do not overflow
        new = th.tensor([targets.mean(), np.square(targets).mean(), 1.0]).to(self.statistics)
        self.statistics.lerp_(new, STEP_SIZE)
