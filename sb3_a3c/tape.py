"""
What a policy computed while acting out a rollout, kept for learning: no second forward pass.

A tape is recorded by ``policy.act``, step by step for all environments, and replayed by ``policy.evaluate_actions``, chunk
by chunk: learning takes as many environments at a time as make an update.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_a3c.convolutions import BabyCNN, ConvolutionTape
from sb3_a3c.lstm import LstmState, LstmTape, is_simple
from sb3_a3c.plain import is_plain

#: The tape of a worker is no larger than this; 160 images of 84x84 need 55 MB.
MAX_TAPE_BYTES = 256 * 2**20


class ChunkTape(NamedTuple):
    """The part of a tape that some of the environments have recorded."""

    convolutions: ConvolutionTape | None  #: None if the features have no weights
    lstm: LstmTape
    envs: slice  #: which


class RolloutTape:
    """
    The tape of a rollout.

    :param cnn: the convolutions before the LSTM, or None if there are none
    :param lstm: the LSTM; all weights must stay the same between recording and the backward pass
    :param n_steps: of the rollout
    :param chunks: environments that are replayed at a time; together all of them, in order
    """

    def __init__(self, cnn: BabyCNN | None, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]) -> None:
        self._chunks = chunks
        self._sizes = [chunk.stop - chunk.start for chunk in chunks]
        self._lstm = LstmTape(lstm, n_steps, sum(self._sizes))
        self._convolutions = [] if cnn is None else [ConvolutionTape(cnn, n_steps, size) for size in self._sizes]

    @property
    def extractor(self) -> Callable[[th.Tensor], th.Tensor] | None:
        """Takes the place of the features extractor while recording; None if that is to compute them as ever."""
        return self._record_images if self._convolutions else None

    def _record_images(self, images: th.Tensor) -> th.Tensor:
        parts = th.split(images, self._sizes)
        return th.cat([tape.record(part) for tape, part in zip(self._convolutions, parts, strict=True)])

    def record(self, features: th.Tensor, state: LstmState, episode_starts: th.Tensor) -> tuple[th.Tensor, LstmState]:
        """As :meth:`LstmTape.record`, of all environments."""
        return self._lstm.record(features, state, episode_starts)

    def rewind(self) -> None:
        """Forget what was recorded."""
        self._lstm.rewind()
        for tape in self._convolutions:
            tape.rewind()

    def chunk_tapes(self) -> list[ChunkTape]:
        """:return: for each chunk what was recorded of it"""
        convolutions = self._convolutions or [None] * len(self._chunks)  # type: ignore[list-item]
        return [ChunkTape(part, self._lstm, envs) for part, envs in zip(convolutions, self._chunks, strict=True)]


def new_tape(extractor: BaseFeaturesExtractor, lstm: nn.LSTM, n_steps: int, chunks: Sequence[slice]) -> RolloutTape | None:
    """
    :param extractor: what makes features of observations
    :param lstm: what follows it
    :param n_steps: that a rollout has
    :param chunks: environments that are learned from at a time; together all of them, in order
    :return: a tape; None if one of the two has been changed by somebody (then acting and learning may compute different
        things), or the tape would be too large
    """
    cnn = extractor if isinstance(extractor, BabyCNN) else None
    if not (_is_original_flatten(extractor) if cnn is None else cnn.is_original()) or not is_simple(lstm):
        return None
    n_transitions = n_steps * chunks[-1].stop
    n_bytes = n_transitions * LstmTape.numbers_per_step(lstm) * lstm.all_weights[0][0].element_size()
    if cnn is not None:
        n_bytes += n_transitions * ConvolutionTape.bytes_per_image(cnn)
    return RolloutTape(cnn, lstm, n_steps, chunks) if n_bytes <= MAX_TAPE_BYTES else None


def _is_original_flatten(extractor: BaseFeaturesExtractor) -> bool:
    flatten = getattr(extractor, "flatten", None)
    return is_plain(extractor, FlattenExtractor) and flatten is not None and is_plain(flatten, nn.Flatten)
