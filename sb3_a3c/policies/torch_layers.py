"""What comes before the LSTM (an embedding, or the convolutions of baby-a3c), and an LSTM run over rollouts."""

from itertools import pairwise
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_a3c.policies.overrides import is_traced, is_unmodified

#: This number of images goes through the convolutions at once: the output of a layer is then still in the processor's cache
#: when the next layer, or the backward pass, reads it.
IMAGES_AT_ONCE = 40


#: Pixels that ``NatureCNN`` needs at least in height and width.
NATURE_CNN_SIZE = 36


def _check_image_space(space: spaces.Space[Any], normalized_image: bool) -> None:
    """Raise what ``NatureCNN`` raises; not by ``assert``, without which heights would be taken for channels."""
    if not is_image_space(space, check_channels=False, normalized_image=normalized_image):
        raise AssertionError(
            f"You should use BabyCNN only with images not with {space}\n"
            "(you are probably using `CnnLstmPolicy` instead of `MlpLstmPolicy` or `MultiInputLstmPolicy`)\n"
            "If you are using a custom environment,\n"
            "please check it using our env checker:\n"
            "https://stable-baselines3.readthedocs.io/en/master/common/env_checker.html.\n"
            "If you are using `VecNormalize` or already normalized channel-first images "
            "you should pass `normalize_images=False`: \n"
            "https://stable-baselines3.readthedocs.io/en/master/guide/custom_env.html\n"
            "(With SB3's feed-forward policies, BabyCNN also needs `features_extractor_kwargs=dict(normalized_image=True)`.)"
        )
    assert space.shape is not None
    n_channels, height, width = space.shape
    # `NatureCNN` fails for any small image. BabyCNN can read these, but not if it may be that they are not channels-first.
    if min(height, width) < min(n_channels, NATURE_CNN_SIZE):
        raise AssertionError(
            f"BabyCNN needs channels-first images (n_channels, height, width), but {space} would have {n_channels} channels "
            f"of {height}x{width} pixels.\nSB3 re-orders channels-last images of uint8 with values in [0, 255] by itself. "
            "Under `VecNormalize`, use `VecNormalize(VecTransposeImage(env))`; for other images a wrapper of the "
            "environment, such as `gymnasium.wrappers.TransformObservation`."
        )


class BabyCNN(BaseFeaturesExtractor):
    """
    The convolutions of baby-a3c (Greydanus 2017): four layers of 32 filters, 3x3, stride 2, padding 1, each followed by
    an ELU. An 84x84 image becomes 1152 features, or, with ``features_dim``, goes through one more linear layer.

    :param observation_space: a channels-first image space, (n_channels, height, width)
    :param dtype: precision in which the layers compute; weights, their gradients and the features stay float32.
        ``th.bfloat16`` is faster on processors that have instructions for it
    :param normalized_image: Whether to assume that the image is already normalized or not, as in SB3's ``NatureCNN``: when
        True, the space must only be a Box of 3 dimensions; otherwise of uint8, with values in [0, 255]. A3C's own policies
        set it for ``normalize_images=False``
    :param features_dim: Number of features extracted, as in SB3's ``NatureCNN``: the number of units of a linear layer, with
        an ELU, behind the convolutions. None: no such layer, as in baby-a3c
    :raises AssertionError: where ``NatureCNN`` raises, but for channels-first images of fewer than 36 pixels
    :raises ValueError: if the layers can't compute in that precision
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        dtype: th.dtype = th.float32,
        normalized_image: bool = False,
        features_dim: int | None = None,
    ) -> None:
        if dtype not in (th.float32, th.bfloat16):
            raise ValueError(f"BabyCNN can't compute in {dtype}. Use th.float32 or th.bfloat16.")
        _check_image_space(observation_space, normalized_image)
        assert observation_space.shape is not None
        n_channels, *size = observation_space.shape
        self.dtype = dtype
        self.shapes = [(n_channels, *size)]  #: of an image, and of each layer's output for it
        for _ in range(4):
            size = [(length + 1) // 2 for length in size]
            self.shapes.append((32, *size))
        n_flatten = 32 * size[0] * size[1]
        super().__init__(observation_space, n_flatten if features_dim is None else features_dim)
        layers: list[nn.Module] = []
        for in_channels in (n_channels, 32, 32, 32):
            layers += [nn.Conv2d(in_channels, 32, kernel_size=3, stride=2, padding=1), nn.ELU(inplace=True)]
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        #: from the convolutions' output to the features
        self.linear = nn.Sequential()
        if features_dim is not None:
            self.linear.extend([nn.Linear(n_flatten, features_dim), nn.ELU()])
        self._original_layers = repr((self.cnn, self.linear))

    @th.no_grad()
    def center_filters(self) -> None:
        """
        Let the weights of each filter of the first layer add up to 0, and keep the norm of all. A uniform background,
        as in Pong, then has no effect on the features. Otherwise they hardly change over time, all gradients of the LSTM's
        input weights point the same way, and its gates saturate.
        """
        weight = next(self.cnn.parameters())
        norm = weight.norm()
        weight.sub_(weight.mean(dim=(1, 2, 3), keepdim=True))
        weight.mul_(norm / weight.norm())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        # (batch, n_channels, height, width) -> (batch, features_dim)
        if self.dtype == th.float32:
            convolved = self._in_slices(observations)
        else:
            with th.autocast("cpu", self.dtype):
                convolved = self._in_slices(observations).to(observations.dtype)
        features: th.Tensor = self.linear(convolved)
        return features

    def _in_slices(self, observations: th.Tensor) -> th.Tensor:
        if is_traced():  # for any number of images
            images: th.Tensor = self.cnn(observations)
            return images
        parts = [self.cnn(images) for images in th.split(observations, IMAGES_AT_ONCE)]
        return th.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def computed_dtype(self) -> th.dtype:
        """The precision in which the layers compute: like autocast, bfloat16 only in place of float32."""
        dtype = next(self.parameters()).dtype
        return self.dtype if dtype == th.float32 else dtype

    def is_original(self) -> bool:
        """True if the extractor and its layers are as the constructor made them, without hooks or parametrizations."""
        # layers that share their weights have fewer parameters
        same_layers = repr((self.cnn, self.linear)) == self._original_layers and len(list(self.cnn.parameters())) == 8
        return is_unmodified(self, BabyCNN) and same_layers and all(is_unmodified(m, type(m)) for m in self.modules())


class EmbeddingExtractor(BaseFeaturesExtractor):
    """
    SB3's ``FlattenExtractor``, or its ``CombinedExtractor`` for a dictionary, and behind it a linear layer with layer
    normalization (Ba et al. 2016, arXiv:1607.06450) and tanh. An LSTM learns more steadily from these features than from a
    few numbers of any size.

    :param observation_space: any space that these extractors accept
    :param features_dim: Number of features extracted: units of the linear layer
    :param cnn_output_dim: of ``CombinedExtractor``
    :param normalized_image: of ``CombinedExtractor``
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 64,
        cnn_output_dim: int = 256,
        normalized_image: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        self.flat: BaseFeaturesExtractor
        if isinstance(observation_space, spaces.Dict):
            self.flat = CombinedExtractor(observation_space, cnn_output_dim, normalized_image)
        else:
            self.flat = FlattenExtractor(observation_space)
        self.linear = nn.Sequential(nn.Linear(self.flat.features_dim, features_dim), nn.LayerNorm(features_dim), nn.Tanh())

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        # (batch, …) -> (batch, n) -> (batch, features_dim)
        features: th.Tensor = self.linear(self.flat(observations))
        return features

    def is_original(self) -> bool:
        """True if it flattens, and its layers are as the constructor made them, without hooks."""
        modules = [self, self.flat, *self.linear]
        kinds = [EmbeddingExtractor, FlattenExtractor, nn.Linear, nn.LayerNorm, nn.Tanh]
        return len(modules) == len(kinds) and all(map(is_unmodified, modules, kinds))


