"""Whether a module is what its class says: only then may its computation be replaced by an equal, faster one."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """
    :param module: any
    :param kind: a class
    :return: whether the module computes what its class says: no subclass, no hooks, no ``forward`` of its own
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)
