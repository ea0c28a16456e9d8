"""The convolutions of baby-a3c; a cache's backward pass is that of the convolutions themselves."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_a3c import CnnLstmPolicy
from sb3_a3c.policies.activation_cache.convolutions import ConvolutionCache
from sb3_a3c.policies.torch_layers import IMAGES_AT_ONCE, BabyCNN

CHOICE = spaces.Discrete(4)
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
DICT = spaces.Dict({"image": spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8), "vector": VECTOR})
SMALL = spaces.Box(0, 255, (2, 20, 27), dtype=np.uint8)


@pytest.mark.parametrize("n_channels", [1, 3, 4])
def test_baby_cnn_makes_1152_features_of_an_84x84_image(n_channels: int) -> None:
    extractor = BabyCNN(spaces.Box(0, 255, (n_channels, 84, 84), dtype=np.uint8))
    assert extractor.features_dim == 1152
    assert extractor(th.zeros(2, n_channels, 84, 84)).shape == (2, 1152)
    convolutions = [layer for layer in extractor.cnn if isinstance(layer, th.nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(n_channels, 32)] + [(32, 32)] * 3
    assert all((layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1)) for layer in convolutions)
    assert sum(isinstance(layer, th.nn.ELU) for layer in extractor.cnn) == 4


@pytest.mark.parametrize(("height", "width"), [(8, 8), (36, 48), (17, 31), (1, 1)])
def test_baby_cnn_takes_images_of_any_size(height: int, width: int) -> None:
    extractor = BabyCNN(spaces.Box(0, 255, (3, height, width), dtype=np.uint8))
    assert extractor(th.zeros(1, 3, height, width)).shape == (1, extractor.features_dim)


@pytest.mark.parametrize("n_images", [IMAGES_AT_ONCE - 1, IMAGES_AT_ONCE, 2 * IMAGES_AT_ONCE + 3])
def test_a_batch_that_is_too_large_for_the_cache_is_the_same_in_slices(n_images: int) -> None:
    extractor = BabyCNN(spaces.Box(0, 255, (1, 20, 20), dtype=np.uint8)).double()
    images = th.rand(n_images, 1, 20, 20, dtype=th.float64)
    weights = th.rand(n_images, extractor.features_dim, dtype=th.float64)
    gradients = []
    for features in (extractor(images), extractor.cnn(images)):
        assert features.shape == weights.shape
        gradients.append(th.autograd.grad((features * weights).sum(), list(extractor.parameters())))
    assert th.allclose(extractor(images), extractor.cnn(images), rtol=1e-12)
    for sliced, whole in zip(*gradients, strict=True):
        assert th.allclose(sliced, whole, rtol=1e-10)


@pytest.mark.parametrize("space", [VECTOR, spaces.Box(0, 255, (84, 84), dtype=np.uint8), CHOICE, DICT])
def test_baby_cnn_refuses_what_is_no_image(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match=r"BabyCNN needs images.*MlpLstmPolicy.*MultiInputLstmPolicy"):
        BabyCNN(space)
    with pytest.raises(ValueError, match="BabyCNN needs images"):
        CnnLstmPolicy(space, CHOICE, lambda _: 1e-4)


# --- the cache ---


def recorded(cnn: BabyCNN, images: th.Tensor, batch: int) -> ConvolutionCache:
    assert len(images) % batch == 0
    cache = ConvolutionCache(cnn, len(images) // batch, batch)
    with th.no_grad():
        for part in th.split(images, batch):
            assert th.allclose(cache.record(part), cnn(part), rtol=1e-12, atol=0.01 if cnn.dtype == th.bfloat16 else 0.0)
    return cache


@pytest.mark.parametrize("layout", [th.channels_last, th.contiguous_format])
@pytest.mark.parametrize("n_images", [6, IMAGES_AT_ONCE, 2 * IMAGES_AT_ONCE + 6])
def test_a_replayed_tape_has_the_features_and_gradients_of_the_convolutions(n_images: int, layout: th.memory_format) -> None:
    cnn = BabyCNN(SMALL).double()
    for parameter in cnn.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=layout)
    images = th.rand(n_images, 2, 20, 27, dtype=th.float64)
    weights = th.rand(n_images, cnn.features_dim, dtype=th.float64)
    cache = recorded(cnn, images, batch=2)
    features, expected = cache.replay(), cnn(images)
    assert th.allclose(features, expected, rtol=1e-12)
    gradients = [th.autograd.grad((x * weights).sum(), list(cnn.parameters())) for x in (features, expected)]
    for found, reference in zip(*gradients, strict=True):
        assert th.allclose(found, reference, rtol=1e-10)


def test_a_rewound_tape_knows_only_what_is_recorded_then() -> None:
    cnn = BabyCNN(SMALL)
    images = th.rand(4, 2, 20, 27)
    cache = recorded(cnn, images, batch=2)
    cache.clear()
    with th.no_grad():
        cache.record(images[1:3])
    assert th.equal(cache.replay(), recorded(cnn, images[1:3], batch=2).replay())


def test_frozen_weights_get_no_gradient_from_a_tape() -> None:
    cnn = BabyCNN(SMALL)
    for parameter in list(cnn.parameters())[:3]:  # the first layer, and the weight of the second
        parameter.requires_grad = False
    images = th.rand(2, 2, 20, 27)
    recorded(cnn, images, batch=2).replay().sum().backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in cnn.parameters()]
    cnn.zero_grad()
    cnn(images).sum().backward()
    for one, parameter in zip(found, cnn.parameters(), strict=True):
        assert (one is None) == (parameter.grad is None)
        assert one is None or th.allclose(one, parameter.grad, rtol=1e-4)  # type: ignore[arg-type]


def test_160_images_need_53_mb() -> None:
    cnn = BabyCNN(spaces.Box(0, 255, (1, 84, 84), dtype=np.uint8))
    n_bytes = sum(kept.nbytes for kept in ConvolutionCache(cnn, 20, 8).kept)
    assert n_bytes == 160 * ConvolutionCache.bytes_per_image(cnn)
    assert n_bytes / 1e6 == pytest.approx(53, abs=0.5)


@pytest.mark.parametrize("taped", [False, True])
def test_bfloat16_computes_roughly_the_same_with_float32_weights_and_gradients(taped: bool) -> None:
    exact, rough = BabyCNN(SMALL), BabyCNN(SMALL, dtype=th.bfloat16)
    rough.load_state_dict(exact.state_dict())
    images = th.rand(6, 2, 20, 27)
    features = recorded(rough, images, batch=2).replay() if taped else rough(images)
    assert features.dtype == th.float32
    assert not th.equal(features, exact(images))
    assert th.allclose(features, exact(images), atol=0.01)
    for output in (exact(images), features):
        (output * th.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for mine, reference in zip(rough.parameters(), exact.parameters(), strict=True):
        assert mine.dtype == th.float32
        assert mine.grad is not None
        assert reference.grad is not None
        assert mine.grad.dtype == th.float32
        assert float((mine.grad - reference.grad).norm() / reference.grad.norm()) < 0.02


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"can't compute in torch.float16. Use th.float32 or th.bfloat16"):
        BabyCNN(SMALL, dtype=th.float16)
