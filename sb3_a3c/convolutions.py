"""
The convolutions of baby-a3c, and a tape of what they computed while acting.

Acting has taken an image through the convolutions already when learning needs the same again for its gradient. If the
weights are still the same, a :class:`ConvolutionTape` of the activations saves the second forward pass.
"""

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_a3c.plain import is_plain

#: So many images go through the convolutions at once: what a layer has computed is then still in the processor's cache when
#: the next layer, or the backward pass, wants it.
IMAGES_AT_ONCE = 40


class BabyCNN(BaseFeaturesExtractor):
    """
    The convolutions of baby-a3c (Greydanus 2017): four layers of 32 filters, 3x3, stride 2, padding 1, each followed by
    an ELU. An 84x84 image becomes 1152 features.

    :param observation_space: a channels-first image space, (n_channels, height, width)
    :param dtype: precision of the layers' computations; weights, their gradients and the features are as ever.
        ``th.bfloat16`` is faster on processors that have instructions for it
    :raises ValueError: if the space is not an image, or the layers can't compute in that precision
    """

    def __init__(self, observation_space: spaces.Space[Any], dtype: th.dtype = th.float32) -> None:
        if dtype not in (th.float32, th.bfloat16):
            raise ValueError(f"BabyCNN can't compute in {dtype}. Use th.float32 or th.bfloat16.")
        if not is_image_space(observation_space, check_channels=False, normalized_image=True):
            raise ValueError(
                f"BabyCNN needs images (a Box of 3 dimensions), not {observation_space}. "
                "Use `MlpLstmPolicy` for vectors and `MultiInputLstmPolicy` for dictionaries."
            )
        assert observation_space.shape is not None
        n_channels, *size = observation_space.shape
        self.dtype = dtype
        self.shapes = [(n_channels, *size)]  #: of an image, and of what each layer makes of it
        for _ in range(4):
            size = [(length + 1) // 2 for length in size]
            self.shapes.append((32, *size))
        super().__init__(observation_space, features_dim=32 * size[0] * size[1])
        layers: list[nn.Module] = []
        for in_channels in (n_channels, 32, 32, 32):
            layers += [nn.Conv2d(in_channels, 32, kernel_size=3, stride=2, padding=1), nn.ELU(inplace=True)]
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        self._made_layers = repr(self.cnn)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        # (batch, n_channels, height, width) -> (batch, features_dim)
        if self.dtype == th.float32:
            return self._in_slices(observations)
        with th.autocast("cpu", self.dtype):
            return self._in_slices(observations).to(observations.dtype)

    def _in_slices(self, observations: th.Tensor) -> th.Tensor:
        parts = [self.cnn(images) for images in th.split(observations, IMAGES_AT_ONCE)]
        return th.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def computed_dtype(self) -> th.dtype:
        """The precision in which the layers compute: as autocast, bfloat16 instead of float32 only."""
        dtype = next(self.parameters()).dtype
        return self.dtype if dtype == th.float32 else dtype

    def is_original(self) -> bool:
        """:return: whether the layers are those of the constructor, without hooks, parametrizations or methods of others"""
        modules = (self.cnn, *self.cnn)
        same = repr(self.cnn) == self._made_layers and all(is_plain(module, type(module)) for module in modules)
        n_weights = len(list(self.cnn.parameters()))  # fewer than 8 if layers share them
        return same and n_weights == 8 and is_plain(self, BabyCNN)


class ConvolutionTape:
    """
    The activations of a rollout's images, recorded while acting and replayed once while learning.

    :param cnn: the convolutions; their weights must stay the same between recording and the backward pass
    :param n_steps: how many batches are going to be recorded
    :param n_envs: how many images a batch has
    """

    def __init__(self, cnn: BabyCNN, n_steps: int, n_envs: int) -> None:
        self.n_envs = n_envs
        self.n_recorded = 0
        self.parameters = list(cnn.cnn.parameters())  # weight, bias, weight, bias, …
        weight = self.parameters[-2]
        self.dtype = cnn.computed_dtype
        self.layers: list[tuple[th.Tensor, th.Tensor]] = []  #: weights and biases in that precision
        order = th.channels_last if weight.is_contiguous(memory_format=th.channels_last) else th.contiguous_format
        #: the images, and what each layer made of them: (n_images, n_channels, height, width)
        self.kept = [
            th.zeros(n_steps * n_envs, *shape, dtype=self.dtype).contiguous(memory_format=order) for shape in cnn.shapes
        ]
        # the same, step by step
        self._steps: list[tuple[th.Tensor, ...]] = list(zip(*(th.split(kept, n_envs) for kept in self.kept), strict=True))

    @staticmethod
    def bytes_per_image(cnn: BabyCNN) -> int:
        """:return: memory that an image needs on a tape"""
        return sum(math.prod(shape) for shape in cnn.shapes) * cnn.computed_dtype.itemsize

    def record(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: (n_envs, n_channels, height, width), as for :class:`BabyCNN`
        :return: (n_envs, features_dim), without gradient
        """
        assert not th.is_grad_enabled() and len(images) == self.n_envs
        if self.n_recorded == 0:
            converted = [parameter.to(self.dtype) for parameter in self.parameters]
            self.layers = list(zip(converted[::2], converted[1::2], strict=True))
        x, *activations = self._steps[self.n_recorded // self.n_envs]
        self.n_recorded += self.n_envs
        x.copy_(images)
        for (weight, bias), kept in zip(self.layers, activations, strict=True):
            x = th.ops.aten.elu.out(F.conv2d(x, weight, bias, stride=2, padding=1), out=kept)
        return x.flatten(1).to(images.dtype)  # (n_envs, 32, height, width) -> (n_envs, features_dim)

    def rewind(self) -> None:
        """Forget what was recorded."""
        self.n_recorded = 0

    def replay(self) -> th.Tensor:
        """:return: the features of all that was recorded, (n_recorded, features_dim), with gradient"""
        features: th.Tensor = _ConvolutionReplay.apply(self, *self.parameters)  # type: ignore[no-untyped-call]
        return features

    def gradients(self, images: slice, gradient: th.Tensor, wanted: list[list[bool]]) -> list[th.Tensor | None]:
        """
        The backward pass of some of the recorded images.

        :param images: which
        :param gradient: of their features, (batch, features_dim)
        :param wanted: for each layer, whether the gradients of its weight and its bias are wanted
        :return: these gradients, None where not wanted
        """
        found: list[th.Tensor | None] = []
        features = self.kept[-1][images]
        # (batch, features_dim) -> (batch, 32, height, width); a copy, for it is going to be overwritten
        above = th.empty_like(features).copy_(gradient.reshape(features.shape))
        for layer in reversed(range(len(self.layers))):
            weight, bias = self.layers[layer]
            th.ops.aten.elu_backward.grad_input(above, 1, 1, 1, True, self.kept[layer + 1][images], grad_input=above)
            weight_wanted, bias_wanted = wanted[layer]
            of_bias = above.sum((0, 2, 3)) if bias_wanted else None  # faster than the convolution's own sum
            above, of_weight, _ = th.ops.aten.convolution_backward(
                above,
                self.kept[layer][images],
                weight,
                list(bias.shape),
                [2, 2],  # stride
                [1, 1],  # padding
                [1, 1],  # dilation
                False,  # transposed
                [0, 0],
                1,
                [layer > 0, weight_wanted, False],
            )
            found = [*(None if part is None else part.to(gradient.dtype) for part in (of_weight, of_bias)), *found]
        return found


class _ConvolutionReplay(th.autograd.Function):
    """From the weights of the convolutions to the features on a tape."""

    @staticmethod
    def forward(ctx: Any, tape: ConvolutionTape, *parameters: th.Tensor) -> th.Tensor:
        ctx.tape = tape
        # (n_recorded, 32, height, width) -> (n_recorded, features_dim)
        return tape.kept[-1][: tape.n_recorded].flatten(1).to(parameters[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        tape: ConvolutionTape = ctx.tape
        needed = ctx.needs_input_grad[1:]  # after the tape: weight, bias, weight, bias, …
        wanted = [list(needed[i : i + 2]) for i in range(0, len(needed), 2)]
        sums: list[th.Tensor | None] = [None] * len(needed)
        for begin in range(0, tape.n_recorded, IMAGES_AT_ONCE):
            images = slice(begin, min(begin + IMAGES_AT_ONCE, tape.n_recorded))
            found = tape.gradients(images, gradient[images], wanted)
            sums = [new if old is None or new is None else old + new for old, new in zip(sums, found, strict=True)]
        return None, *sums
