"""
A worker's end of the shared-memory store: ``pull`` copies the shared parameters into the worker's own policy, ``push``
applies the worker's gradient to them with the shared optimizer, without a lock.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.errors import DivergenceError
from sb3_a3c.store.finite import all_finite
from sb3_a3c.store.layout import LEFT, Counter, Layout, same_order

#: A pull copies the shared parameters up to 1000 times, a millisecond apart, until all are finite.
MAX_COPIES = 1000


class SharedMemoryReplica:
    """
    A :class:`~sb3_a3c.store.base.Replica`, made by ``SharedMemoryStore.replica``. The parameters of ``policy``, the
    worker's own, move into one flat private buffer, its optimizer onto the shared parameters.
    """

    def __init__(
        self, flat: th.Tensor, layout: Layout, policy: ActorCriticPolicy, worker: int, total_steps: int, steps_before: int
    ) -> None:
        self._policy = policy
        self._worker = worker
        self._total_steps, self._steps_before = total_steps, steps_before
        self._counters = layout.counters(flat)
        self._seen_updates = 0
        self._shared_bytes = flat[: layout.pull_bytes]
        self._local_bytes = th.zeros_like(self._shared_bytes)
        self._shared_buffers = [slot.view(flat) for slot in layout.buffers]
        self._shared_of: dict[th.nn.Parameter, th.nn.Parameter] = {}
        for slot, parameter in zip(layout.parameters, policy.parameters(), strict=True):
            parameter.data = slot.view(self._local_bytes)
            parameter.grad = None
            self._shared_of[parameter] = th.nn.Parameter(slot.view(flat))
        self.optimizer = policy.optimizer
        for group in self.optimizer.param_groups:
            group["params"] = [self._shared_of[parameter] for parameter in group["params"]]
        self.optimizer.state = defaultdict(dict)
        for shared, state in zip(self._shared_of.values(), layout.states(flat), strict=True):
            for value in state.values():
                if isinstance(value, th.Tensor) and value.shape == shared.shape:
                    assert same_order(value, shared), (value.stride(), shared.stride())
            if state:
                self.optimizer.state[shared] = state
        self.set_trainable([parameter.requires_grad for parameter in policy.parameters()])
        # some buffers are infinite for good, such as masks
        self._finite_buffers = [b for b in policy.buffers() if b.is_floating_point() and all_finite([b])]
        self.pull()

    def set_trainable(self, trainable: Sequence[bool]) -> None:
        for (parameter, shared), learns in zip(self._shared_of.items(), trainable, strict=True):
            parameter.requires_grad_(learns)
            shared.requires_grad_(learns)
        self._trainable = [(p.detach(), shared.detach()) for p, shared in self._shared_of.items() if p.requires_grad]

    def pull(self) -> None:
        self._seen_updates = self._updates_by_others()
        for _ in range(MAX_COPIES):
            self._local_bytes.copy_(self._shared_bytes)
            if all_finite(local for local, _ in self._trainable):
                break
            time.sleep(1e-3)  # another worker is undoing its step
        else:
            raise DivergenceError(
                "The shared parameters are NaN or infinite: a worker died before it could undo its update. Lower "
                "`learning_rate`; the model still has the last finite parameters."
            )
        self._pull_buffers()

    def push(self) -> int | None:
        if not all_finite(self._finite_buffers):
            return None
        for parameter, shared in self._shared_of.items():
            gradient, parameter.grad = parameter.grad, None
            assert gradient is None or same_order(gradient, shared), (gradient.stride(), shared.stride())
            shared.grad = gradient
        staleness = self._updates_by_others() - self._seen_updates
        self.optimizer.step()
        if not all_finite(shared for _, shared in self._trainable):
            self._undo_non_finite()
            return None
        for buffer, shared_buffer in zip(self._policy.buffers(), self._shared_buffers, strict=True):
            shared_buffer.copy_(buffer)
        self._counters[self._worker, Counter.UPDATES] += 1
        return staleness

    def discard(self) -> None:
        self._policy.zero_grad()
        self._pull_buffers()

    def reserve(self, n_transitions: int) -> bool:
        reserved = self._counters[:, Counter.RESERVED]
        if self._steps_before + int(reserved.sum()) >= self._total_steps:
            return False
        reserved[self._worker] += n_transitions
        return True

    def is_my_turn(self) -> bool:
        turns, me = self._counters[:, Counter.TURNS], self._worker
        return bool((turns[:me] > turns[me]).all() and (turns[me + 1 :] >= turns[me]).all())

    def end_turn(self) -> None:
        self._counters[self._worker, Counter.TURNS] += 1

    def leave_turns(self) -> None:
        self._counters[self._worker, Counter.TURNS] = LEFT

    def _pull_buffers(self) -> None:
        for buffer, shared in zip(self._policy.buffers(), self._shared_buffers, strict=True):
            buffer.copy_(shared)

    def _undo_non_finite(self) -> None:
        """
        Where shared parameters are not finite, let them be what they were at the last pull. (To undo whole steps would take
        a copy of parameters and moments before each, which costs as much as the step, and would undo others' steps too.)
        """
        for local, shared in self._trainable:
            bad = ~shared.isfinite()
            shared[bad] = local[bad]
        for shared, state in self.optimizer.state.items():  # with weight decay, moments may have met such a parameter
            for value in state.values():
                if isinstance(value, th.Tensor) and value.shape == shared.shape:
                    value.nan_to_num_(0.0, 0.0, 0.0)

    def _updates_by_others(self) -> int:
        updates = self._counters[:, Counter.UPDATES]
        return int(updates.sum() - updates[self._worker])
