"""
The parameters that all workers learn on, and the optimizer's state with them: a store with two verbs.

``pull`` copies the shared parameters into a worker's own policy; ``push`` applies the worker's gradient to the shared
parameters with the shared optimizer, without a lock (Hogwild, Recht et al. 2011, arXiv:1106.5730; section 4 of
Mnih et al. 2016). Nothing else reaches the shared parameters.

One flat shared buffer holds everything, so that a process maps it with one file descriptor::

    parameters │ counters │ module buffers │ optimizer state
    ◄─ a pull ─►  one row
     is one copy  a worker

Every tensor lies there with the strides of the parameter it belongs to: torch's fused CPU optimizers take parameter,
gradient and moments for the same order in memory without looking, and a convolution in ``channels_last`` never learns
if they differ.
"""

import copy
import enum
import inspect
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.errors import DivergenceError
from sb3_a3c.guard import all_finite, check_finite

#: So often the shared parameters are copied until all are finite, a millisecond apart.
MAX_COPIES = 1000
_ALIGNMENT = 64  # bytes: a cache line, so that no two tensors share one


class Counter(enum.IntEnum):
    """Columns of the counters. Each worker writes its own row only, so that every count is exact without a lock."""

    UPDATES = 0  #: pushes done
    RESERVED = 1  #: transitions of the rollouts begun
    TURNS = 2  #: rollouts finished, when workers take turns


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in a flat buffer of bytes."""

    offset: int
    dtype: th.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: th.Tensor) -> th.Tensor:
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.offset : self.offset + n_bytes].view(self.dtype).as_strided(self.shape, self.stride)


class _Layout:
    """Deals out places in a flat buffer."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def place(self, shape: th.Size | tuple[int, ...], stride: tuple[int, ...], dtype: th.dtype) -> _Slot:
        slot = _Slot(self.n_bytes, dtype, tuple(shape), stride)
        n_bytes = math.prod(shape) * dtype.itemsize
        self.n_bytes += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return slot

    def place_like(self, tensor: th.Tensor) -> _Slot:
        """A place with the order in memory of ``tensor`` (strides are kept if it is dense, else made contiguous)."""
        return self.place(tensor.shape, th.empty_like(tensor, device="cpu").stride(), tensor.dtype)


