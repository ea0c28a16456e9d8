"""Observations, arrays or dictionaries of them, in the shapes that a worker needs."""

from typing import Any

import numpy as np
import pytest

from sb3_a3c.envs.observations import as_tensor, batch_of_one, copied, flat_chunk, stacked

ROWS = [np.arange(6).reshape(3, 2) + 10 * t for t in range(4)]  # 4 steps of 3 environments


def test_stacked_and_flat_chunk() -> None:
    chunk = slice(1, 3)
    expected = [[2, 3], [4, 5], [12, 13], [14, 15], [22, 23], [24, 25], [32, 33], [34, 35]]
    assert flat_chunk(stacked(ROWS), chunk).tolist() == expected  # type: ignore[union-attr]
    nested: Any = flat_chunk(stacked([{"a": row, "b": row[:, 0]} for row in ROWS]), chunk)
    assert nested["a"].tolist() == expected
    assert nested["b"].tolist() == [first for first, _ in expected]


@pytest.mark.parametrize("in_dict", [False, True])
def test_only_copied_has_memory_of_its_own(in_dict: bool) -> None:
    array = ROWS[0].copy()
    obs: Any = {"a": array} if in_dict else array
    results: list[Any] = [copied(obs), batch_of_one(obs), as_tensor(obs)]
    copy, batch, tensor = (result["a"] if in_dict else result for result in results)
    array[0, 0] = 7
    assert [int(other.flatten()[0]) for other in (copy, batch, tensor)] == [0, 7, 7]
    assert batch.shape == (1, 3, 2)


def test_batch_of_one_scalar() -> None:
    assert batch_of_one(3).shape == (1,)  # type: ignore[union-attr]
