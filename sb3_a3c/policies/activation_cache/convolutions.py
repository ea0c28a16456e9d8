"""
What the convolutions of ``BabyCNN`` computed while acting, kept for the backward pass.

Acting has taken each image through the convolutions already when learning needs their activations for its gradient. As
long as the weights are the same, a :class:`ConvolutionCache` saves the second forward pass.
"""

import math
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_a3c.policies.torch_layers import IMAGES_AT_ONCE, BabyCNN


class ConvolutionCache:
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
        """:return: memory that an image needs on a cache"""
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

    def clear(self) -> None:
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
    """From the weights of the convolutions to the features on a cache."""

    @staticmethod
    def forward(ctx: Any, cache: ConvolutionCache, *parameters: th.Tensor) -> th.Tensor:
        ctx.cache = cache
        # (n_recorded, 32, height, width) -> (n_recorded, features_dim)
        return cache.kept[-1][: cache.n_recorded].flatten(1).to(parameters[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        cache: ConvolutionCache = ctx.cache
        needed = ctx.needs_input_grad[1:]  # after the cache: weight, bias, weight, bias, …
        wanted = [list(needed[i : i + 2]) for i in range(0, len(needed), 2)]
        sums: list[th.Tensor | None] = [None] * len(needed)
        for begin in range(0, cache.n_recorded, IMAGES_AT_ONCE):
            images = slice(begin, min(begin + IMAGES_AT_ONCE, cache.n_recorded))
            found = cache.gradients(images, gradient[images], wanted)
            sums = [new if old is None or new is None else old + new for old, new in zip(sums, found, strict=True)]
        return None, *sums