class ParameterStore:
    """
    Shared parameters, module buffers, optimizer state and counters. Picklable as an argument of a starting process,
    where it maps the same memory.

    :param policy: parameters, buffers and optimizer to start from; it keeps its own
    :param n_workers: how many replicas may push
    :param share_memory: False keeps everything in this process's private memory (one worker in this process)
    :raises ValueError: if the optimizer's ``step`` needs a closure, or a parameter is not finite
    """

    def __init__(self, policy: ActorCriticPolicy, n_workers: int, share_memory: bool = True) -> None:
        check_optimizer(policy.optimizer)
        check_finite(policy)
        parameters = list(policy.parameters())
        buffers = list(policy.buffers())
        state = [_initial_state(policy.optimizer, parameter) for parameter in parameters]

        layout = _Layout()
        self._parameter_slots = [layout.place_like(p) for p in parameters]
        self._pull_bytes = layout.n_bytes
        self._counter_slot = layout.place((n_workers, len(Counter)), (len(Counter), 1), th.int64)
        self._buffer_slots = [layout.place_like(b) for b in buffers]
        self._state_slots: list[dict[str, _Slot]] = []
        self._state_numbers: list[dict[str, Any]] = []  # what an optimizer keeps outside tensors, such as a step count
        for parameter, values in zip(parameters, state, strict=True):
            tensors = {key: value for key, value in values.items() if isinstance(value, th.Tensor)}
            self._state_slots.append(
                {
                    key: layout.place_like(parameter.to(value.dtype) if value.shape == parameter.shape else value)
                    for key, value in tensors.items()
                }
            )
            self._state_numbers.append({key: value for key, value in values.items() if key not in tensors})

        self._flat = th.zeros(layout.n_bytes, dtype=th.uint8)
        if share_memory:
            self._flat.share_memory_()  # type: ignore[no-untyped-call]
        self._write(policy, state)

    @property
    def counters(self) -> npt.NDArray[np.int64]:
        """(n_workers, len(Counter)), shared."""
        counters: npt.NDArray[np.int64] = self._counter_slot.view(self._flat).numpy()
        return counters

    @property
    def n_bytes(self) -> int:
        """Size of all that is shared."""
        return self._flat.nbytes

    @property
    def n_updates(self) -> int:
        """Pushes by all workers so far; exact."""
        return int(self.counters[:, Counter.UPDATES].sum())

    def load_policy(self, policy: ActorCriticPolicy) -> None:
        """
        Copy parameters, module buffers and optimizer state of ``policy`` into the shared ones.

        :param policy: a policy of the same architecture
        """
        self._write(policy, [_initial_state(policy.optimizer, parameter) for parameter in policy.parameters()])

    def _write(self, policy: ActorCriticPolicy, state: list[dict[str, Any]]) -> None:
        """Parameters and module buffers of ``policy``, and for each parameter the optimizer's state."""
        for slot, tensor in zip(
            self._parameter_slots + self._buffer_slots, [*policy.parameters(), *policy.buffers()], strict=True
        ):
            slot.view(self._flat).copy_(tensor.detach())
        for slots, values in zip(self._state_slots, state, strict=True):
            for key, slot in slots.items():
                slot.view(self._flat).copy_(values[key])

    def fetch_policy(self, policy: ActorCriticPolicy) -> None:
        """
        Copy the shared parameters and module buffers into ``policy``, which stays private.

        :param policy: a policy of the same architecture
        """
        with th.no_grad():
            for slot, parameter in zip(self._parameter_slots, policy.parameters(), strict=True):
                value = slot.view(self._flat).clone()
                if parameter.requires_grad and not all_finite([value]):  # a worker is about to mend that
                    value = th.where(value.isfinite(), value, parameter)
                parameter.copy_(value)
            for slot, buffer in zip(self._buffer_slots, policy.buffers(), strict=True):
                buffer.copy_(slot.view(self._flat))

    def fetch_optimizer(self, policy: ActorCriticPolicy) -> None:
        """
        Copy the shared optimizer state (moments, step counts) into ``policy.optimizer``, whose tensors stay private.

        :param policy: a policy of the same architecture
        """
        n_updates = self.n_updates
        state: defaultdict[th.Tensor, Any] = defaultdict(dict)
        for parameter, values in zip(policy.parameters(), self._states(), strict=True):
            if values:
                copies = {k: v.clone() if isinstance(v, th.Tensor) else v for k, v in values.items()}
                if isinstance(copies.get("step"), int):  # counted in each process by itself: put the counts together
                    copies["step"] += n_updates
                state[parameter] = copies
        policy.optimizer.state = state

    def _states(self) -> Iterator[dict[str, Any]]:
        """For each parameter the optimizer's state: views of the shared tensors, and its other values as they began."""
        for slots, numbers in zip(self._state_slots, self._state_numbers, strict=True):
            yield {**{key: slot.view(self._flat) for key, slot in slots.items()}, **numbers}


