"""Normalized values: statistics by hand, policies with and without them, and files from before."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_a3c import CnnLstmPolicy, MlpLstmPolicy, MlpPolicy, MultiInputLstmPolicy
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.policies.value_normalizer import ValueNormalizer

VECTOR, IMAGE = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (1, 36, 36), np.uint8)


def make(cls: Any = MlpLstmPolicy, space: spaces.Space[Any] = VECTOR, **kwargs: Any) -> Any:
    th.manual_seed(0)
    return cls(space, spaces.Discrete(2), lambda _: 1e-3, lstm_hidden_size=8, **kwargs)


def values_of(policy: Any) -> th.Tensor:
    obs = th.linspace(-1, 1, 12).reshape(4, 3)
    values: th.Tensor = policy.predict_values(obs, policy.initial_state(4), th.zeros(4, dtype=th.bool)).detach()
    return values


def test_mean_and_scale_are_those_of_decayed_targets() -> None:
    normalizer = ValueNormalizer()
    assert normalizer.mean_and_scale == (0, 1)
    normalizer.update(np.array([[3.0], [5.0]]))
    assert normalizer.mean_and_scale == pytest.approx((4, math.sqrt(17)))
    normalizer.update(np.array([-1.0, -1.0, -1.0, -1.0]))  # an update counts as one, whatever its size
    expected = (0.99 * 4 - 1) / 1.99, math.sqrt((0.99 * 17 + 1) / 1.99)
    assert normalizer.mean_and_scale == pytest.approx(expected)
    assert normalizer(th.tensor([-2.0, 0.5])).tolist() == pytest.approx(
        [expected[0] - 2 * expected[1], sum(expected) - expected[1] / 2]
    )


def test_statistics_forget() -> None:
    normalizer = ValueNormalizer()
    normalizer.update(np.array([1e6]))
    for _ in range(3000):
        normalizer.update(np.array([20.0, 30.0]))
    assert normalizer.mean_and_scale == pytest.approx((25, math.sqrt(650)), rel=1e-4)


def test_squares_of_huge_targets_do_not_overflow_on_the_way() -> None:
    normalizer = ValueNormalizer().double()
    normalizer.update(np.array([1e30], dtype=np.float32))
    assert normalizer.mean_and_scale == pytest.approx((1e30, 1e30))


def test_values_follow_the_size_of_targets_but_small_ones_are_not_magnified() -> None:
    outputs, targets = th.tensor([-1.0, 0.0, 0.5]), np.array([2.0, -7.0, 30.0])
    small, large, sparse = ValueNormalizer(), ValueNormalizer(), ValueNormalizer()
    small.update(targets)
    large.update(1024 * targets)
    assert th.equal(large(outputs), 1024 * small(outputs))
    sparse.update(np.array([0.0, 0.0, 1.0, -1.0]))
    assert sparse.mean_and_scale == (0, 1)


def test_only_policies_for_images_learn_raw_values_by_default() -> None:
    dictionary = spaces.Dict({"vector": VECTOR})
    for policy in (make(), make(MultiInputLstmPolicy, dictionary), make(CnnLstmPolicy, IMAGE, normalize_values=True)):
        assert [name for name, _ in policy.named_buffers()] == ["value_normalizer.statistics"]
        assert policy.update_value_scale(np.array([-30.0, 40.0])) == pytest.approx(math.sqrt(1250))
    for policy in (make(CnnLstmPolicy, IMAGE), make(normalize_values=False)):
        assert list(policy.buffers()) == []
        assert policy.update_value_scale(np.array([-30.0, 40.0])) == 1
        assert not any("normalizer" in key for key in policy.state_dict())


def test_adam_does_not_magnify_noise_where_the_size_of_losses_is_known() -> None:
    def eps(policy: Any) -> float:
        (group,) = policy.optimizer.param_groups
        value: float = group["eps"]
        return value

    assert eps(make()) == eps(make(optimizer_kwargs=dict(fused=True))) == 1e-3
    assert eps(make(optimizer_kwargs=dict(eps=1e-8))) == 1e-8
    for raw in (make(normalize_values=False), make(CnnLstmPolicy, IMAGE), make(CnnLstmPolicy, IMAGE, normalize_values=True)):
        assert eps(raw) == 1e-5  # SB3's
    assert eps(make(optimizer_class=th.optim.RMSprop)) == 1e-8


def test_feed_forward_policies_learn_raw_values() -> None:
    adapter = as_recurrent(MlpPolicy(VECTOR, spaces.Discrete(2), lambda _: 1e-3))
    assert adapter.update_value_scale(np.array([-30.0, 40.0])) == 1


def test_the_network_and_its_first_values_are_those_without_normalization() -> None:
    normalized, raw = make(), make(normalize_values=False)
    assert [name for name, _ in normalized.named_parameters()] == [name for name, _ in raw.named_parameters()]
    assert th.equal(values_of(normalized), values_of(raw))
    normalized.update_value_scale(np.array([-30.0, 40.0]))
    assert th.allclose(values_of(normalized), 5 + math.sqrt(1250) * values_of(raw))


@pytest.mark.parametrize("part", ["lstm.", "value_net.bias"])
def test_some_parameters_alone_leave_the_statistics(part: str) -> None:
    policy = make()
    policy.update_value_scale(np.array([70.0]))
    parameters = {key: value for key, value in policy.state_dict().items() if key.startswith(part)}
    policy.load_state_dict(parameters, strict=False)
    assert policy.value_normalizer.mean_and_scale == pytest.approx((70, 70))
