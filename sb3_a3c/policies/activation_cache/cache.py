"""
What a policy computed while acting out a rollout, kept for learning: no second forward pass.

A cache is recorded by ``policy.act``, step by step for all environments, and replayed by ``policy.evaluate_actions``, chunk
by chunk: learning takes as many environments at a time as make an update.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_a3c.policies.activation_cache.convolutions import ConvolutionCache
from sb3_a3c.policies.activation_cache.lstm import LstmCache
from sb3_a3c.policies.overrides import is_unmodified
from sb3_a3c.policies.torch_layers import BabyCNN, LstmState, is_simple

#: The cache of a worker is no larger than this; 160 images of 84x84 need 55 MB.
MAX_CACHE_BYTES = 256 * 2**20


class ChunkCache(NamedTuple):
    """The part of a cache that some of the environments have recorded."""

    convolutions: ConvolutionCache | None  #: None if the features have no weights
    lstm: LstmCache
    envs: slice  #: which


class ActivationCache:
    """
    The cache of a rollout.

    :param cnn: the convolutions before the LSTM, or None if there are none
    :param lstm: the LSTM; all weights must stay the same between recording and the backward pass
    :param n_steps: of the rollout
    :param chunks: environments that are replayed at a time; together all of them, in order
    """

    def __init__(self, cnn: BabyCNN | None, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]) -> None:
        self._chunks = chunks
        self._sizes = [chunk.stop - chunk.start for chunk in chunks]
        self._lstm = LstmCache(lstm, n_steps, sum(self._sizes))
        self._convolutions = [] if cnn is None else [ConvolutionCache(cnn, n_steps, size) for size in self._sizes]

    @property
    def extractor(self) -> Callable[[th.Tensor], th.Tensor] | None:
        """Takes the place of the features extractor while recording; None if that is to compute them as ever."""
        return self._record_images if self._convolutions else None

    def _record_images(self, images: th.Tensor) -> th.Tensor:
        parts = th.split(images, self._sizes)
        return th.cat([cache.record(part) for cache, part in zip(self._convolutions, parts, strict=True)])

    def record(self, features: th.Tensor, state: LstmState, episode_starts: th.Tensor) -> tuple[th.Tensor, LstmState]:
        """As :meth:`LstmCache.record`, of all environments."""
        return self._lstm.record(features, state, episode_starts)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._lstm.clear()
        for cache in self._convolutions:
            cache.clear()

    def chunk_caches(self) -> list[ChunkCache]:
        """:return: for each chunk what was recorded of it"""
        convolutions = self._convolutions or [None] * len(self._chunks)  # type: ignore[list-item]
        return [ChunkCache(part, self._lstm, envs) for part, envs in zip(convolutions, self._chunks, strict=True)]


def new_activation_cache(
    extractor: BaseFeaturesExtractor, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]
) -> ActivationCache | None:
    """
    :param extractor: what makes features of observations
    :param lstm: what follows it
    :param n_steps: that a rollout has
    :param chunks: environments that are learned from at a time; together all of them, in order
    :return: a cache; None if one of the two has been changed by somebody (then acting and learning may compute different
        things), or the cache would be too large
    """
    cnn = extractor if isinstance(extractor, BabyCNN) else None
    if not (_is_original_flatten(extractor) if cnn is None else cnn.is_original()) or not is_simple(lstm):
        return None
    n_transitions = n_steps * chunks[-1].stop
    n_bytes = n_transitions * LstmCache.numbers_per_step(lstm) * lstm.all_weights[0][0].element_size()
    if cnn is not None:
        n_bytes += n_transitions * ConvolutionCache.bytes_per_image(cnn)
    return ActivationCache(cnn, lstm, n_steps, chunks) if n_bytes <= MAX_CACHE_BYTES else None


def _is_original_flatten(extractor: BaseFeaturesExtractor) -> bool:
    flatten = getattr(extractor, "flatten", None)
    return is_unmodified(extractor, FlattenExtractor) and flatten is not None and is_unmodified(flatten, nn.Flatten)
