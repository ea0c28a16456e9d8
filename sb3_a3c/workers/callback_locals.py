"""The ``locals`` that callbacks read: those of A2C that exist here, and an error that explains each that does not."""

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback

_ABSENT = {
    "log_probs": "A3C's workers do not compute them while acting. `model.policy` has what it takes, for the present weights",
    "rollout_buffer": "A3C has none, each worker learns from its rollout at once",
    "new_obs": "observations are only sent to callbacks of your own, without `reads_observations = False`",
    "obs_tensor": "observations are only sent to callbacks of your own, without `reads_observations = False`",
}


class CallbackLocals(dict[str, Any]):
    """A dictionary whose missing keys say why they are missing."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key}: not among A3C's locals. {_ABSENT.get(key, 'Those that are: ' + ', '.join(sorted(self)))}.")


def install(callback: BaseCallback) -> None:
    """Let a callback, and those inside it, read :class:`CallbackLocals`. They have been told that training starts."""
    for each in _all(callback):
        each.locals = CallbackLocals(each.locals)


def can_see_observations(callback: BaseCallback) -> bool:
    """
    Whether there is a callback that is not SB3's own; SB3's own do not read observations. One whose attribute
    ``reads_observations`` is False does not, either.
    """
    return any(
        getattr(each, "reads_observations", True)
        and (isinstance(each, ConvertCallback) or not type(each).__module__.startswith("stable_baselines3."))
        for each in _all(callback)
    )


def _all(callback: BaseCallback) -> list[BaseCallback]:
    """A callback and those that it refers to, each once: they may refer to each other."""
    found: list[BaseCallback] = []
    waiting = [callback]
    while waiting:
        each = waiting.pop()
        if not any(each is other for other in found):
            found.append(each)
            children = each.callbacks if isinstance(each, CallbackList) else vars(each).values()
            waiting += [child for child in children if isinstance(child, BaseCallback)]
    return found
