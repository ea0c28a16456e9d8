"""
The shared parameters in the memory that all processes of one machine map.

Workers apply their gradients to them without a lock: Hogwild (Recht et al. 2011, arXiv:1106.5730; section 4 of Mnih et al.
2016). ``layout`` shows the memory; ``replica`` has ``pull`` and ``push``.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.store.base import Bytes, Rows
from sb3_a3c.store.finite import all_finite, check_finite
from sb3_a3c.store.layout import LEFT, Counter, Layout
from sb3_a3c.store.optimizer_state import check_optimizer, check_parameters, initial_state
from sb3_a3c.store.replica import SharedMemoryReplica

#: A goal that is never reached.
NO_GOAL = 2**62


class SharedMemoryStore:
    """
    A :class:`~sb3_a3c.store.base.MergeableStore` for the processes of one machine. Picklable as an argument of a starting
    process, which then maps the same memory. The policy that it is made from keeps its own parameters.

    :param total_steps: transitions after which ``reserve`` grants no more
    :param steps_before: those of them that are done already
    :param share_memory: False keeps everything in this process's private memory, for one worker in this process
    :raises ValueError: if the optimizer's ``step`` needs a closure, if its parameters are not the policy's, or if one of
        these is not finite
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        n_workers: int,
        total_steps: int = NO_GOAL,
        steps_before: int = 0,
        share_memory: bool = True,
    ) -> None:
        check_optimizer(policy.optimizer)
        check_parameters(policy)
        check_finite(policy)
        self._total_steps, self._steps_before = total_steps, steps_before
        state = [initial_state(policy.optimizer, parameter) for parameter in policy.parameters()]
        self._layout = Layout(policy, state, n_workers)
        self._flat = th.zeros(self._layout.n_bytes, dtype=th.uint8)
        if share_memory:
            self._flat.share_memory_()  # type: ignore[no-untyped-call]
        self._write(policy, state)

    @property
    def n_bytes(self) -> int:
        """Size of all that is shared."""
        return self._flat.nbytes

    @property
    def n_updates(self) -> int:
        return int(self._counters[:, Counter.UPDATES].sum())

    def replica(self, policy: ActorCriticPolicy, worker: int) -> SharedMemoryReplica:
        return SharedMemoryReplica(self._flat, self._layout, policy, worker, self._total_steps, self._steps_before)

    def load_policy(self, policy: ActorCriticPolicy) -> None:
        self._write(policy, [initial_state(policy.optimizer, parameter) for parameter in policy.parameters()])

    def fetch_policy(self, policy: ActorCriticPolicy) -> None:
        with th.no_grad():
            for slot, parameter in zip(self._layout.parameters, policy.parameters(), strict=True):
                value = slot.view(self._flat).clone()
                if parameter.requires_grad and not all_finite([value]):  # a worker is about to undo that: keep the last one
                    value = th.where(value.isfinite(), value, parameter)
                parameter.copy_(value)
            for slot, buffer in zip(self._layout.buffers, policy.buffers(), strict=True):
                buffer.copy_(slot.view(self._flat))

    def fetch_optimizer(self, policy: ActorCriticPolicy) -> None:
        n_updates = self.n_updates
        state: defaultdict[th.Tensor, Any] = defaultdict(dict)
        for parameter, values in zip(policy.parameters(), self._layout.states(self._flat), strict=True):
            if values and not _never_learned(policy.optimizer, parameter, values):
                copies = {k: v.clone() if isinstance(v, th.Tensor) else v for k, v in values.items()}
                if isinstance(copies.get("step"), int):  # each process counts for itself: add up the counts
                    copies["step"] += n_updates
                state[parameter] = copies
        policy.optimizer.state = state

    def release(self, worker: int, n_transitions: int) -> None:
        self._counters[worker, Counter.RESERVED] = n_transitions
        turns = self._counters[:, Counter.TURNS]
        if turns[worker] >= LEFT:  # its successor joins the round of the others
            turns[worker] = min(turns[turns < LEFT], default=0)

    def close(self) -> None:
        self._flat = th.empty(0, dtype=th.uint8)

    def values(self, known: Bytes | None = None) -> Bytes:
        values = self._flat[: self._layout.values_bytes].clone()
        if known is not None:
            for slot in self._layout.parameters:
                value, earlier = slot.view(values), slot.view(th.from_numpy(known))
                if not all_finite([value]):
                    value.copy_(th.where(value.isfinite(), value, earlier))
        as_bytes: Bytes = values.numpy()
        return as_bytes

    def set_values(self, values: Bytes) -> None:
        self._flat[: self._layout.values_bytes].copy_(th.from_numpy(values))

    def difference(self, known: Bytes) -> Bytes:
        difference = np.zeros(self._layout.difference_bytes, dtype=np.uint8)
        known_flat, difference_flat = th.from_numpy(known), th.from_numpy(difference)
        for piece in self._layout.pieces:
            shared, old = piece.values.view(self._flat), piece.values.view(known_flat)
            change = piece.difference.view(difference_flat)
            if piece.is_added:
                change.copy_((shared - old).nan_to_num_(0.0, 0.0, 0.0))
                old.add_(change)
            else:
                change.copy_(shared)
                old.copy_(change)
        return difference

    def add(self, difference: Bytes, known: Bytes) -> None:
        # Workers push meanwhile, without a lock. Where a worker and this addition read the same number before either has
        # written it, one of the two writes is lost, as between two workers. If that is the worker's, the other hosts never
        # see this step. If it is this one, the next difference of this store takes it back: it is lost everywhere, and the
        # stores still agree.
        known_flat = th.from_numpy(known)
        for piece in self._layout.pieces:
            shared, old = piece.values.view(self._flat), piece.values.view(known_flat)
            # a copy: arrays from Ray are read-only, which torch can't express
            copy = th.from_numpy(difference[piece.difference.bytes].copy())
            change = piece.difference.view(copy, piece.difference.offset)
            if piece.is_added:
                shared.add_(change)
                old.add_(change)
            elif not th.equal(change, old):  # the last writer wins: to add up running means would not converge
                shared.copy_(change)
                old.copy_(change)

    def state(self) -> Bytes:
        as_bytes: Bytes = self._flat[self._layout.state_start :].clone().numpy()
        return as_bytes

    def set_state(self, state: Bytes) -> None:
        self._flat[self._layout.state_start :].copy_(th.from_numpy(state))

    def merge_states(self, states: Sequence[tuple[int, Bytes, Bytes]]) -> None:
        # To add up the changes of moments, as those of parameters, would diverge: each of H hosts forgets the moments that
        # it began with, so the sum would hold these with the factor 1 - H.
        merged, total = self.state(), 0
        for weight, *began_and_now in states:
            if weight == 0:
                continue
            total += weight
            flats = [th.from_numpy(state) for state in (merged, *began_and_now)]
            for key, slot in ((key, slot) for slots in self._layout.state for key, slot in slots.items()):
                mean, began, now = (slot.view(flat, self._layout.state_start) for flat in flats)
                if key == "step":
                    mean.add_(now - began)
                elif weight == total:  # the first: exact, so that one host alone is
                    mean.copy_(now)
                elif slot.dtype.is_floating_point:
                    mean.lerp_(now, weight / total)  # never leaves the range of the two: a squared moment is not negative
        self.set_state(merged)

    def rows(self, workers: Sequence[int]) -> Rows:
        return self._counters[list(workers)]

    def set_rows(self, workers: Sequence[int], rows: Rows) -> None:
        self._counters[list(workers)] = rows

    def updates(self, workers: Sequence[int]) -> int:
        return int(self._counters[list(workers), Counter.UPDATES].sum())

    @property
    def _counters(self) -> npt.NDArray[np.int64]:
        return self._layout.counters(self._flat)

    def _write(self, policy: ActorCriticPolicy, state: list[dict[str, Any]]) -> None:
        """Parameters and module buffers of ``policy``, and for each parameter the optimizer's state."""
        slots = self._layout.parameters + self._layout.buffers
        for slot, tensor in zip(slots, [*policy.parameters(), *policy.buffers()], strict=True):
            slot.view(self._flat).copy_(tensor.detach())
        for state_slots, values in zip(self._layout.state, state, strict=True):
            for key, slot in state_slots.items():
                slot.view(self._flat).copy_(values[key])


def _never_learned(optimizer: th.optim.Optimizer, parameter: th.nn.Parameter, values: dict[str, Any]) -> bool:
    """Whether a parameter is frozen and has only the state that is there for the case that a callback lets it learn."""
    if parameter.requires_grad or optimizer.state.get(parameter):
        return False
    first = initial_state(optimizer, parameter)
    return all(th.equal(value, first[key]) for key, value in values.items() if isinstance(value, th.Tensor))
