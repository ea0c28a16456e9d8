"""Observations, arrays or dictionaries of them, in the shapes that a worker needs."""

from typing import Any

import numpy as np

from sb3_a3c.envs.observations import as_tensor, batch_of_one, copied, flat_chunk, stacked

ROWS = [np.arange(6).reshape(3, 2) + 10 * t for t in range(4)]  # 4 steps of 3 environments


def in_dictionaries(rows: list[Any]) -> list[Any]:
    return [{"a": row, "b": row[:, 0]} for row in rows]


def test_steps_are_stacked_and_chunks_of_environments_cut_out() -> None:
    chunk = slice(1, 3)
    expected = [[2, 3], [4, 5], [12, 13], [14, 15], [22, 23], [24, 25], [32, 33], [34, 35]]
    assert flat_chunk(stacked(ROWS), chunk).tolist() == expected  # type: ignore[union-attr]
    nested: Any = flat_chunk(stacked(in_dictionaries(ROWS)), chunk)
    assert nested["a"].tolist() == expected
    assert nested["b"].tolist() == [first for first, _ in expected]


def test_copies_have_their_own_memory_and_batches_that_of_the_observation() -> None:
    for obs in (ROWS[0].copy(), in_dictionaries([ROWS[0].copy()])[0]):
        copy: Any = copied(obs)
        batch: Any = batch_of_one(obs)
        tensor = as_tensor(obs)
        array, *others = (
            ([each["a"] for each in (obs, copy, batch, tensor)]) if isinstance(obs, dict) else (obs, copy, batch, tensor)
        )
        array[0, 0] = 7
        assert [int(other.flatten()[0]) for other in others] == [0, 7, 7]
    assert batch_of_one(3).shape == (1,)  # type: ignore[union-attr]
