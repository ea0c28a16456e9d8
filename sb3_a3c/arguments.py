"""What can't be used, said before anything starts: what happened, why, and what to type instead."""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.envs.sharding import take_share
from sb3_a3c.policies.lstm_policies import CnnLstmPolicy, CnnPolicy, MlpLstmPolicy, MlpPolicy

_OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict)
_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
#: Adam changes each weight by about as much in an update: beyond, the network overflows after a few.
MAX_LEARNING_RATE = 1e6


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)


def _is_number(value: Any) -> bool:
    """Whole numbers that are too large for a float raise an OverflowError."""
    return (isinstance(value, float | np.floating) or _is_integer(value)) and not math.isnan(value)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= MAX_LEARNING_RATE


def _gives_rate(schedule: Any) -> bool:
    return callable(schedule) and _is_rate(float(schedule(1.0)))


def _is_env(value: Any) -> bool:
    is_gyms = not isinstance(value, type) and hasattr(value, "reset") and hasattr(value, "step")  # SB3 wraps it
    return isinstance(value, str | gym.Env | VecEnv | None) or is_gyms


class _Rule(NamedTuple):
    """What an argument must be."""

    text: str
    holds: Callable[[Any], bool]  #: or raises
    why: str = ""


def _integer(minimum: int, maximum: int = 2**63 - 1, why: str = "", optional: bool = False) -> _Rule:
    def holds(value: Any) -> bool:
        return (optional and value is None) or (_is_integer(value) and minimum <= value <= maximum)

    limit = str(maximum) if maximum <= 10**9 else f"2**{maximum.bit_length()} - 1"
    or_none = ", or None" if optional else ""
    return _Rule(f"an integer and at least {minimum}", holds, f" (and at most {limit}{why}{or_none})")


_BOOL = _Rule("True or False", lambda x: isinstance(x, bool | np.bool_) or (_is_integer(x) and x in (0, 1)))
_FRACTION = _Rule("a number between 0 and 1.0", lambda x: _is_number(x) and 0 <= x <= 1)
_WEIGHT = _Rule("a finite number and at least 0", lambda x: _is_finite(x) and x >= 0)
_NOTHING = _Rule(
    "left out",
    lambda x: x is None or (isinstance(x, dict) and not x),
    ": A3C has no rollout buffer, each worker learns from its rollout at once",
)
_RULES = {
    "env": _Rule("an environment, or the id of one", _is_env),
    "learning_rate": _Rule(
        f"a number between 0 and {MAX_LEARNING_RATE}, or a function that returns one for the remaining progress (1 to 0)",
        lambda x: _is_rate(x) or _gives_rate(x),
    ),
    "lr_schedule": _Rule(f"a function that returns a number between 0 and {MAX_LEARNING_RATE}", _gives_rate),
    "n_steps": _integer(1, 10**9, ": a rollout is kept in memory"),
    "gamma": _FRACTION,
    "gae_lambda": _FRACTION,
    "ent_coef": _WEIGHT,
    "vf_coef": _WEIGHT,
    "max_grad_norm": _Rule("a number between 0 and inf", lambda x: _is_number(x) and x >= 0),
    "rms_prop_eps": _Rule("a finite number above 0", lambda x: _is_finite(x) and x > 0, " (RMSprop divides by it)"),
    "use_rms_prop": _BOOL,
    "use_sde": _BOOL,
    "sde_sample_freq": _integer(-1),
    "rollout_buffer_class": _NOTHING,
    "rollout_buffer_kwargs": _NOTHING,
    "normalize_advantage": _BOOL,
    "stats_window_size": _integer(1, optional=True),  # None: of all episodes
    "tensorboard_log": _Rule("a path, or None", lambda x: x is None or (isinstance(x, str | Path) and "\0" not in str(x))),
    "policy_kwargs": _Rule(
        "a dictionary of the policy's arguments by their names, or None",
        lambda x: x is None or (isinstance(x, dict) and all(isinstance(key, str) for key in x)),
    ),
    "verbose": _Rule("0, 1 or 2", lambda x: isinstance(x, bool) or (_is_integer(x) and 0 <= x < 2**63)),
    "seed": _integer(0, 2**32 - 1, optional=True),
    "n_workers": _integer(0, 10_000, ": each is a process", optional=True),
    "envs_per_update": _integer(1),
    "take_turns": _BOOL,
    "start_method": _Rule(
        "None, 'forkserver' or 'spawn'",
        lambda x: x is None or (isinstance(x, str) and x in ("forkserver", "spawn")),
        " (a forked process hangs in torch if its parent has used torch's threads)",
    ),
    "max_worker_restarts": _integer(0),
    "worker_timeout": _Rule(
        "a number of seconds above 0, or None", lambda x: x is None or (_is_number(x) and x > 0 and math.isfinite(x * 1e9))
    ),
}


