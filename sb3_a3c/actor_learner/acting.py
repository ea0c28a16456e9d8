"""A worker's policy in its environments: acting out a rollout, and evaluating it again with gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actor_learner.config import Hyperparams
from sb3_a3c.actor_learner.report import Timer
from sb3_a3c.envs.non_finite import NonFiniteFilter, zero_non_finite
from sb3_a3c.envs.observations import Obs, as_tensor, batch_of_one, copied, flat_chunk, stacked
from sb3_a3c.policies.activation_cache.cache import ActivationCache, ChunkCache
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.policies.sampling import to_env_actions
from sb3_a3c.policies.torch_layers import LstmState


@dataclass
class Rollout:
    """T = n_steps transitions of each of N environments, as the worker acted them out."""

    obs: Obs  #: (T, N, …), finite
    faulty_obs: npt.NDArray[np.bool_]  #: (N,), whether one of them, or the last, was not finite before it was set to 0
    actions: th.Tensor  #: (T, N, …)
    rewards: npt.NDArray[np.float32]  #: (T, N)
    dones: npt.NDArray[np.bool_]  #: (T, N)
    infos: list[list[dict[str, Any]]]  #: T lists of N
    values: npt.NDArray[np.floating]  #: (T, N), V of the states acted in
    terminal_values: npt.NDArray[np.floating]  #: (T, N), V of the last state where a time limit ended the episode, else 0
    last_values: npt.NDArray[np.floating]  #: (N,), V of the state after the rollout
    first_state: LstmState  #: LSTM state before the first step
    episode_starts: th.Tensor  #: (T, N), bool
    last_obs: Obs  #: (N, …)
    chunks: list[slice]  #: environments; each chunk makes one update
    caches: list[ChunkCache | None]  #: the activations of each chunk; None if the policy can't use a cache


class Actor:
    """
    Acts with a worker's policy in its environments, which begin new episodes at their next reset. Observations, LSTM state
    and episodes carry over from one rollout to the next.
    """

    def __init__(self, policy: ActorCriticPolicy, env: VecEnv) -> None:
        self._policy = policy
        self._recurrent = as_recurrent(policy)
        self._env = NonFiniteFilter(env)
        self._n_envs = env.num_envs
        try:
            self._obs = self._env.reset()
        except BaseException:
            self.close()
            raise
        self._state = self._recurrent.initial_state(self._n_envs)
        self._episode_starts = th.ones(self._n_envs, dtype=th.bool)
        self._cache: ActivationCache | None = None
        self._cache_shape: tuple[int, list[slice]] | None = None

    def close(self) -> None:
        """Release the environments, which stay open."""
        self._env.close()

    def act(self, hyperparams: Hyperparams, should_stop: Callable[[], bool], timer: Timer) -> Rollout | None:
        """Act for ``n_steps``, in eval mode as A2C does. None if ``should_stop``, which is asked between steps, says so."""
        n_steps, n_envs = hyperparams.n_steps, self._n_envs
        self._policy.set_training_mode(False)
        chunks = _chunks(n_envs, hyperparams.envs_per_update)
        first_state, cache, faulty_obs = self._state, self._empty_cache(n_steps, chunks), self._env.faulty_obs
        caching = {} if cache is None else {"cache": cache}
        obs, actions, values, infos, starts = [], [], [], [], []
        rewards = np.zeros((n_steps, n_envs), dtype=np.float32)
        dones = np.zeros((n_steps, n_envs), dtype=bool)
        terminal_values = th.zeros(n_steps, n_envs, dtype=next(self._policy.parameters()).dtype)
        for t in range(n_steps):
            if should_stop():
                return None
            if hyperparams.use_sde and hyperparams.sde_sample_freq > 0 and t % hyperparams.sde_sample_freq == 0:
                self._policy.reset_noise(n_envs)
            obs.append(self._obs)
            starts.append(self._episode_starts)
            with th.no_grad():
                action, value, self._state = self._recurrent.act(
                    as_tensor(self._obs), self._state, self._episode_starts, **caching
                )
            actions.append(action)
            values.append(value.flatten())  # (N, 1) -> (N,)
            env_actions = to_env_actions(self._policy, action.numpy())
            timer.spent("acting")
            self._obs, rewards[t], dones[t], info = self._env.step(env_actions)
            timer.spent("stepping")
            infos.append(info)
            faulty_obs = faulty_obs | self._env.faulty_obs | self._env.faulty_ends
            self._episode_starts = th.from_numpy(dones[t].copy())
            for i in np.flatnonzero(dones[t]):
                if info[i].get("TimeLimit.truncated", False) and info[i].get("terminal_observation") is not None:
                    terminal_values[t, i] = self._terminal_value(info[i]["terminal_observation"], int(i))
        last_values = self._values(as_tensor(self._obs), self._state, self._episode_starts)
        timer.spent("acting")
        return Rollout(
            obs=stacked(obs),
            faulty_obs=faulty_obs,
            actions=th.stack(actions),
            rewards=rewards,
            dones=dones,
            infos=infos,
            values=th.stack(values).numpy(),
            terminal_values=terminal_values.numpy(),
            last_values=last_values.numpy(),
            first_state=first_state,
            episode_starts=th.stack(starts),
            last_obs=self._obs,
            chunks=chunks,
            caches=[None] * len(chunks) if cache is None else list(cache.chunk_caches()),
        )

    def evaluate(self, rollout: Rollout, index: int) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Evaluate again, with gradients, the actions of the n environments of chunk ``index`` in the last rollout.

        :return: values, log-probabilities and entropies, each (T, n); the last None where there is no analytical entropy
        """
        chunk, cache = rollout.chunks[index], rollout.caches[index]
        actions = rollout.actions[:, chunk].flatten(0, 1)  # (T, n, …) -> (T * n, …)
        if isinstance(self._policy.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        elif isinstance(self._policy.action_space, spaces.Box):
            actions = actions.flatten(1)  # (T * n, …) -> (T * n, action_dim)
        values, log_prob, entropy = self._recurrent.evaluate_actions(
            as_tensor(flat_chunk(rollout.obs, chunk)),
            actions,
            tuple(part[:, chunk].contiguous() for part in rollout.first_state),
            rollout.episode_starts[:, chunk],
            **({} if cache is None else {"cache": cache}),
        )
        shape = (len(rollout.rewards), -1)  # (T * n, 1) and (T * n,) -> (T, n)
        return values.reshape(shape), log_prob.reshape(shape), None if entropy is None else entropy.reshape(shape)

    def update_value_scale(self, targets: npt.NDArray[np.floating]) -> float:
        """As the policy's: the unit in which the loss of an update with these value targets is to be computed."""
        return self._recurrent.update_value_scale(targets)

    def _empty_cache(self, n_steps: int, chunks: list[slice]) -> ActivationCache | None:
        """The cache for the next rollout; None if the policy can't use one."""
        shape = (n_steps, chunks)
        if shape != self._cache_shape:
            self._cache = None  # frees it before there is another one
            self._cache, self._cache_shape = self._recurrent.new_activation_cache(*shape), shape
        if self._cache is not None:
            self._cache.clear()
        return self._cache

    def _terminal_value(self, terminal_obs: Obs, env: int) -> th.Tensor:
        """V of the observation at which a time limit cut an episode, in its LSTM state; NaN if that is not finite."""
        if zero_non_finite(copied(batch_of_one(terminal_obs))).any():
            return th.tensor(np.nan)
        obs = self._policy.obs_to_tensor(terminal_obs)[0]  # also to channels first
        return self._values(obs, tuple(part[:, env : env + 1] for part in self._state), th.zeros(1, dtype=th.bool))[0]

    def _values(self, obs: Any, state: LstmState, episode_starts: th.Tensor) -> th.Tensor:
        with th.no_grad():
            return self._recurrent.predict_values(obs, state, episode_starts).flatten()  # (N, 1) -> (N,)


def _chunks(n_envs: int, size: int) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise([*range(0, n_envs, size), n_envs])]
