"""Argument validation. Each error names the argument, its value and what to pass instead."""

import importlib.util
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_a3c.envs.sharding import take_share
from sb3_a3c.errors import warn
from sb3_a3c.policies.impossible import impossible
from sb3_a3c.policies.lstm_policies import CnnLstmPolicy, CnnPolicy, LstmActorCriticPolicy, MlpLstmPolicy, MlpPolicy

_OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict)
_MAXIMA = dict(gamma=1.0, gae_lambda=1.0, ent_coef=math.inf, vf_coef=math.inf, max_grad_norm=math.inf)


#: Arguments of PPO and RecurrentPPO that A3C does not have, and what to do instead.
_OF_PPO = {
    "n_epochs": "leave it out, each rollout is learned from once",
    "batch_size": "leave it out, each update learns from `n_steps` steps of `envs_per_update` environments",
    "clip_range": "leave it out, each rollout is learned from once, so the policy can't go far from the one that acted",
    "clip_range_vf": "leave it out, like `clip_range`",
    "target_kl": "leave it out, like `n_epochs`",
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)


def check_arguments(values: Mapping[str, Any]) -> None:
    """
    Check what A3C adds to A2C's arguments, and what would only fail in a worker. The rest is left to SB3 and torch.

    :param values: A3C's arguments or attributes, by name; not all need be there, and other names are ignored
    """
    n_workers = values.get("n_workers")
    if n_workers is not None and not (_is_integer(n_workers) and n_workers >= 0):
        raise ValueError(f"`n_workers` must be an integer and at least 0, or None (one for each core), not {n_workers!r}.")
    for name, minimum in (("n_steps", 1), ("envs_per_update", 1), ("max_worker_restarts", 0)):
        value = values.get(name, minimum)
        if not (_is_integer(value) and value >= minimum):
            raise ValueError(f"`{name}` must be an integer and at least {minimum}, not {value!r}.")
    for name, maximum in _MAXIMA.items():  # what a worker computes with
        value = values.get(name, 0)
        if not (_is_number(value) and 0 <= value <= maximum):
            raise ValueError(f"`{name}` must be a number between 0 and {maximum}, not {value!r}.")
    if values.get("learning_rate") is not None:
        check_rate("learning_rate", values["learning_rate"], 1.0)
    check_rate("lr_schedule", values.get("lr_schedule", float), 1.0)
    for name in ("anneal", "take_turns"):
        if not isinstance(value := values.get(name, False), bool | np.bool_):
            raise ValueError(f"`{name}` must be True or False, not {value!r}.")
    if (start_method := values.get("start_method")) not in (None, "forkserver", "spawn"):
        raise ValueError(
            f"`start_method` must be None, 'forkserver' or 'spawn', not {start_method!r} "
            "(a forked process hangs in torch if its parent has used torch's threads)."
        )
    _check_cluster(values)
    timeout = values.get("worker_timeout")
    if timeout is not None and not (_is_number(timeout) and 0 < timeout < math.inf):
        raise ValueError(f"`worker_timeout` must be a number of seconds above 0, or None for no limit, not {timeout!r}.")
    for name in ("rollout_buffer_class", "rollout_buffer_kwargs"):
        if values.get(name):
            raise ValueError(
                f"`{name}` must be None, not {values[name]!r}: A3C has no rollout buffer, each worker learns from its "
                "rollout at once."
            )


def _check_cluster(values: Mapping[str, Any]) -> None:
    """Check ``cluster``, and what can't be combined with it."""
    cluster = values.get("cluster")
    if cluster is None:
        return
    address = cluster.get("address") if isinstance(cluster, dict) else cluster
    unknown = cluster.keys() - {"address", "runtime_env"} if isinstance(cluster, dict) else set()
    if unknown or not isinstance(address, str) or (address != "auto" and not address.rpartition(":")[2].isdecimal()):
        raise ValueError(
            "`cluster` must be 'auto', 'host:port' of the head of a Ray cluster, or a dictionary with `address` and, if you "
            f"like, `runtime_env`, not {cluster!r}."
        )
    if not _has_ray():
        raise ValueError(f'`cluster={cluster!r}` needs Ray, which is not installed: pip install "ray>=2.54,<3".')
    if values.get("take_turns"):
        raise ValueError("`take_turns` is not possible on a cluster: leave out `take_turns` or `cluster`.")
    if values.get("n_workers") == 0:
        raise ValueError("n_workers=0 trains in this process: leave out `cluster`, or use n_workers=None for all its CPUs.")


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def check_names(others: Collection[str], policy: Any, policy_kwargs: Mapping[str, Any] | None) -> None:
    """
    Raise a ValueError that lists all arguments that A3C does not have, and those of the policy that it can't have.

    :param others: names of arguments that are none of A3C's
    :param policy: the class of the policy
    """
    errors = [f"`{name}`: {_OF_PPO.get(name, 'A3C has no such argument')}" for name in others]
    if isinstance(policy, type) and issubclass(policy, LstmActorCriticPolicy):
        errors += [f"policy_kwargs: {error}" for error in impossible(policy_kwargs or {})]
    if errors:
        raise ValueError("\n".join(["These arguments are not possible in A3C:", *errors]))