#: Hidden and cell state, each (n_lstm_layers, n_envs, lstm_hidden_size); empty for a policy without memory.
LstmState = tuple[th.Tensor, ...]


def is_standard_lstm(lstm: nn.LSTM) -> bool:
    """True if the LSTM's weights alone determine its outputs, while acting as well as while learning."""
    return is_unmodified(lstm, nn.LSTM) and not lstm.dropout


@th.no_grad()
def add_to_forget_gates(lstm: nn.LSTM, bias: float) -> None:
    """Add a number to the biases of the forget gates of all layers."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("bias_hh"):
            _, forget_gate, _, _ = parameter.chunk(4)  # (4 * H,) -> 4 of (H,): input, forget, cell, output
            forget_gate += bias


def run_lstm(lstm: nn.LSTM, features: th.Tensor, state: LstmState, episode_starts: th.Tensor) -> tuple[th.Tensor, LstmState]:
    """
    Run an LSTM over a rollout. States must be zeroed where an episode starts, so there is one call for each stretch between
    such steps.

    :param features: (n_steps * n_envs, features_dim)
    :param state: state before the first step
    :param episode_starts: (n_steps, n_envs), or (n_envs,) for one step, which has no branch that depends on values, so that
        it can be traced; bool, or numbers that are not 0 where an episode starts
    :return: outputs (n_steps * n_envs, lstm_hidden_size), and the state after the last step
    """
    episode_starts = episode_starts.bool()
    if episode_starts.dim() == 1:
        return _single_step(lstm, features, tuple(part.masked_fill(episode_starts[:, None], 0.0) for part in state))
    n_steps, n_envs = episode_starts.shape
    sequence = features.reshape(n_steps, n_envs, -1)  # (n_steps * n_envs, F) -> (n_steps, n_envs, F)
    cuts = (episode_starts[1:].any(dim=1).nonzero().flatten() + 1).tolist()
    outputs = []
    for begin, end in pairwise([0, *cuts, n_steps]):
        starts = episode_starts[begin].view(1, n_envs, 1)
        output, state = lstm(sequence[begin:end], tuple(part.masked_fill(starts, 0.0) for part in state))
        outputs.append(output)
    # (n_steps, n_envs, H) -> (n_steps * n_envs, H)
    return (th.cat(outputs) if len(outputs) > 1 else outputs[0]).flatten(0, 1), state


def _single_step(lstm: nn.LSTM, features: th.Tensor, state: LstmState) -> tuple[th.Tensor, LstmState]:
    """One step. Without gradient, ``lstm`` itself would first reorder its weights in memory."""
    if not is_unmodified(lstm, nn.LSTM) or (lstm.dropout and lstm.training):
        output, state = lstm(features[None], state)
        return output[0], state
    hidden, cell = [], []
    x = features
    for weights, h, c in zip(lstm.all_weights, *(part.unbind() for part in state), strict=True):
        x, c = th.lstm_cell(x, (h, c), *weights)
        hidden.append(x)
        cell.append(c)
    # n_lstm_layers of (n_envs, H) -> (n_lstm_layers, n_envs, H)
    return x, (th.stack(hidden), th.stack(cell))
