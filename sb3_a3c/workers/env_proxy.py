"""
While workers run, passes calls of the user's own ``VecEnv`` on to the workers' environments: ``env_method``, ``set_attr``,
``get_attr`` and the like, also those that come through its wrappers.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_a3c.workers.protocol import EnvCall

#: Sends calls to workers, given by their indices, and waits for the answers.
Ask = Callable[[Mapping[int, EnvCall]], dict[int, Any]]

_PASSED_ON = ("env_method", "get_attr", "set_attr", "has_attr", "env_is_wrapped", "get_images")
_FORBIDDEN = ("reset", "step_async", "step_wait")


def call_env(env: VecEnv, call: EnvCall) -> Any:
    """Call a method of a worker's environments."""
    indices = {} if call.indices is None else {"indices": call.indices}
    # of the innermost VecEnv: the main process's wrappers have passed the call on already
    return getattr(env.unwrapped, call.method)(*call.args, **indices, **call.kwargs)


def call_users_env(env: VecEnv, env_indices: Sequence[int], call: EnvCall) -> Any:
    """Make the call of a worker that is no more, whose environments were ``env_indices``, to the user's own environments."""
    indices = {} if call.indices is None else {"indices": [env_indices[index] for index in call.indices]}
    # the class's method: the object's own passes calls on to workers
    answer = getattr(type(env.unwrapped), call.method)(env.unwrapped, *call.args, **indices, **call.kwargs)
    return [answer[index] for index in env_indices] if call.method == "get_images" else answer


class EnvProxy:
    """Replaces methods of the user's innermost ``VecEnv`` until :meth:`remove`; ``env_indices`` are those of each worker."""

    def __init__(self, env: VecEnv, env_indices: Sequence[Sequence[int]], ask: Ask) -> None:
        self._base = env.unwrapped
        self._env_indices = env_indices
        self._worker_of = {index: worker for worker, indices in enumerate(env_indices) for index in indices}
        self._ask = ask
        self._thread = threading.get_ident()  # the one that learns
        self.methods: set[str] = set()  #: that `env_method` has called, which may have changed the workers' environments
        # on the instance, so that it is reached through whatever refers to it; its class keeps the user's methods
        for name in _PASSED_ON:
            setattr(self._base, name, self._in_its_thread(getattr(self, name)))
        for name in _FORBIDDEN:
            setattr(self._base, name, _refuse)

    def remove(self) -> None:
        """Restore the environments' own methods."""
        for name in (*_PASSED_ON, *_FORBIDDEN):
            vars(self._base).pop(name, None)

    def _in_its_thread(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse calls from other threads: two that wait for the same workers would take each other's answers."""

        @functools.wraps(method)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                raise RuntimeError(
                    f"While A3C learns, `{method.__name__}` reaches its workers' environments, and only from the thread "
                    "that called `learn`. Call it in a callback, or after `learn`; or train with n_workers=0."
                )
            return method(*args, **kwargs)

        return checked

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        if method_name == "set_wrapper_attr" and isinstance(self._base, DummyVecEnv):
            type(self._base).env_method(self._base, method_name, *args, indices=indices, **kwargs)
        if method_name not in ("get_wrapper_attr", "has_wrapper_attr", "set_wrapper_attr"):
            self.methods.add(method_name)
        return self._call("env_method", self._base._get_indices(indices), (method_name, *args), kwargs)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._call("get_attr", self._base._get_indices(indices), (attr_name,), {})

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """As :meth:`VecEnv.set_attr`. The user's own copies of the environments change too, and keep the value."""
        if isinstance(self._base, DummyVecEnv):
            type(self._base).set_attr(self._base, attr_name, value, indices)
        self._call("set_attr", self._base._get_indices(indices), (attr_name, value), {})

    def has_attr(self, attr_name: str) -> bool:
        return all(self._call_all("has_attr", attr_name).values())

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        return self._call("env_is_wrapped", self._base._get_indices(indices), (wrapper_class,), {})

    def get_images(self) -> list[Any]:
        """As :meth:`VecEnv.get_images`; ``render`` makes its picture of these."""
        return [image for images in self._call_all("get_images").values() for image in images]

    def _call_all(self, method: str, *args: Any) -> dict[int, Any]:
        """Of each worker, what a method that takes no indices returned."""
        return self._ask({worker: EnvCall(method, None, args, {}) for worker in range(len(self._env_indices))})

    def _call(self, method: str, indices: Iterable[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """One value for each of ``indices``, in their order; none where the method returns None."""
        wanted = [range(len(self._worker_of))[index] for index in indices]  # also negative ones; or IndexError
        theirs: dict[int, list[int]] = {}
        for index in wanted:
            theirs.setdefault(self._worker_of[index], []).append(index)
        answers = self._ask(
            {
                worker: EnvCall(method, [index - self._env_indices[worker][0] for index in mine], args, kwargs)
                for worker, mine in theirs.items()
            }
        )
        values = {worker: iter(answer) for worker, answer in answers.items() if answer is not None}
        return [next(values[self._worker_of[index]]) for index in wanted if self._worker_of[index] in values]


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "While A3C learns, its workers step and reset these environments. "
        "Evaluate on environments of their own (EvalCallback(eval_env, …)), or train with n_workers=0."
    )
