"""``is_unmodified`` and ``is_overridden``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_a3c.policies.overrides import is_overridden, is_unmodified


class Doubled(nn.Linear):
    def forward(self, *args: Any) -> th.Tensor:
        return 2 * super().forward(*args)


def test_subclass_is_modified() -> None:
    assert is_unmodified(nn.Linear(2, 3), nn.Linear)
    assert not is_unmodified(nn.Linear(2, 3), nn.Conv2d)
    assert not is_unmodified(Doubled(2, 3), nn.Linear)


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
def test_edited_module_is_modified(edit: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(2, 3)
    edit(layer)
    assert not is_unmodified(layer, nn.Linear)


def test_method_is_overridden_in_subclass_or_instance() -> None:
    assert not is_overridden(nn.Linear(2, 3), nn.Linear, "forward", "extra_repr")
    assert is_overridden(Doubled(2, 3), nn.Linear, "extra_repr", "forward")
    assert not is_overridden(Doubled(2, 3), nn.Linear, "extra_repr")
    layer = nn.Linear(2, 3)
    layer.extra_repr = lambda: "mine"  # type: ignore[method-assign]
    assert is_overridden(layer, nn.Linear, "forward", "extra_repr")
