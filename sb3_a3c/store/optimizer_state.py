"""The state that an optimizer starts from, made before its first step so that it can be shared."""

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch as th


def check_optimizer(optimizer: th.optim.Optimizer) -> None:
    """
    Raise a ValueError if the optimizer's ``step`` needs a closure, which would have to be evaluated on the shared
    parameters while other workers change them.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure that re-evaluates the loss, but A3C's workers push gradients to "
            "parameters that others are changing. Use an optimizer without a closure: "
            "policy_kwargs=dict(optimizer_class=th.optim.Adam), RMSprop, SGD, …"
        )


class _FirstValues(dict[str, Any]):
    """Remembers the first value that was written under each key, as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None:
            self.first.setdefault(key, value.clone() if isinstance(value, th.Tensor) else value)
        super().__setitem__(key, value)


def initial_state(optimizer: th.optim.Optimizer, parameter: th.nn.Parameter) -> dict[str, Any]:
    """
    The optimizer's state for one parameter; where it has none yet, what its first step would start from.

    Optimizers make their state inside ``step``. So a throw-away copy takes one with a zero gradient, and the first value
    it writes under each key is the initial one. Neither the parameter nor any step count moves. (SGD starts its momentum
    from the first gradient; from zero it gets the same, unless ``dampening`` is used: then the first step is damped too.)
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if state or not parameter.requires_grad:
        return state
    group = next((group for group in optimizer.param_groups if any(parameter is p for p in group["params"])), None)
    if group is None:
        return {}
    stand_in = th.nn.Parameter(parameter.detach().clone())
    stand_in.grad = th.zeros_like(stand_in)
    probe = copy.copy(optimizer)
    # weight decay would add to the zero gradient
    probe.param_groups = [{**group, "params": [stand_in], **({"weight_decay": 0} if "weight_decay" in group else {})}]
    recorder = _FirstValues()
    probe.state = defaultdict(dict, {stand_in: recorder})
    probe.step()
    return recorder.first
