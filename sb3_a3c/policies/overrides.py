"""Whether something is what its class says: only then may its computation be replaced by an equal, faster one."""

from torch import nn


def is_unmodified(module: nn.Module, kind: type[nn.Module]) -> bool:
    """
    :param module: any
    :param kind: a class
    :return: whether the module computes what its class says: no subclass, no hooks, no ``forward`` of its own
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and not is_overridden(module, kind, "forward")


def is_overridden(instance: object, kind: type, *methods: str) -> bool:
    """
    :param instance: of the class or of a subclass
    :param kind: the class
    :param methods: names of its methods
    :return: whether one of them is another, in a subclass or in this instance alone
    """
    return any(
        method in vars(instance) or getattr(type(instance), method) is not getattr(kind, method) for method in methods
    )
