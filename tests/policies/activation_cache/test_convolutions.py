"""A replayed ``ConvolutionCache`` has the features and gradients of ``BabyCNN``."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_a3c.policies.activation_cache.convolutions import ConvolutionCache
from sb3_a3c.policies.torch_layers import IMAGES_AT_ONCE, BabyCNN

SPACE = spaces.Box(0, 255, (2, 20, 27), dtype=np.uint8)


def recorded(cnn: BabyCNN, images: th.Tensor) -> ConvolutionCache:
    cache = ConvolutionCache(cnn, len(images) // 2, 2)
    with th.no_grad():
        for part in th.split(images, 2):
            assert th.allclose(cache.record(part), cnn(part), rtol=1e-12, atol=0.01 if cnn.dtype == th.bfloat16 else 0.0)
    return cache


@pytest.mark.parametrize(
    ("n_images", "layout"),
    [
        (6, th.contiguous_format),
        (IMAGES_AT_ONCE, th.channels_last),
        (2 * IMAGES_AT_ONCE + 6, th.contiguous_format),
        (2 * IMAGES_AT_ONCE + 6, th.channels_last),
    ],
)
def test_replay_has_the_features_and_gradients_of_the_convolutions(n_images: int, layout: th.memory_format) -> None:
    cnn = BabyCNN(SPACE).double()
    for parameter in cnn.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=layout)
    images = th.rand(n_images, *SPACE.shape, dtype=th.float64)
    weights = th.rand(n_images, cnn.features_dim, dtype=th.float64)
    features, expected = recorded(cnn, images).replay(), cnn(images)
    assert th.allclose(features, expected, rtol=1e-12)
    gradients = [th.autograd.grad((x * weights).sum(), list(cnn.parameters())) for x in (features, expected)]
    for found, reference in zip(*gradients, strict=True):
        assert th.allclose(found, reference, rtol=1e-10)


def test_cleared_cache_replays_only_later_records() -> None:
    cnn = BabyCNN(SPACE)
    images = th.rand(4, *SPACE.shape)
    cache = recorded(cnn, images)
    cache.clear()
    with th.no_grad():
        cache.record(images[1:3])
    assert th.equal(cache.replay(), recorded(cnn, images[1:3]).replay())


def test_frozen_weights_get_no_gradient() -> None:
    cnn = BabyCNN(SPACE)
    for parameter in list(cnn.parameters())[:3]:  # the first layer, and the weight of the second
        parameter.requires_grad = False
    images = th.rand(2, *SPACE.shape)
    recorded(cnn, images).replay().sum().backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in cnn.parameters()]
    assert [gradient is None for gradient in found] == [True] * 3 + [False] * 5
    cnn.zero_grad()
    cnn(images).sum().backward()
    for gradient, parameter in list(zip(found, cnn.parameters(), strict=True))[3:]:
        assert th.allclose(gradient, parameter.grad, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("cached", [False, True])
def test_bfloat16_is_close_to_float32_and_keeps_float32_weights_and_gradients(cached: bool) -> None:
    exact, rough = BabyCNN(SPACE), BabyCNN(SPACE, dtype=th.bfloat16)
    rough.load_state_dict(exact.state_dict())
    images = th.rand(6, *SPACE.shape)
    features = recorded(rough, images).replay() if cached else rough(images)
    assert features.dtype == th.float32
    assert not th.equal(features, exact(images))
    assert th.allclose(features, exact(images), atol=0.01)
    for output in (exact(images), features):
        (output * th.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for found, reference in zip(rough.parameters(), exact.parameters(), strict=True):
        assert found.dtype == th.float32
        assert found.grad is not None
        assert reference.grad is not None
        assert found.grad.dtype == th.float32
        assert float((found.grad - reference.grad).norm() / reference.grad.norm()) < 0.02