class Replica:
    """
    A worker's end of the store, with the two verbs. It makes ``policy`` a replica of the shared one: the parameters move
    into one flat private buffer, the optimizer onto the shared parameters.

    :param store: the shared parameters
    :param policy: a copy, for this worker alone, of the policy that the store was made from
    :param worker: index of the worker
    """

    def __init__(self, store: ParameterStore, policy: ActorCriticPolicy, worker: int) -> None:
        self._policy = policy
        self._worker = worker
        self._counters = store.counters
        self._seen_updates = 0
        self._shared_bytes = store._flat[: store._pull_bytes]
        self._local_bytes = th.zeros_like(self._shared_bytes)
        self._shared_buffers = [slot.view(store._flat) for slot in store._buffer_slots]
        self._shared_of: dict[th.nn.Parameter, th.nn.Parameter] = {}
        for slot, parameter in zip(store._parameter_slots, policy.parameters(), strict=True):
            parameter.data = slot.view(self._local_bytes)
            parameter.grad = None
            self._shared_of[parameter] = th.nn.Parameter(slot.view(store._flat), requires_grad=parameter.requires_grad)
        self.optimizer = policy.optimizer
        for group in self.optimizer.param_groups:
            group["params"] = [self._shared_of[parameter] for parameter in group["params"]]
        self.optimizer.state = defaultdict(dict)
        for shared, state in zip(self._shared_of.values(), store._states(), strict=True):
            for value in state.values():
                if isinstance(value, th.Tensor) and value.shape == shared.shape:
                    assert _same_order(value, shared), (value.stride(), shared.stride())
            if state:
                self.optimizer.state[shared] = state
        self._trainable = [(p.detach(), self._shared_of[p].detach()) for p in policy.parameters() if p.requires_grad]
        # some buffers are infinite for good, such as masks
        self._finite_buffers = [b for b in policy.buffers() if b.is_floating_point() and all_finite([b])]
        self.pull()

    def pull(self) -> None:
        """Copy the shared parameters (and module buffers) into the worker's policy."""
        self._seen_updates = self._updates_by_others()
        for _ in range(MAX_COPIES):
            self._local_bytes.copy_(self._shared_bytes)
            if all_finite(local for local, _ in self._trainable):
                break
            time.sleep(1e-3)  # another worker's step is being mended
        else:
            raise DivergenceError(
                "The shared parameters are NaN or infinite: a worker died before it could mend its update. Lower "
                "`learning_rate`; the model still has the last finite parameters."
            )
        self._pull_buffers()

    def _pull_buffers(self) -> None:
        for buffer, shared in zip(self._policy.buffers(), self._shared_buffers, strict=True):
            buffer.copy_(shared)

    def discard(self) -> None:
        """Forget the gradient of the worker's policy, and what it left in module buffers."""
        self._policy.zero_grad()
        self._pull_buffers()

    def push(self) -> int | None:
        """
        Let the shared optimizer take one step with the gradient of the worker's policy, and forget the gradient.

        :return: the staleness of that gradient: how many updates other workers made since the last pull; None if module
            buffers are not finite, or if the step has made parameters so, which are then again as at the last pull
        """
        if not all_finite(self._finite_buffers):
            return None
        for parameter, shared in self._shared_of.items():
            gradient, parameter.grad = parameter.grad, None
            assert gradient is None or _same_order(gradient, shared), (gradient.stride(), shared.stride())
            shared.grad = gradient
        staleness = self._updates_by_others() - self._seen_updates
        self.optimizer.step()
        if not all_finite(shared for _, shared in self._trainable):
            self._mend()
            return None
        for buffer, shared_buffer in zip(self._policy.buffers(), self._shared_buffers, strict=True):
            shared_buffer.copy_(buffer)
        self._counters[self._worker, Counter.UPDATES] += 1
        return staleness

    def _mend(self) -> None:
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


def check_optimizer(optimizer: th.optim.Optimizer) -> None:
    """
    :raises ValueError: if the optimizer's ``step`` needs a closure, which would have to be evaluated on the shared
        parameters while other workers change them
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure that re-evaluates the loss, but A3C's workers push gradients to "
            "parameters that others are changing. Use an optimizer without a closure: "
            "policy_kwargs=dict(optimizer_class=th.optim.Adam), RMSprop, SGD, …"
        )


def _same_order(a: th.Tensor, b: th.Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory (the stride of a dimension of size 1 is moot)."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


class _FirstValues(dict[str, Any]):
    """Remembers the first value that was written under each key, as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None:
            self.first.setdefault(key, value.clone() if isinstance(value, th.Tensor) else value)
        super().__setitem__(key, value)


def _initial_state(optimizer: th.optim.Optimizer, parameter: th.nn.Parameter) -> dict[str, Any]:
    """
    The optimizer's state for one parameter; where it has none yet, what its first step would start from.

    Optimizers make their state inside ``step``. So a throw-away copy takes one with a zero gradient, and the first value
    it writes under each key is the initial one. Neither the parameter nor any step count moves. (SGD starts its momentum
    from the first gradient; from zero it gets the same, unless ``dampening`` is used: then the first step is damped too.)
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if state or not parameter.requires_grad:
        return state
    for group in optimizer.param_groups:
        if any(parameter is p for p in group["params"]):
            break
    else:
        return {}
    stand_in = th.nn.Parameter(parameter.detach().clone())
    stand_in.grad = th.zeros_like(stand_in)
    probe = copy.copy(optimizer)
    # weight decay would add to the zero gradient
    probe.param_groups = [{**group, "params": [stand_in], **({"weight_decay": 0} if "weight_decay" in group else {})}]
    recorder = _FirstValues()
    probe.state = defaultdict(dict, {stand_in: recorder})
    probe.step()
    return recorder.first