def _shown(value: Any) -> str:
    """Not the whole of a large array, nor of an integer of more digits than Python prints."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"this {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:99]}…"


def _plain(value: Any) -> Any:
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    is_huge = isinstance(value, int) and abs(value) >= 2**63  # a number that torch would not take
    return float(value) if is_huge or isinstance(value, np.floating) else value


def check_policy(policy: Any, aliases: Collection[str] = ()) -> None:
    """
    :param policy: the class of the policy, or its name
    :param aliases: the names that there are
    :raises ValueError: if A3C can't train it
    """
    if isinstance(policy, str) and policy in aliases:
        return
    if not isinstance(policy, type):
        names = ", ".join(map(repr, aliases))
        unknown = f"Policy {policy[:100]} unknown: " if isinstance(policy, str) else ""
        raise ValueError(
            f"{unknown}`policy` must be one of {names} or a subclass of ActorCriticPolicy, not {_shown(policy)}."
        )
    if issubclass(policy, RecurrentActorCriticPolicy):
        raise ValueError(
            f"{policy.__name__} is sb3-contrib's, whose shared LSTM does not learn from the critic. "
            'Use A3C\'s own recurrent policies: "MlpLstmPolicy", "CnnLstmPolicy" or "MultiInputLstmPolicy".'
        )
    if not issubclass(policy, ActorCriticPolicy):
        raise ValueError(f"`policy` must be a subclass of ActorCriticPolicy, not {policy.__name__}.")


def check_spaces(observation_space: Any, action_space: Any, policy_class: type[Any]) -> None:
    """
    :param observation_space: of the environment, or None if there is none
    :param action_space: of the environment, or None
    :param policy_class: the class of the policy
    :raises ValueError: if A3C does not support the spaces, or this policy can't read the observations
    """
    if observation_space is None:
        raise ValueError("`env` is None, but the network is made for an environment. Only `load` can do without one.")
    for kind, space, supported in (
        ("observation", observation_space, _OBSERVATION_SPACES),
        ("action", action_space, _ACTION_SPACES),
    ):
        if not isinstance(space, supported):
            names = ", ".join(one.__name__ for one in supported)
            raise ValueError(f"A3C supports {names} as {kind} spaces, not {space}. Wrap the environment.")
    is_dict = isinstance(observation_space, spaces.Dict)
    if is_dict and policy_class in (MlpPolicy, CnnPolicy, MlpLstmPolicy, CnnLstmPolicy):
        raise ValueError(
            'The observations are dictionaries: use "MultiInputLstmPolicy" or "MultiInputPolicy", '
            f"not {policy_class.__name__}."
        )


def check_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param values: by the names of A3C's arguments, or of its attributes; others are not looked at
    :return: those of A3C's arguments, with Python's numbers for numpy's (whose small integers overflow)
    :raises ValueError: for what can't be, whatever the environments
    """
    checked = {}
    for key, value in values.items():
        name = "stats_window_size" if key == "_stats_window_size" else key  # so SB3 calls its attribute
        if name in _RULES:
            _check(name, value)
            checked[key] = _plain(value)
    return checked


def _check(name: str, value: Any) -> None:
    rule, cause = _RULES[name], None
    try:
        holds = rule.holds(value)
    except Exception as error:  # of a user's function, or because the value can't be compared
        holds, cause = False, error
    if not holds:
        raise ValueError(f"`{name}` must be {rule.text}, not {_shown(value)}{rule.why}.") from cause


def check_workers(env: VecEnv, n_workers: int | None) -> None:
    """
    :param env: the environments to train on
    :param n_workers: A3C's argument
    :raises ValueError: if so many workers can't have these environments
    """
    if not n_workers:
        return
    if n_workers > env.num_envs:
        raise ValueError(
            f"n_workers={n_workers}, but there are only {env.num_envs} environments, and each worker needs "
            f"at least one. Use n_workers={env.num_envs}, or make_vec_env(…, n_envs={n_workers})."
        )
    take_share(env, range(env.num_envs))


def check_device(device: th.device | str, verbose: int) -> th.device:
    """
    :param device: "auto" or "cpu"
    :param verbose: from 1 on, a line says so if there is a GPU that is not used
    :return: the CPU
    :raises ValueError: for any other device
    """
    kind = str(device) if isinstance(device, str | th.device) else _shown(device)
    if kind not in ("auto", "cpu"):
        raise ValueError(
            f"device={kind[:100]!r}: A3C's workers share their parameters in the CPU's memory and learn there. "
            "Use device='cpu' or 'auto'; for one learner on a GPU, A2C and PPO are the better choice."
        )
    if kind == "auto" and verbose >= 1 and th.cuda.is_available():
        print("There is a GPU, but A3C's workers learn on the CPU")
    return th.device("cpu")
