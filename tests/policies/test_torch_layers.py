"""``BabyCNN``, ``EmbeddingExtractor``, and an LSTM run over rollouts."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from sb3_a3c import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from sb3_a3c.policies.torch_layers import (
    IMAGES_AT_ONCE,
    BabyCNN,
    EmbeddingExtractor,
    add_to_forget_gates,
    is_standard_lstm,
    run_lstm,
)

CHOICE = spaces.Discrete(4)


def images_of(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, dtype=np.uint8)


@pytest.mark.parametrize("n_channels", [1, 4])
def test_baby_cnn_makes_1152_features_of_an_84x84_image(n_channels: int) -> None:
    extractor = BabyCNN(images_of(n_channels, 84, 84))
    assert extractor.features_dim == 1152
    assert extractor(th.zeros(2, n_channels, 84, 84)).shape == (2, 1152)
    convolutions = [layer for layer in extractor.cnn if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(n_channels, 32)] + [(32, 32)] * 3
    assert all((layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (2, 2), (1, 1)) for layer in convolutions)
    assert sum(isinstance(layer, nn.ELU) for layer in extractor.cnn) == 4


@pytest.mark.parametrize(("height", "width"), [(36, 48), (17, 31), (3, 3)])
def test_baby_cnn_takes_images_of_any_size(height: int, width: int) -> None:
    extractor = BabyCNN(images_of(3, height, width))
    assert extractor(th.zeros(1, 3, height, width)).shape == (1, extractor.features_dim)


@pytest.mark.parametrize("n_images", [IMAGES_AT_ONCE, 2 * IMAGES_AT_ONCE + 3])
def test_slices_of_a_batch_give_the_same_features_and_gradients(n_images: int) -> None:
    extractor = BabyCNN(images_of(1, 20, 20)).double()
    images = th.rand(n_images, 1, 20, 20, dtype=th.float64)
    weights = th.rand(n_images, extractor.features_dim, dtype=th.float64)
    sliced, whole = extractor(images), extractor.cnn(images)
    assert sliced.shape == weights.shape
    assert th.allclose(sliced, whole, rtol=1e-12)
    gradients = [th.autograd.grad((features * weights).sum(), list(extractor.parameters())) for features in (sliced, whole)]
    for found, expected in zip(*gradients, strict=True):
        assert th.allclose(found, expected, rtol=1e-10)


FLOAT_IMAGES = spaces.Box(0, 1, (3, 36, 40))
#: Space, and whether it has normalized images.
NOT_IMAGES: list[Any] = [
    *[(spaces.Box(-1, 1, (3,)), False), (images_of(84, 84), True), (CHOICE, False), (spaces.Dict(image=FLOAT_IMAGES), True)],
    *[(FLOAT_IMAGES, False), (spaces.Box(0, 255, (3, 36, 40)), False), (spaces.Box(0, 1, (3, 36, 40), np.uint8), False)],
    *[(images_of(36, 40, 3), False), (spaces.Box(0, 1, (36, 40, 3)), True), (spaces.Box(0, 1, (36, 3, 40)), True)],
]


@pytest.mark.parametrize(("space", "normalized"), NOT_IMAGES)
def test_baby_cnn_refuses_what_nature_cnn_refuses(space: spaces.Space[Any], normalized: bool) -> None:
    message = r"BabyCNN (only with images not with|needs channels-first images.*would have 36 channels of)"
    for extractor, errors in ((NatureCNN, (AssertionError, RuntimeError)), (BabyCNN, AssertionError)):
        with pytest.raises(errors, match=message if extractor is BabyCNN else None):
            extractor(space, normalized_image=normalized)
    with pytest.raises(AssertionError, match=message):
        CnnLstmPolicy(space, CHOICE, lambda _: 1e-4, normalize_images=not normalized)


@pytest.mark.parametrize(
    ("space", "normalized"),
    [
        (FLOAT_IMAGES, True),
        (images_of(3, 36, 40), True),
        (spaces.Box(-9, 9, (64, 36, 40)), True),
        (images_of(64, 36, 40), False),
    ],
)
def test_baby_cnn_takes_what_nature_cnn_takes(space: spaces.Box, normalized: bool) -> None:
    policy = CnnLstmPolicy(space, CHOICE, lambda _: 1e-4, normalize_images=not normalized)
    for extractor in (NatureCNN(space, normalized_image=normalized), policy.features_extractor):
        assert extractor.cnn[0].in_channels == space.shape[0]  # type: ignore[union-attr, index]


def test_baby_cnn_refuses_other_precisions() -> None:
    with pytest.raises(ValueError, match=r"can't compute in torch.float16. Use th.float32 or th.bfloat16"):
        BabyCNN(images_of(2, 20, 27), dtype=th.float16)


def test_embedding_is_a_normalized_layer_with_tanh() -> None:
    extractor = EmbeddingExtractor(spaces.Box(-1, 1, (2, 3)), features_dim=5)
    observations = th.randn(4, 2, 3)
    linear, norm, _ = extractor.linear
    assert isinstance(linear, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    sums = observations.reshape(4, 6) @ linear.weight.T + linear.bias
    centered = sums - sums.mean(dim=1, keepdim=True)
    expected = th.tanh(centered / (centered.square().mean(dim=1, keepdim=True) + norm.eps).sqrt())
    th.testing.assert_close(extractor(observations), expected)
    assert extractor.features_dim == 5


def test_embedding_of_a_dictionary_and_of_a_choice() -> None:
    parts: dict[str, spaces.Space[Any]] = {"image": images_of(3, 36, 36), "vector": spaces.Box(-1, 1, (2,))}
    extractor = EmbeddingExtractor(spaces.Dict(parts), cnn_output_dim=10)
    assert extractor.linear[0].in_features == 10 + 2
    assert extractor({"image": th.rand(7, 3, 36, 36), "vector": th.rand(7, 2)}).shape == (7, 64)
    normalized = spaces.Dict({"image": spaces.Box(0.0, 1.0, (3, 36, 36))})
    policy = MultiInputLstmPolicy(normalized, CHOICE, lambda _: 1e-4, normalize_images=False)
    assert isinstance(policy.features_extractor, EmbeddingExtractor)
    assert MlpLstmPolicy(spaces.Discrete(5), CHOICE, lambda _: 1e-4).lstm.input_size == 64


def test_lstm_is_called_once_for_each_stretch_between_episode_starts() -> None:
    lstm, state = nn.LSTM(7, 6), (th.randn(1, 3, 6), th.randn(1, 3, 6))
    lengths: list[int] = []
    lstm.register_forward_hook(lambda module, inputs, output: lengths.append(len(inputs[0])))
    starts = th.zeros(6, 3, dtype=th.bool)
    starts[0, 0] = starts[2, 1] = starts[4, 0] = starts[4, 2] = True
    for episode_starts, expected in ((starts, [2, 2, 2]), (th.zeros_like(starts), [6]), (th.ones_like(starts), [1] * 6)):
        lengths.clear()
        run_lstm(lstm, th.randn(18, 7), state, episode_starts)
        assert lengths == expected


@pytest.mark.parametrize("kwargs", [{"num_layers": 2}, {"bias": False}, {"num_layers": 2, "dropout": 0.5}])
def test_single_step_without_gradient_is_that_of_the_lstm(kwargs: dict[str, Any]) -> None:
    lstm = nn.LSTM(7, 6, **kwargs).eval()
    features, state = th.randn(5, 7), tuple(th.randn(lstm.num_layers, 5, 6) for _ in range(2))
    starts = th.tensor([True, False, False, True, False])
    with th.no_grad():
        outputs, after = run_lstm(lstm, features, state, starts)
        expected, expected_after = lstm(features[None], tuple(part * ~starts[:, None] for part in state))
    for found, reference in zip((outputs, *after), (expected[0], *expected_after), strict=True):
        assert th.allclose(found, reference, rtol=1e-5, atol=1e-6)


def test_standard_lstm_has_no_dropout_and_no_subclass() -> None:
    assert is_standard_lstm(nn.LSTM(7, 6, 2, bias=False))
    assert not is_standard_lstm(nn.LSTM(7, 6, 2, dropout=0.5))
    assert not is_standard_lstm(type("Own", (nn.LSTM,), {})(7, 6))


def test_forget_gates_keep_what_their_bias_says() -> None:
    lstm = nn.LSTM(3, 6)
    for parameter in lstm.parameters():
        nn.init.zeros_(parameter)
    add_to_forget_gates(lstm, 2.0)
    _, (_, cell) = lstm(th.zeros(1, 1, 3), (th.zeros(1, 1, 6), th.ones(1, 1, 6)))
    assert th.allclose(cell, th.tensor(2.0).sigmoid())
