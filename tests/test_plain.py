"""What may be replaced by an equal, faster computation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_a3c.plain import is_plain


class Doubled(nn.Linear):
    def forward(self, *args: Any) -> th.Tensor:
        return 2 * super().forward(*args)


def test_a_module_as_its_class_made_it_is_plain() -> None:
    assert is_plain(nn.Linear(2, 3), nn.Linear)
    assert not is_plain(nn.Linear(2, 3), nn.Conv2d)
    assert not is_plain(Doubled(2, 3), nn.Linear)


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
        lambda layer: layer.register_full_backward_hook(lambda module, inputs, outputs: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda module, outputs: None),
        lambda layer: setattr(layer, "forward", lambda x: x),
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_an_edited_module_is_not(edit: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(2, 3)
    edit(layer)
    assert not is_plain(layer, nn.Linear)
