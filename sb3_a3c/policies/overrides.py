"""Tells whether a module or a policy computes what its class says, and at once; the fast paths are valid only then."""

import torch as th
from torch import nn


def is_traced() -> bool:
    """True while ``th.jit.trace`` or ``th.export`` records operations, which can't depend on values or the batch size."""
    return bool(th.jit.is_tracing() or th.compiler.is_exporting())  # type: ignore[attr-defined, no-untyped-call]


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if the module has no subclass, hook or overridden ``forward``; the fast paths are valid only then."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and not is_overridden(module, kind, "forward")


def is_overridden(instance: object, kind: type, *methods: str) -> bool:
    """True if a subclass of ``kind``, or the instance itself, overrides one of these methods."""
    return any(
        method in vars(instance) or getattr(type(instance), method) is not getattr(kind, method) for method in methods
    )