def warn_of_small_clipping(max_grad_norm: float, n_steps: int) -> None:
    """Warn of ``max_grad_norm=0.5``, which is A2C's default and PPO's."""
    if max_grad_norm == 0.5:
        warn(
            f"`max_grad_norm=0.5`, the default of A2C and PPO, is small in A3C, whose loss is a sum over the {n_steps} "
            f"steps of a rollout and not a mean: {0.5 * n_steps:g} clips as theirs does. A3C's default is 40."
        )


def check_rate(name: str, schedule: float | Schedule, progress_remaining: float) -> float:
    """Return a learning rate at this progress (1 to 0). Raise a ValueError if it isn't finite, or is negative."""
    if name == "lr_schedule" and not callable(schedule):
        raise ValueError(f"`lr_schedule` must be a function of the remaining progress (1 to 0), not {schedule!r}.")
    rate = float(schedule(progress_remaining)) if callable(schedule) else schedule
    if not (_is_number(rate) and 0 <= rate < math.inf):
        raise ValueError(
            f"`{name}` must be a finite number and at least 0, or a function of the remaining progress (1 to 0) that "
            f"returns one, not {rate!r}."
        )
    return float(rate)


def check_total_timesteps(total_timesteps: Any) -> float:
    """Return a whole number of timesteps, or infinity; raise a ValueError for anything else."""
    if not (_is_number(total_timesteps) and total_timesteps > -math.inf):  # nan compares false
        raise ValueError(f"`total_timesteps` must be a number of timesteps, not {total_timesteps!r}.")
    return total_timesteps if total_timesteps == math.inf else int(total_timesteps)


def check_policy(policy: Any, aliases: Collection[str]) -> None:
    """Raise a ValueError unless ``policy`` is one of A3C's aliases, or the class of a policy that A3C can train."""
    if isinstance(policy, str) and policy in aliases:
        return
    if not (isinstance(policy, type) and issubclass(policy, ActorCriticPolicy)):
        raise ValueError(
            f"`policy` must be one of {', '.join(map(repr, aliases))} or a subclass of ActorCriticPolicy, not {policy!r}."
        )
    if issubclass(policy, RecurrentActorCriticPolicy):
        raise ValueError(
            f"{policy.__name__} is sb3-contrib's, whose shared LSTM does not learn from the critic. "
            'Use A3C\'s own recurrent policies: "MlpLstmPolicy", "CnnLstmPolicy" or "MultiInputLstmPolicy".'
        )


def check_observation_space(space: Any, policy_class: type[Any]) -> None:
    """Raise a ValueError if there is no environment (None), or if the policy can't read its observations."""
    if space is None:
        raise ValueError("`env` is None, but the network is made for an environment. Only `load` can do without one.")
    if not isinstance(space, _OBSERVATION_SPACES):
        names = ", ".join(one.__name__ for one in _OBSERVATION_SPACES)
        raise ValueError(f"A3C supports {names} as observation spaces, not {space}. Wrap the environment.")
    if isinstance(space, spaces.Dict) and policy_class in (MlpPolicy, CnnPolicy, MlpLstmPolicy, CnnLstmPolicy):
        raise ValueError(
            'The observations are dictionaries: use "MultiInputLstmPolicy" or "MultiInputPolicy", '
            f"not {policy_class.__name__}."
        )


def check_workers(env: VecEnv, n_workers: int | None, cluster: Any = None) -> None:
    """Raise a ValueError if the environments can't be distributed over this number of workers."""
    if cluster is not None and isinstance(env.unwrapped, SubprocVecEnv):
        raise ValueError(
            "The processes of a SubprocVecEnv run on this machine, so `cluster` can't use them: use a DummyVecEnv, whose "
            "environments are copied to the workers."
        )
    if not n_workers and cluster is None:
        return
    n_workers = n_workers or 1
    if n_workers > env.num_envs:
        raise ValueError(
            f"n_workers={n_workers}, but the number of environments is {env.num_envs}, and each worker needs at least one. "
            f"Use n_workers={env.num_envs}, for a saved model `load(…, n_workers={env.num_envs})`, or "
            f"make_vec_env(…, n_envs={n_workers})."
        )
    take_share(env, range(env.num_envs))


def check_device(device: th.device | str, verbose: int) -> th.device:
    """Return the CPU; raise a ValueError for any other device. From ``verbose=1`` on, print that a GPU is not used."""
    if str(device) not in ("auto", "cpu"):
        raise ValueError(
            f"device={str(device)!r}: A3C's workers share their parameters in the CPU's memory and learn there. "
            "Use device='cpu' or 'auto'; for one learner on a GPU, A2C and PPO are the better choice."
        )
    if str(device) == "auto" and verbose >= 1 and th.cuda.is_available():
        print("There is a GPU, but A3C's workers learn on the CPU")
    return th.device("cpu")
