"""
While workers run, the environments that train are theirs. :class:`Redirect` makes the user's own ``VecEnv`` the way to
reach them: ``env_method``, ``set_attr``, ``get_attr`` and the like of that very object, also from under its wrappers.
"""

from collections.abc import Callable, Iterable
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

#: Calls a method of the workers' ``VecEnv``, for environments with the given indices: one value for each. None of
#: indices: all environments, and the method does not know indices.
Call = Callable[[str, Iterable[int] | None, tuple[Any, ...], dict[str, Any]], list[Any]]

_REDIRECTED = ("env_method", "get_attr", "set_attr", "has_attr", "env_is_wrapped", "get_images")
_FORBIDDEN = ("reset", "step_async", "step_wait")


class Redirect:
    """
    Lets the innermost of the user's environments pass calls on to the workers', until :meth:`remove`.

    :param env: the user's vectorised environment
    :param call: reaches the workers
    """

    def __init__(self, env: VecEnv, call: Call) -> None:
        self._base = env.unwrapped
        self._call = call
        # on the instance, so that it is reached through whatever refers to it; its class keeps the user's methods
        for name in _REDIRECTED:
            setattr(self._base, name, getattr(self, name))
        for name in _FORBIDDEN:
            setattr(self._base, name, _refuse)

    def remove(self) -> None:
        """Give the user's environments their own methods back."""
        for name in (*_REDIRECTED, *_FORBIDDEN):
            vars(self._base).pop(name, None)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """As :meth:`VecEnv.env_method`."""
        if method_name == "set_wrapper_attr" and isinstance(self._base, DummyVecEnv):
            type(self._base).env_method(self._base, method_name, *args, indices=indices, **kwargs)
        return self._call("env_method", self._base._get_indices(indices), (method_name, *args), kwargs)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """As :meth:`VecEnv.get_attr`."""
        return self._call("get_attr", self._base._get_indices(indices), (attr_name,), {})

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """As :meth:`VecEnv.set_attr`. The user's own copies of the environments change too: it is still so afterwards."""
        if isinstance(self._base, DummyVecEnv):
            type(self._base).set_attr(self._base, attr_name, value, indices)
        self._call("set_attr", self._base._get_indices(indices), (attr_name, value), {})

    def has_attr(self, attr_name: str) -> bool:
        """As :meth:`VecEnv.has_attr`."""
        return all(self._call("has_attr", None, (attr_name,), {}))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """As :meth:`VecEnv.env_is_wrapped`."""
        return self._call("env_is_wrapped", self._base._get_indices(indices), (wrapper_class,), {})

    def get_images(self) -> list[Any]:
        """As :meth:`VecEnv.get_images`; ``render`` makes its picture of these."""
        return self._call("get_images", None, (), {})


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "While A3C learns, its workers step and reset these environments. "
        "Evaluate on environments of their own (EvalCallback(eval_env, …)), or train with n_workers=0."
    )
