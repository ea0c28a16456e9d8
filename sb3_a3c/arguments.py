"""What can't be used, said before anything starts: what happened, why, and what to type instead."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.envs import take_share
from sb3_a3c.policies import CnnLstmPolicy, CnnPolicy, MlpLstmPolicy, MlpPolicy
from sb3_a3c.task import Settings

_OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict)
_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_policy(policy_class: type[Any]) -> None:
    """
    :param policy_class: the class of the policy
    :raises ValueError: if A3C can't train it
    """
    if issubclass(policy_class, RecurrentActorCriticPolicy):
        raise ValueError(
            f"{policy_class.__name__} is sb3-contrib's, whose shared LSTM does not learn from the critic. "
            'Use A3C\'s own recurrent policies: "MlpLstmPolicy", "CnnLstmPolicy" or "MultiInputLstmPolicy".'
        )
    if not issubclass(policy_class, ActorCriticPolicy):
        raise ValueError(f"A3C needs a subclass of ActorCriticPolicy, not {policy_class.__name__}.")


def check_spaces(observation_space: Any, action_space: Any, policy_class: type[Any]) -> None:
    """
    :param observation_space: of the environment, or None if there is none yet
    :param action_space: of the environment, or None
    :param policy_class: the class of the policy
    :raises ValueError: if A3C does not support the spaces, or this policy can't read the observations
    """
    for kind, space, supported in (
        ("observation", observation_space, _OBSERVATION_SPACES),
        ("action", action_space, _ACTION_SPACES),
    ):
        if space is not None and not isinstance(space, supported):
            names = ", ".join(one.__name__ for one in supported)
            raise ValueError(f"A3C supports {names} as {kind} spaces, not {space}. Wrap the environment.")
    is_dict = isinstance(observation_space, spaces.Dict)
    if is_dict and policy_class in (MlpPolicy, CnnPolicy, MlpLstmPolicy, CnnLstmPolicy):
        raise ValueError(
            'The observations are dictionaries: use "MultiInputLstmPolicy" or "MultiInputPolicy", '
            f"not {policy_class.__name__}."
        )


def check_settings(settings: Settings) -> None:
    """
    :param settings: the workers' hyper-parameters
    :raises ValueError: for numbers that are none, or out of range
    """
    for name in ("n_steps", "envs_per_update"):
        _check_integer(name, getattr(settings, name), 1)
    limits = {"gamma": 1.0, "gae_lambda": 1.0, "max_grad_norm": np.inf, "ent_coef": np.inf, "vf_coef": np.inf}
    for name, maximum in limits.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= maximum:
            raise ValueError(f"`{name}` must be a number between 0 and {maximum}, not {value!r}.")


def check_processes(
    n_workers: int | None,
    start_method: str | None = None,
    max_worker_restarts: int = 0,
    worker_timeout: float | None = None,
) -> None:
    """
    :param n_workers: A3C's argument
    :param start_method: A3C's argument
    :param max_worker_restarts: A3C's argument
    :param worker_timeout: A3C's argument
    :raises ValueError: for what can't be, whatever the environments
    """
    if n_workers is not None:
        _check_integer("n_workers", n_workers, 0)
    if start_method not in (None, "forkserver", "spawn"):
        raise ValueError(
            f"`start_method` must be None, 'forkserver' or 'spawn', not {start_method!r} "
            "(a forked process hangs in torch if its parent has used torch's threads)."
        )
    _check_integer("max_worker_restarts", max_worker_restarts, 0)
    is_number = isinstance(worker_timeout, int | float | np.number) and not isinstance(worker_timeout, bool)
    if worker_timeout is not None and not (is_number and worker_timeout > 0):
        raise ValueError(f"`worker_timeout` must be a number of seconds above 0, or None, not {worker_timeout!r}.")


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
    kind = str(device)
    if kind not in ("auto", "cpu"):
        raise ValueError(
            f"device={kind!r}: A3C's workers share their parameters in the CPU's memory and learn there. "
            "Use device='cpu' or 'auto'; for one learner on a GPU, A2C and PPO are the better choice."
        )
    if kind == "auto" and verbose >= 1 and th.cuda.is_available():
        print("There is a GPU, but A3C's workers learn on the CPU")
    return th.device("cpu")


def _check_integer(name: str, value: Any, minimum: int) -> None:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (is_integer and value >= minimum):
        raise ValueError(f"`{name}` must be an integer and at least {minimum}, not {value!r}.")
