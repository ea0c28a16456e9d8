"""
What lies where in the one flat buffer that a store and its replicas share, so that a process maps it with one descriptor::

    parameters │ module buffers │ counters │ optimizer state
    ◄─ a pull ─►                │ one row
     is one copy                │ a worker
    ◄─ the values, which ───────►           ◄─ merged for ───►
       hosts exchange                          a save

Hosts send each other what their values differ by, with parameters in bfloat16: half as many bytes, and the same range.

Every tensor has the strides of the parameter it belongs to. torch's fused CPU optimizers take parameter, gradient and
moments for the same order in memory without looking, and a convolution in ``channels_last`` never learns if they differ.
"""

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

_ALIGNMENT = 64  # bytes: a cache line, so that no two tensors share one
_PIECE = 2**18  # numbers at most, which stay in the processor's cache while several operations use them


class Counter(enum.IntEnum):
    """Columns of the counters. Each worker writes its own row only, so that every count is exact without a lock."""

    UPDATES = 0  #: pushes done
    RESERVED = 1  #: transitions of the rollouts begun
    TURNS = 2  #: rollouts finished, when workers take turns; LEFT once no one need wait for this worker


#: In the column TURNS: larger than any number of rollouts.
LEFT = 2**62


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a flat buffer of bytes."""

    offset: int
    dtype: th.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> slice:
        """Of the flat buffer."""
        return slice(self.offset, self.offset + math.prod(self.shape) * self.dtype.itemsize)

    def view(self, flat: th.Tensor, start: int = 0) -> th.Tensor:
        """The tensor; ``flat`` is the buffer from byte ``start`` on."""
        begin, end = self.bytes.start - start, self.bytes.stop - start
        return flat[begin:end].view(self.dtype).as_strided(self.shape, self.stride)


class Piece(NamedTuple):
    """Some of the values, and what they differ by in a message between hosts."""

    values: Slot
    difference: Slot
    is_added: bool  #: else it replaces the values, if it differs from those that are known


class Layout:
    """The slots of all that is shared; ``state`` is the optimizer's for each parameter."""

    def __init__(self, policy: ActorCriticPolicy, state: Sequence[dict[str, Any]], n_workers: int) -> None:
        self.n_bytes = 0
        parameters = list(policy.parameters())
        self.parameters = [self._place_like(parameter) for parameter in parameters]
        self.pull_bytes = self.n_bytes  #: a pull copies these first bytes
        self.buffers = [self._place_like(buffer) for buffer in policy.buffers()]
        self.values_bytes = self.n_bytes  #: parameters and module buffers are these first bytes
        self.pieces, self.difference_bytes = self._split()  #: of the values
        self._counters = self._place((n_workers, len(Counter)), (len(Counter), 1), th.int64)
        self.state_start = self.n_bytes  #: the optimizer's state is all bytes from here on
        self.state: list[dict[str, Slot]] = []  #: for each parameter
        self._state_numbers: list[dict[str, Any]] = []  # what an optimizer keeps outside tensors, such as a step count
        for parameter, values in zip(parameters, state, strict=True):
            tensors = {key: value for key, value in values.items() if isinstance(value, th.Tensor)}
            self.state.append(
                {
                    key: self._place_like(parameter.to(value.dtype) if value.shape == parameter.shape else value)
                    for key, value in tensors.items()
                }
            )
            self._state_numbers.append({key: value for key, value in values.items() if key not in tensors})

    def counters(self, flat: th.Tensor) -> npt.NDArray[np.int64]:
        """(n_workers, len(Counter)), a view of the shared memory."""
        counters: npt.NDArray[np.int64] = self._counters.view(flat).numpy()
        return counters

    def states(self, flat: th.Tensor) -> Iterator[dict[str, Any]]:
        """For each parameter the optimizer's state: views of the shared tensors, and its other values as they began."""
        for slots, numbers in zip(self.state, self._state_numbers, strict=True):
            yield {**{key: slot.view(flat) for key, slot in slots.items()}, **numbers}

    def _split(self) -> tuple[list[Piece], int]:
        """The values in pieces, and the size of a message with their differences."""
        slots = [(slot, slot.dtype.is_floating_point) for slot in self.parameters] + [(slot, False) for slot in self.buffers]
        pieces, offset = [], 0
        for slot, is_added in slots:
            n_left, begin = math.prod(slot.shape), slot.offset
            while n_left > 0:
                shape = (min(n_left, _PIECE),)
                values = Slot(begin, slot.dtype, shape, (1,))
                difference = Slot(offset, th.bfloat16 if is_added else slot.dtype, shape, (1,))
                pieces.append(Piece(values, difference, is_added))
                n_left, begin, offset = n_left - shape[0], values.bytes.stop, _aligned(difference.bytes.stop)
        return pieces, offset

    def _place(self, shape: th.Size | tuple[int, ...], stride: tuple[int, ...], dtype: th.dtype) -> Slot:
        slot = Slot(self.n_bytes, dtype, tuple(shape), stride)
        self.n_bytes = _aligned(slot.bytes.stop)
        return slot

    def _place_like(self, tensor: th.Tensor) -> Slot:
        """A slot with the order in memory of ``tensor``: its strides if it is dense, else contiguous."""
        return self._place(tensor.shape, th.empty_like(tensor, device="cpu").stride(), tensor.dtype)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def same_order(a: th.Tensor, b: th.Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory (strides of dimensions of size 1 are moot)."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
