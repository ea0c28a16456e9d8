"""The activations of ``BabyCNN`` that acting computed, kept for the backward pass."""

import math
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_a3c.policies.torch_layers import IMAGES_AT_ONCE, BabyCNN


class ConvolutionCache:
    """
    The activations of a rollout's images, recorded while acting, in ``n_steps`` batches of ``n_envs`` images, and replayed
    once while learning. Weights must stay the same between recording and the backward pass.
    The linear layer behind the convolutions, if there is one, is computed again.
    """

    def __init__(self, cnn: BabyCNN, n_steps: int, n_envs: int) -> None:
        self.n_envs = n_envs
        self.n_recorded = 0
        self.linear = cnn.linear
        self.parameters = list(cnn.cnn.parameters())  # weight, bias, weight, bias, …
        weight = self.parameters[-2]
        self.dtype = cnn.computed_dtype
        self.layers: list[tuple[th.Tensor, th.Tensor]] = []  #: weights and biases in that precision
        order = th.channels_last if weight.is_contiguous(memory_format=th.channels_last) else th.contiguous_format
        #: the images, and each layer's output for them: (n_images, n_channels, height, width)
        self.kept = [
            th.zeros(n_steps * n_envs, *shape, dtype=self.dtype).contiguous(memory_format=order) for shape in cnn.shapes
        ]
        # the same, step by step
        self._steps: list[tuple[th.Tensor, ...]] = list(zip(*(th.split(kept, n_envs) for kept in self.kept), strict=True))

    @staticmethod
    def bytes_per_transition(cnn: BabyCNN) -> int:
        return sum(math.prod(shape) for shape in cnn.shapes) * cnn.computed_dtype.itemsize

    def record(self, images: th.Tensor) -> th.Tensor:
        """(n_envs, n_channels, height, width) -> (n_envs, features_dim), without gradient."""
        assert not th.is_grad_enabled() and len(images) == self.n_envs
        if self.n_recorded == 0:
            converted = [parameter.to(self.dtype) for parameter in self.parameters]
            self.layers = list(zip(converted[::2], converted[1::2], strict=True))
        x, *activations = self._steps[self.n_recorded // self.n_envs]
        self.n_recorded += self.n_envs
        x.copy_(images)
        for (weight, bias), kept in zip(self.layers, activations, strict=True):
            x = th.ops.aten.elu.out(F.conv2d(x, weight, bias, stride=2, padding=1), out=kept)
        # (n_envs, 32, height, width) -> (n_envs, n_flatten) -> (n_envs, features_dim)
        features: th.Tensor = self.linear(x.flatten(1).to(images.dtype))
        return features

    def clear(self) -> None:
        self.n_recorded = 0

    def replay(self) -> th.Tensor:
        """The features of all recorded images, (n_recorded, features_dim), with gradient."""
        convolved: th.Tensor = _ConvolutionReplay.apply(self, *self.parameters)  # type: ignore[no-untyped-call]
        features: th.Tensor = self.linear(convolved)
        return features

    def gradients(self, images: slice, gradient: th.Tensor) -> list[th.Tensor]:
        """Gradients of :attr:`parameters`, given that of the convolutions' outputs for some images, (batch, n_flatten)."""
        found: list[th.Tensor] = []
        features = self.kept[-1][images]
        # (batch, n_flatten) -> (batch, 32, height, width); a copy, because it is overwritten below
        above = th.empty_like(features).copy_(gradient.reshape(features.shape))
        for layer in reversed(range(len(self.layers))):
            weight, bias = self.layers[layer]
            x, output = self.kept[layer][images], self.kept[layer + 1][images]
            th.ops.aten.elu_backward.grad_input(above, 1, 1, 1, True, output, grad_input=above)
            of_bias = above.sum((0, 2, 3))  # faster than the convolution's own sum
            # after the bias: stride, padding, dilation, transposed, output padding, groups; gradients of x, weight, bias
            above, of_weight, _ = th.ops.aten.convolution_backward(
                above, x, weight, list(bias.shape), [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [layer > 0, True, False]
            )
            found = [of_weight.to(gradient.dtype), of_bias.to(gradient.dtype), *found]
        return found


class _ConvolutionReplay(th.autograd.Function):
    """From the weights of the convolutions to their recorded outputs."""

    @staticmethod
    def forward(ctx: Any, cache: ConvolutionCache, *parameters: th.Tensor) -> th.Tensor:
        ctx.cache = cache
        # (n_recorded, 32, height, width) -> (n_recorded, n_flatten)
        return cache.kept[-1][: cache.n_recorded].flatten(1).to(parameters[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        cache: ConvolutionCache = ctx.cache
        sums: list[th.Tensor] = []
        for begin in range(0, cache.n_recorded, IMAGES_AT_ONCE):
            images = slice(begin, min(begin + IMAGES_AT_ONCE, cache.n_recorded))
            found = cache.gradients(images, gradient[images])
            sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
        return None, *sums
