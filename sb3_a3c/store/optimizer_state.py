"""The state that an optimizer starts from, made before its first step so that it can be shared."""

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy


def check_optimizer(optimizer: th.optim.Optimizer) -> None:
    """
    Raise a ValueError if the optimizer's ``step`` needs a closure, which would have to be evaluated on the shared
    parameters while other workers change them; or if it has hooks, which the workers' copies would not call.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure that re-evaluates the loss, but A3C's workers push gradients to "
            "parameters that others are changing. Use an optimizer without a closure: "
            "policy_kwargs=dict(optimizer_class=th.optim.Adam), RMSprop, SGD, …"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            "The policy's optimizer has hooks of `step`, but A3C's workers step copies of it, which have none. Override "
            "`step` in a class of your own: policy_kwargs=dict(optimizer_class=…)."
        )


def fixed_options(optimizer: th.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group that must not change while workers run: all but the learning rate."""
    return [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups]


def check_parameters(policy: ActorCriticPolicy) -> None:
    """
    :param policy: that is to be trained
    :raises ValueError: if its optimizer does not know a trainable parameter, or has one that is not the policy's (no worker
        would share it); or if all parameters are frozen
    """
    known = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    own = dict(policy.named_parameters())
    unknown = [name for name, parameter in own.items() if parameter.requires_grad and id(parameter) not in known]
    foreign = known - {id(parameter) for parameter in own.values()}
    new_optimizer = (
        "`policy = model.policy; policy.optimizer = policy.optimizer_class(policy.parameters(), lr=model.lr_schedule(1), "
        "**policy.optimizer_kwargs)`"
    )
    if unknown:
        raise ValueError(
            f"The policy's optimizer does not know `{'`, `'.join(unknown)}`, which would never be trained. After parameters "
            f"or layers were replaced or added, make a new optimizer: {new_optimizer}. What is not to be trained, freeze: "
            f"`model.policy.get_parameter({unknown[0]!r}).requires_grad_(False)`."
        )
    if foreign:
        raise ValueError(
            f"The policy's optimizer has {len(foreign)} parameter(s) that are not among `model.policy.parameters()`, so "
            f"workers can't share them. After parameters or layers were replaced, make a new optimizer: {new_optimizer}. A "
            "tensor that is to be trained must be an attribute of the policy, as a `th.nn.Parameter`."
        )
    if not any(parameter.requires_grad for parameter in own.values()):
        raise ValueError("All parameters of the policy are frozen: nothing can be learned. Use `requires_grad_(True)`.")


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
    The optimizer's state for one parameter; where it has none yet, what its first step would start from. A frozen parameter
    has one too: a callback may let it learn.

    Optimizers make their state inside ``step``. So a throw-away copy takes one with a zero gradient, and the first value
    it writes under each key is the initial one. Neither the parameter nor any step count moves. (SGD starts its momentum
    from the first gradient; from zero it gets the same, unless ``dampening`` is used: then the first step is damped too.)
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if state:
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
