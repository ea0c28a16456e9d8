"""
What vectorised environments keep of their last step, which callbacks must not take for that of the step they see: workers
step other copies of the environments, or are ahead.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_a3c.envs.wrapper_state import wrappers

_KEPT: dict[type[VecEnv], tuple[str, ...]] = {
    VecNormalize: ("old_obs", "old_reward"),  # returned by get_original_obs and get_original_reward
    VecMonitor: ("episode_returns", "episode_lengths"),
    DummyVecEnv: ("reset_infos", "buf_obs", "buf_rews", "buf_dones", "buf_infos"),
    SubprocVecEnv: ("reset_infos",),
}
_MISSING = object()  # a VecNormalize that was never reset has no ``old_obs``


class _OfAnotherStep:
    """Stands in for a value, and raises when it is used."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(
            f"`{self.name}`: while A3C learns, this VecEnv does not have the raw values of the step that a callback sees. "
            "Let the environment put them into its `info`, which `self.locals['infos']` has; for rewards, "
            "`env.unnormalize_reward(self.locals['rewards'])` comes close."
        )

    copy = __deepcopy__ = __getitem__ = __iter__ = __len__ = __array__ = _refuse  # VecNormalize copies them to return them

    def __reduce__(self) -> Any:
        return np.array, ([],)  # in a file, as before the first step


def refuse_last_step(env: VecEnv) -> None:
    """Let what ``env`` and its wrappers keep of their last step raise when it is used."""
    for attributes, name in _kept(env):
        if not isinstance(value := attributes.get(name, _MISSING), _OfAnotherStep):
            attributes[name] = _OfAnotherStep(name, value)


def allow_last_step(env: VecEnv) -> None:
    """Undo :func:`refuse_last_step`."""
    for attributes, name in _kept(env):
        if isinstance(refused := attributes.get(name), _OfAnotherStep):
            attributes[name] = refused.value
            if refused.value is _MISSING:
                del attributes[name]


def _kept(env: VecEnv) -> Iterator[tuple[dict[str, Any], str]]:
    for each in [*wrappers(env), env.unwrapped]:
        for kind, names in _KEPT.items():
            if isinstance(each, kind):
                yield from ((vars(each), name) for name in names)
