"""The cache of a rollout: whose, how large, and which part of it belongs to which environments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_a3c.policies.activation_cache import cache as cache_module
from sb3_a3c.policies.activation_cache.cache import new_activation_cache
from sb3_a3c.policies.torch_layers import BabyCNN, run_lstm

SMALL = spaces.Box(0, 255, (2, 20, 27), dtype=np.uint8)
CHUNKS = [slice(0, 2), slice(2, 3)]


def lstm_after(extractor: BaseFeaturesExtractor, **kwargs: Any) -> nn.LSTM:
    return nn.LSTM(extractor.features_dim, 8, **kwargs)


@pytest.mark.parametrize("extractor_class", [BabyCNN, FlattenExtractor])
def test_each_chunk_replays_its_environments(extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(SMALL)
    lstm = lstm_after(extractor)
    cache = new_activation_cache(extractor, lstm, 2, CHUNKS)
    assert cache is not None
    observations, starts = th.rand(2, 3, *SMALL.shape), th.tensor([[False] * 3, [False, True, False]])
    state = first = (th.randn(1, 3, 8), th.randn(1, 3, 8))
    extract = cache.extractor or extractor
    assert (cache.extractor is None) == (extractor_class is FlattenExtractor)
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
def test_extractors_of_ones_own_get_no_tape(extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(SMALL)
    assert new_activation_cache(extractor, lstm_after(extractor), 2, CHUNKS) is None


def _relu(cnn: BabyCNN) -> None:
    cnn.cnn[1] = nn.ReLU()


def _hook(cnn: BabyCNN) -> None:
    cnn.cnn[2].register_forward_hook(lambda module, inputs, output: 2 * output)


def _normalized(cnn: BabyCNN) -> None:
    nn.utils.parametrizations.spectral_norm(cnn.cnn[0])


def _deeper(cnn: BabyCNN) -> None:
    cnn.cnn.insert(1, nn.BatchNorm2d(32))


def _tied(cnn: BabyCNN) -> None:
    cnn.cnn[4] = cnn.cnn[2]


@pytest.mark.parametrize("edit", [_relu, _hook, _normalized, _deeper, _tied])
def test_edited_convolutions_get_no_tape(edit: Callable[[BabyCNN], None]) -> None:
    cnn = BabyCNN(SMALL)
    edit(cnn)
    assert new_activation_cache(cnn, lstm_after(cnn), 2, CHUNKS) is None


def test_an_lstm_that_learns_otherwise_than_it_acts_gets_no_tape() -> None:
    extractor = FlattenExtractor(SMALL)
    assert new_activation_cache(extractor, lstm_after(extractor, num_layers=2), 2, CHUNKS) is not None
    assert new_activation_cache(extractor, lstm_after(extractor, num_layers=2, dropout=0.5), 2, CHUNKS) is None


def test_an_edited_flatten_extractor_gets_no_tape() -> None:
    extractor = FlattenExtractor(SMALL)
    extractor.flatten = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(extractor.features_dim))  # type: ignore[assignment]
    assert new_activation_cache(extractor, lstm_after(extractor), 2, CHUNKS) is None


@pytest.mark.parametrize("extractor_class", [BabyCNN, FlattenExtractor])
def test_a_tape_is_not_too_large(monkeypatch: pytest.MonkeyPatch, extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(SMALL)
    lstm = lstm_after(extractor)
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
