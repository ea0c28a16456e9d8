"""
Protocols of the store of shared parameters. All other code is written against them; only the collector, the hosts of a
cluster and the doctor choose an implementation.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

#: Tensors on their way to another host, whose store has the same layout. Only stores look inside.
Bytes: TypeAlias = npt.NDArray[np.uint8]
#: Counters of some workers, one row each.
Rows: TypeAlias = npt.NDArray[np.int64]


class Replica(Protocol):
    """
    A worker's end of a store: it keeps the worker's policy up to date with the shared parameters and applies the worker's
    gradients to them. Counts are exact although no worker ever waits for another.
    """

    @property
    def optimizer(self) -> th.optim.Optimizer:
        """The optimizer whose next step :meth:`push` takes; its ``param_groups`` hold this worker's learning rate."""

    def set_trainable(self, trainable: Sequence[bool]) -> None:
        """
        Freeze parameters of the worker's policy, and let others learn.

        :param trainable: for each parameter whether it learns
        """

    def pull(self) -> None:
        """
        Copy the shared parameters and module buffers into the worker's policy.

        :raises DivergenceError: if the shared parameters stay NaN or infinite
        """

    def push(self) -> int | None:
        """
        Take one step of the shared optimizer with the gradient of the worker's policy, and clear that gradient.

        :return: the staleness of the gradient, which is the number of updates that other workers made since this worker's
            last pull. None if the step was not counted: module buffers were not finite, or it made parameters NaN or
            infinite, which then have their values of the last pull again
        """

    def discard(self) -> None:
        """Clear the gradient of the worker's policy, and reset its module buffers to the shared ones."""

    def reserve(self, n_transitions: int) -> bool:
        """
        Announce a rollout before it begins, so that all workers together exceed the goal by one rollout each at most.

        :return: whether it may begin; False if the goal is reserved already
        """

    def is_my_turn(self) -> bool:
        """Whether workers before this one have finished this round, and those behind it the last one."""

    def end_turn(self) -> None:
        """Let the next worker have its turn."""

    def leave_turns(self) -> None:
        """No worker needs to wait for this one any more."""


class ParameterStore(Protocol):
    """The shared parameters, module buffers, optimizer state and counters. It travels to workers when they start."""

    @property
    def n_updates(self) -> int:
        """Pushes by all workers so far."""

    def replica(self, policy: ActorCriticPolicy, worker: int) -> Replica:
        """A worker's end of the store. ``policy``, a copy of the one that the store was made from, becomes the replica's."""

    def load_policy(self, policy: ActorCriticPolicy) -> None:
        """Set the shared parameters, module buffers and optimizer state to those of a policy of the same architecture."""

    def fetch_policy(self, policy: ActorCriticPolicy) -> None:
        """Copy the shared parameters and module buffers into a policy of the same architecture, which stays private."""

    def fetch_optimizer(self, policy: ActorCriticPolicy) -> None:
        """Copy the shared optimizer state into ``policy.optimizer``, whose tensors stay private."""

    def release(self, worker: int, n_transitions: int) -> None:
        """Undo the reservations of a worker that died, except for the ``n_transitions`` that it has reported."""

    def close(self) -> None:
        """Free the memory. Replicas and copies that were fetched stay usable."""


class MergeableStore(ParameterStore, Protocol):
    """
    A store that can take in what another one has learned, for training on several hosts. Its *values* are the parameters
    and module buffers. All methods may be called while workers push.
    """

    def values(self, known: Bytes | None = None) -> Bytes:
        """
        A copy of the values.

        :param known: earlier values, to be taken where a parameter is NaN or infinite: a worker is about to undo its step
        """

    def set_values(self, values: Bytes) -> None:
        """Replace the values."""

    def difference(self, known: Bytes) -> Bytes:
        """
        What another store lacks: the values less ``known``, for parameters rounded to bfloat16, and 0 where they are NaN or
        infinite. It is added to ``known``, so that the next difference includes what rounding has left over.
        """

    def add(self, difference: Bytes, known: Bytes) -> None:
        """Add a difference to the values, and to ``known``. Module buffers that it changes are replaced."""

    def state(self) -> Bytes:
        """A copy of the optimizer's state."""

    def set_state(self, state: Bytes) -> None:
        """Replace the optimizer's state."""

    def merge_states(self, states: Sequence[tuple[int, Bytes, Bytes]]) -> None:
        """
        Replace the optimizer's state by the mean of several; their step counts add up.

        :param states: for each host the weight of its state, the state that it began with and the one that it has now
        """

    def rows(self, workers: Sequence[int]) -> Rows:
        """A copy of the counters of these workers."""

    def set_rows(self, workers: Sequence[int], rows: Rows) -> None:
        """Replace the counters of these workers, which push to another store."""

    def updates(self, workers: Sequence[int]) -> int:
        """Pushes by these workers so far."""
