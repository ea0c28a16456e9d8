"""Observations that are not finite."""

import math

import numpy as np

from sb3_a3c.envs.non_finite import zero_non_finite


def test_zero_non_finite() -> None:
    obs = np.array([[1.0, 2.0], [math.nan, 3.0], [4.0, -math.inf], [1e39, 5.0]])
    nested = {"a": obs[:2].copy(), "b": np.full((2, 3, 3), 255, dtype=np.uint8), "c": obs[2:].copy()}
    assert zero_non_finite(obs).tolist() == [False, True, True, True]
    assert obs.tolist() == [[1, 2], [0, 3], [4, 0], [0, 5]]
    assert zero_non_finite(nested).tolist() == [True, True]
    assert nested["c"].tolist() == [[4, 0], [0, 5]]
    assert (nested["b"] == 255).all()
    assert zero_non_finite(nested).tolist() == [False, False]
