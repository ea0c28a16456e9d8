"""Pickles a policy for a worker, with what cloudpickle and torch leave out: parametrizations and hooks of parameters."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import cloudpickle
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn.utils import parametrize

from sb3_a3c.errors import warn

_COMPILED = "_orig_mod"  # where the wrapper that th.compile returns keeps the module; its class takes 1.4 s to import


def dump_policy(policy: ActorCriticPolicy) -> bytes:
    """
    Pickle a policy; ``pickle.loads`` makes an equal one. A module that was compiled is not, there.

    :raises ValueError: if something in the policy can't be pickled
    """
    modules = list(policy.modules())
    if any(_COMPILED in module._modules or module._compiled_call_impl is not None for module in modules):
        warn("The policy, or a part of it, is compiled. A3C's workers compute the same without `th.compile`: leave it out.")
    buffer = io.BytesIO()
    try:
        _PolicyPickler(buffer).dump(policy)
    except Exception as error:
        raise ValueError(
            f"The policy can't be copied for workers: pickling it raised {type(error).__name__}: {error}. Keep what can't "
            "be pickled (locks, open files, scripted modules) out of the policy, or give it a `__getstate__` without it."
        ) from error
    return buffer.getvalue()


class _PolicyPickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module) and _COMPILED in obj._modules:
            return _same, (obj._modules[_COMPILED],)
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            kind, names = parametrize.type_before_parametrizations(obj), list(obj.parametrizations)  # type: ignore[arg-type]
            # torch has put a `__getstate__` that raises into a class of the module's own
            return _with_properties, (kind, names), super(type(obj), obj).__getstate__()
        if isinstance(obj, nn.Parameter) and (hooks := _hooks(obj)):  # torch does not pickle them
            return *obj.__reduce_ex__(2), hooks, None, None, _add_hooks  # type: ignore[no-untyped-call]
        return super().reducer_override(obj)


def _same(module: nn.Module) -> nn.Module:
    return module


def _with_properties(kind: type[nn.Module], names: Iterable[str]) -> nn.Module:
    """An empty module of torch's subclass of ``kind``, which computes the attributes ``names`` by parametrizations."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(th.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    return module


def _hooks(parameter: nn.Parameter) -> list[tuple[str, Callable[..., Any]]]:
    """The parameter's hooks, each with the method that registers it."""
    kinds = {"register_hook": "_backward_hooks", "register_post_accumulate_grad_hook": "_post_accumulate_grad_hooks"}
    return [
        (register, hook) for register, hooks in kinds.items() for hook in (getattr(parameter, hooks, None) or {}).values()
    ]


def _add_hooks(parameter: nn.Parameter, hooks: Iterable[tuple[str, Callable[..., Any]]]) -> None:
    requires_grad = parameter.requires_grad
    parameter.requires_grad_()  # torch adds no hooks to one that is frozen
    for register, hook in hooks:
        getattr(parameter, register)(hook)
    parameter.requires_grad_(requires_grad)
