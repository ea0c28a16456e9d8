"""
The activation cache of a policy: its convolutions and its LSTM.

``policy.act`` records it step by step for all environments; ``policy.evaluate_actions`` replays it chunk by chunk, a chunk
being the environments that make one update.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_a3c.policies.activation_cache.convolutions import ConvolutionCache
from sb3_a3c.policies.activation_cache.lstm import LstmCache
from sb3_a3c.policies.overrides import is_unmodified
from sb3_a3c.policies.torch_layers import BabyCNN, EmbeddingExtractor, LstmState, is_standard_lstm

#: Limit of a worker's cache; 160 images of 84x84 need 55 MB.
MAX_CACHE_BYTES = 256 * 2**20


class ChunkCache(NamedTuple):
    """The part of a cache that belongs to the environments of one chunk."""

    convolutions: ConvolutionCache | None  #: None if the features extractor has none
    lstm: LstmCache
    envs: slice


class ActivationCache:
    """
    The cache of a rollout. All weights must stay the same between recording and the backward pass. The environments of a
    chunk are replayed together; the chunks cover all environments in order.
    """

    def __init__(self, cnn: BabyCNN | None, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]) -> None:
        self._chunks = chunks
        self._sizes = [chunk.stop - chunk.start for chunk in chunks]
        self._lstm = LstmCache(lstm, n_steps, sum(self._sizes))
        self._convolutions = [] if cnn is None else [ConvolutionCache(cnn, n_steps, size) for size in self._sizes]

    @property
    def extractor(self) -> Callable[[th.Tensor], th.Tensor] | None:
        """Takes the place of the policy's features extractor while recording; None if that has no convolutions."""
        return self._record_images if self._convolutions else None

    def _record_images(self, images: th.Tensor) -> th.Tensor:
        parts = th.split(images, self._sizes)
        return th.cat([cache.record(part) for cache, part in zip(self._convolutions, parts, strict=True)])

    def record(self, features: th.Tensor, state: LstmState, episode_starts: th.Tensor) -> tuple[th.Tensor, LstmState]:
        """As :meth:`LstmCache.record`, for all environments."""
        return self._lstm.record(features, state, episode_starts)

    def clear(self) -> None:
        self._lstm.clear()
        for cache in self._convolutions:
            cache.clear()

    def chunk_caches(self) -> list[ChunkCache]:
        convolutions = self._convolutions or [None] * len(self._chunks)  # type: ignore[list-item]
        return [ChunkCache(part, self._lstm, envs) for part, envs in zip(convolutions, self._chunks, strict=True)]


def new_activation_cache(
    extractor: BaseFeaturesExtractor, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]
) -> ActivationCache | None:
    """
    A cache for a features extractor and the LSTM after it; None if one of them is of a kind that has no cache or has been
    modified (acting and learning could then differ), or if the cache would be too large.
    """
    cnn = extractor if isinstance(extractor, BabyCNN) else None
    if isinstance(extractor, BabyCNN | EmbeddingExtractor):
        is_original = extractor.is_original()
    else:
        is_original = is_unmodified(extractor, FlattenExtractor)
    if not (is_original and is_standard_lstm(lstm)):
        return None
    n_bytes = LstmCache.bytes_per_transition(lstm) + (0 if cnn is None else ConvolutionCache.bytes_per_transition(cnn))
    too_large = n_steps * chunks[-1].stop * n_bytes > MAX_CACHE_BYTES
    return None if too_large else ActivationCache(cnn, lstm, n_steps, chunks)
