"""For which networks there is an activation cache, how large it may be, and which part belongs to which environments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_a3c.policies.activation_cache import cache as cache_module
from sb3_a3c.policies.activation_cache.cache import ActivationCache, new_activation_cache
from sb3_a3c.policies.torch_layers import BabyCNN, EmbeddingExtractor, run_lstm

SPACE = spaces.Box(0, 255, (2, 20, 27), dtype=np.uint8)
CHUNKS = [slice(0, 2), slice(2, 3)]


def new_cache(extractor: BaseFeaturesExtractor, **lstm_kwargs: Any) -> ActivationCache | None:
    return new_activation_cache(extractor, nn.LSTM(extractor.features_dim, 8, **lstm_kwargs), 2, CHUNKS)


@pytest.mark.parametrize("extractor_class", [BabyCNN, EmbeddingExtractor, FlattenExtractor])
def test_each_chunk_replays_its_environments(extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(SPACE)
    lstm = nn.LSTM(extractor.features_dim, 8)
    cache = new_activation_cache(extractor, lstm, 2, CHUNKS)
    assert cache is not None
    observations, starts = th.rand(2, 3, *SPACE.shape), th.tensor([[False] * 3, [False, True, False]])
    state = first = (th.randn(1, 3, 8), th.randn(1, 3, 8))
    extract = cache.extractor or extractor
    assert (cache.extractor is None) == (extractor_class is not BabyCNN)
    with th.no_grad():
        for images, now in zip(observations, starts, strict=True):
            _, state = cache.record(extract(images), state, now)  # type: ignore[assignment]
    for part, chunk in zip(cache.chunk_caches(), CHUNKS, strict=True):
        assert part.envs == chunk
        # (n_steps, n_envs, …) -> (n_steps * n, …)
        features = extractor(observations[:, chunk].flatten(0, 1))
        if part.convolutions is not None:
            assert th.allclose(part.convolutions.replay(), features, rtol=1e-4, atol=1e-6)
        expected, _ = run_lstm(lstm, features, tuple(x[:, chunk].contiguous() for x in first), starts[:, chunk])
        for given in (features, None):
            assert th.allclose(part.lstm.replay(given, part.envs), expected, rtol=1e-4, atol=1e-6)


class Noisy(BabyCNN):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations + th.rand_like(observations))


class Halved(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) / 2


@pytest.mark.parametrize("extractor_class", [Noisy, Halved])
def test_no_cache_for_custom_extractors(extractor_class: type[BaseFeaturesExtractor]) -> None:
    assert new_cache(extractor_class(SPACE)) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda layers: layers.__setitem__(1, nn.ReLU()),
        lambda layers: layers.insert(1, nn.BatchNorm2d(32)),
        lambda layers: layers[2].register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layers: nn.utils.parametrizations.spectral_norm(layers[0]),
    ],
)
def test_no_cache_for_edited_convolutions(edit: Callable[[nn.Sequential], object]) -> None:
    cnn = BabyCNN(SPACE)
    edit(cnn.cnn)
    assert new_cache(cnn) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda extractor: extractor.linear.append(nn.Dropout()),
        lambda extractor: extractor.linear.__setitem__(1, nn.BatchNorm1d(64)),
        lambda extractor: extractor.linear[0].register_forward_hook(lambda module, inputs, output: 2 * output),
    ],
)
def test_no_cache_for_edited_embedding(edit: Callable[[EmbeddingExtractor], object]) -> None:
    extractor = EmbeddingExtractor(SPACE)
    assert new_cache(extractor) is not None
    edit(extractor)
    assert new_cache(extractor) is None


def test_no_cache_for_lstm_with_dropout() -> None:
    assert new_cache(FlattenExtractor(SPACE), num_layers=2) is not None
    assert new_cache(FlattenExtractor(SPACE), num_layers=2, dropout=0.5) is None


@pytest.mark.parametrize("extractor_class", [BabyCNN, FlattenExtractor])
def test_cache_size_is_limited(monkeypatch: pytest.MonkeyPatch, extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(SPACE)
    lstm = nn.LSTM(extractor.features_dim, 8, num_layers=2)
    cache = new_activation_cache(extractor, lstm, 5, CHUNKS)
    assert cache is not None
    parts = [part for layer in cache._lstm.layers for part in vars(layer).values() if isinstance(part, th.Tensor)]
    kept = [part for part in parts if part.is_floating_point()]
    kept += [part for convolutions in cache._convolutions for part in convolutions.kept]
    monkeypatch.setattr(cache_module, "MAX_CACHE_BYTES", sum(part.nbytes for part in kept))
    assert new_activation_cache(extractor, lstm, 5, CHUNKS) is not None
    assert new_activation_cache(extractor, lstm, 6, CHUNKS) is None
    assert new_activation_cache(extractor, lstm, 5, [slice(0, 4)]) is None
    assert new_activation_cache(extractor.double(), lstm.double(), 5, CHUNKS) is None
