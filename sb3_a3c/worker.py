"""
The actor-learner: what each worker does, read next to Algorithm S3 of the paper (arXiv:1602.01783).

    pull → act for ``n_steps`` → returns and advantages → for each chunk of environments: loss, gradient, push → report

Algorithm S3 knows no number that is not finite; ``guard`` has what becomes of those.

It knows nothing of processes; ``service`` has the loop of a worker process.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actions import to_env_actions
from sb3_a3c.guard import Fault, Guard, fault_of_gradient, fault_of_rollout, outputs_explained, zero_faulty
from sb3_a3c.loss import LossTerms, a3c_loss, advantages_and_returns, bootstrap_time_limits
from sb3_a3c.lstm import LstmState
from sb3_a3c.normalization import Sieve
from sb3_a3c.observations import as_tensor, batch_of_one, copied, flat_chunk, stacked
from sb3_a3c.recurrent import as_recurrent
from sb3_a3c.reports import Obs, Report, RolloutStatistics, added
from sb3_a3c.shared import Counter, ParameterStore, Replica
from sb3_a3c.stopwatch import Stopwatch
from sb3_a3c.tape import ChunkTape, RolloutTape
from sb3_a3c.task import WorkerTask


@dataclass
class Rollout:
    """T = n_steps transitions of each of N environments, as the worker acted them out."""

    obs: Obs  #: (T, N, …), finite
    faulty_obs: npt.NDArray[np.bool_]  #: (N,), whether one of them, or of the last, was not
    actions: th.Tensor  #: (T, N, …)
    rewards: npt.NDArray[np.float32]  #: (T, N)
    dones: npt.NDArray[np.bool_]  #: (T, N)
    infos: list[list[dict[str, Any]]]  #: T lists of N
    values: npt.NDArray[np.floating]  #: (T, N), V of the states acted in
    terminal_values: npt.NDArray[np.floating]  #: (T, N), V of the last state where a time limit ended the episode, else 0
    last_values: npt.NDArray[np.floating]  #: (N,), V of the state after the rollout
    first_state: LstmState  #: memory before the first step
    episode_starts: th.Tensor  #: (T, N), bool
    last_obs: Obs  #: (N, …)
    tape: RolloutTape | None  #: of all that the policy computed, if it can be used


class ActorLearner:
    """
    One worker: its environments, its replica of the policy, its memory.

    :param task: what to do
    :param env: the environments, which begin new episodes at their next reset
    :param store: the shared parameters
    :param should_stop: asked between steps; once it says yes, :meth:`rollout` drops the rollout it is in
    """

    def __init__(self, task: WorkerTask, env: VecEnv, store: ParameterStore, should_stop: Callable[[], bool]) -> None:
        set_random_seed(task.seed)
        self.task = task
        self.settings = task.settings
        self.should_stop = should_stop
        self.policy: ActorCriticPolicy = pickle.loads(task.policy)
        self.actor = as_recurrent(self.policy)
        self.replica = Replica(store, self.policy, task.index)
        self.counters = store.counters
        self.env = env
        self.n_envs = env.num_envs
        self._sieve = Sieve(env)
        try:
            self.obs: Obs = copied(env.reset())
        except BaseException:
            self.close()
            raise
        self._faulty_obs = zero_faulty(self.obs) | self._sieve.faulty_obs
        self.state = self.actor.initial_state(self.n_envs)
        self.episode_starts = th.ones(self.n_envs, dtype=th.bool)
        self._tape: RolloutTape | None = None
        self._tape_shape: tuple[int, list[slice]] | None = None
        self._guard = Guard()
        self._statistics = RolloutStatistics()
        self._watch = Stopwatch(self._statistics)

    def rollout(self) -> Report | None:
        """
        Make one rollout and learn from it.

        :return: the report, or None when enough transitions are reserved or a stop was asked for
        """
        self._statistics = RolloutStatistics()
        self._watch = Stopwatch(self._statistics)
        if self.should_stop() or not self._reserve():
            self.counters[self.task.index, Counter.TURNS] = np.iinfo(np.int64).max  # nobody need wait for me again
            return None
        self._pull()
        rollout = self._act()
        if rollout is None:
            return None
        self._learn(rollout)
        self._watch.stop()
        self.counters[self.task.index, Counter.TURNS] += 1
        return Report(
            env_indices=self.task.env_indices,
            rewards=rollout.rewards,
            dones=rollout.dones,
            actions=rollout.actions.numpy(),
            infos=rollout.infos,
            last_obs=rollout.last_obs,
            statistics=self._statistics,
        )

    def close(self) -> None:
        """Let go of the environments, which stay open."""
        self._sieve.remove()

    def is_my_turn(self) -> bool:
        """
        :return: with ``take_turns`` whether those before me have finished this round and those behind me the last one;
            else always True
        """
        turns, me = self.counters[:, Counter.TURNS], self.task.index
        return not self.settings.take_turns or bool((turns[:me] > turns[me]).all() and (turns[me + 1 :] >= turns[me]).all())

    def _reserve(self) -> bool:
        """Announce a rollout before it begins, so that all workers together overshoot by one rollout each at most."""
        reserved = self.counters[:, Counter.RESERVED]
        if self.task.steps_before + int(reserved.sum()) >= self.task.total_steps:
            return False
        reserved[self.task.index] += self.settings.n_steps * self.n_envs
        steps = self.task.steps_before + int(reserved.sum())
        progress_remaining = max(0.0, 1.0 - steps / self.task.total_steps)
        update_learning_rate(self.replica.optimizer, self.settings.lr_schedule(progress_remaining))
        return True

    def _pull(self) -> None:
        """Algorithm S3: "Synchronize thread-specific parameters θ' = θ and θ'_v = θ_v"."""
        self.replica.pull()
        if self.settings.use_sde:
            self.policy.reset_noise(self.n_envs)
        self._watch.spent("sharing")

    def _act(self) -> Rollout | None:
        """Algorithm S3: "Perform a_t according to policy π(a_t|s_t; θ'); receive reward r_t and new state s_{t+1}"."""
        n_steps, n_envs = self.settings.n_steps, self.n_envs
        self.policy.set_training_mode(False)
        first_state, tape, faulty_obs = self.state, self._blank_tape(), self._faulty_obs
        recording = {} if tape is None else {"tape": tape}
        obs, actions, infos, starts = [], [], [], []
        rewards = np.zeros((n_steps, n_envs), dtype=np.float32)
        dones = np.zeros((n_steps, n_envs), dtype=bool)
        values: list[th.Tensor] = []
        terminal_values = th.zeros(n_steps, n_envs, dtype=next(self.policy.parameters()).dtype)
        for t in range(n_steps):
            if self.should_stop():
                return None
            if self.settings.use_sde and self.settings.sde_sample_freq > 0 and t % self.settings.sde_sample_freq == 0:
                self.policy.reset_noise(n_envs)
            with th.no_grad(), outputs_explained():
                action, value, self.state = self.actor.act(as_tensor(self.obs), self.state, self.episode_starts, **recording)
            obs.append(self.obs)
            starts.append(self.episode_starts)
            actions.append(action)
            values.append(value.flatten())
            env_actions = to_env_actions(self.policy, action.numpy())
            self._watch.spent("acting")
            new_obs, rewards[t], dones[t], info = self.env.step(env_actions)
            self._watch.spent("stepping")
            infos.append(info)
            self.obs = copied(new_obs)
            self._faulty_obs = zero_faulty(self.obs) | self._sieve.faulty_obs
            faulty_obs = faulty_obs | self._faulty_obs | self._sieve.faulty_ends
            rewards[t, self._sieve.faulty_rewards] = np.nan
            self.episode_starts = th.from_numpy(dones[t].copy())
            for i in np.flatnonzero(dones[t]):
                if info[i].get("TimeLimit.truncated", False) and info[i].get("terminal_observation") is not None:
                    terminal_values[t, i] = self._terminal_value(info[i]["terminal_observation"], int(i))
        with th.no_grad():
            last_values = self.actor.predict_values(as_tensor(self.obs), self.state, self.episode_starts).flatten()
        self._watch.spent("acting")
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
            last_obs=self.obs,
            tape=tape,
        )

    def _chunks(self) -> list[slice]:
        """Of the environments: what is learned from at a time."""
        bounds = [*range(0, self.n_envs, self.settings.envs_per_update), self.n_envs]
        return [slice(begin, end) for begin, end in pairwise(bounds)]

    def _blank_tape(self) -> RolloutTape | None:
        """For the next rollout; None where the policy can't use one."""
        shape = (self.settings.n_steps, self._chunks())
        if shape != self._tape_shape:
            self._tape = None  # before there is another one
            self._tape, self._tape_shape = self.actor.new_tape(*shape), shape
        if self._tape is not None:
            self._tape.rewind()
        return self._tape

    def _terminal_value(self, terminal_obs: Obs, env: int) -> th.Tensor:
        """V of the observation at which a time limit cut an episode, with the memory it had; NaN if that is not finite."""
        batch = copied(batch_of_one(terminal_obs))
        if zero_faulty(batch).any():
            return th.tensor(np.nan)
        state = tuple(part[:, env : env + 1] for part in self.state)
        with th.no_grad():
            obs = self.policy.obs_to_tensor(terminal_obs)[0]  # also to channels first
            return self.actor.predict_values(obs, state, th.zeros(1, dtype=th.bool))[0, 0]

    def _learn(self, rollout: Rollout) -> None:
        """
        Algorithm S3 from "R = …" to "Perform asynchronous update", once for each chunk of environments. As for the paper's
        threads, all gradients are those at the parameters θ' that have acted.
        """
        settings = self.settings
        rewards = bootstrap_time_limits(rollout.rewards, rollout.terminal_values, settings.gamma)
        advantages, returns = advantages_and_returns(
            rewards, rollout.values, rollout.dones, rollout.last_values, settings.gamma, settings.gae_lambda
        )
        self.policy.set_training_mode(True)
        chunks = self._chunks()
        tapes = [None] * len(chunks) if rollout.tape is None else rollout.tape.chunk_tapes()
        for chunk, tape in zip(chunks, tapes, strict=True):
            fault = fault_of_rollout(rollout.faulty_obs[chunk], rollout.rewards[:, chunk], rollout.terminal_values[:, chunk])
            if fault is None:
                terms = self._compute_gradient(rollout, advantages[:, chunk], returns[:, chunk], chunk, tape)
                fault = self._push(terms)
            if fault is None:
                self._note(terms, returns[:, chunk], rollout.values[:, chunk])
            else:
                self._drop(fault)
        self._watch.spent("learning")

    def _compute_gradient(
        self,
        rollout: Rollout,
        advantages: npt.NDArray[np.floating],
        returns: npt.NDArray[np.floating],
        chunk: slice,
        tape: ChunkTape | None,
    ) -> LossTerms:
        """
        Leave the gradient of the loss over a chunk of environments in the replica.

        :param rollout: of all environments
        :param advantages: (n_steps, chunk)
        :param returns: (n_steps, chunk)
        :param chunk: which environments
        :param tape: of what the policy computed for them
        :return: the loss
        """
        shape = returns.shape
        if self.settings.normalize_advantage and advantages.size > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        actions = rollout.actions[:, chunk].flatten(0, 1)  # (T, n, …) -> (T * n, …)
        if isinstance(self.policy.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        elif isinstance(self.policy.action_space, spaces.Box):
            actions = actions.flatten(1)  # (T * n, …) -> (T * n, action_dim)
        with outputs_explained():
            values, log_prob, entropy = self.actor.evaluate_actions(
                as_tensor(flat_chunk(rollout.obs, chunk)),
                actions,
                tuple(part[:, chunk].contiguous() for part in rollout.first_state),
                rollout.episode_starts[:, chunk],
                **({} if tape is None else {"tape": tape}),
            )
        terms = a3c_loss(
            values.reshape(shape),  # (T * n, 1) -> (T, n)
            log_prob.reshape(shape),
            None if entropy is None else entropy.reshape(shape),
            th.as_tensor(returns, dtype=values.dtype),
            th.as_tensor(advantages, dtype=values.dtype),
            self.settings.ent_coef,
            self.settings.vf_coef,
        )
        terms.loss.backward()  # type: ignore[no-untyped-call]
        return terms

    def _push(self, terms: LossTerms) -> Fault | None:
        """Algorithm S3: "Perform asynchronous update of θ using dθ and of θ_v using dθ_v"; or the reason why not."""
        norm = th.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        size = norm.item()
        if (fault := fault_of_gradient(terms.loss.item(), size)) is not None:
            return fault
        if norm > self.settings.max_grad_norm:
            th.nn.utils.clip_grads_with_norm_(self.policy.parameters(), self.settings.max_grad_norm, norm)
        self._watch.spent("learning")
        staleness = self.replica.push()
        self._watch.spent("sharing")
        if staleness is None:
            return Fault.PARAMETER
        self._statistics.staleness += staleness
        self._statistics.grad_norm += size
        return None

    def _note(self, terms: LossTerms, returns: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> None:
        """Of an update that was made: what the logger will want to know."""
        self._guard.passed()
        statistics, n_envs = self._statistics, returns.shape[1]
        statistics.n_updates += 1
        statistics.n_transitions += returns.size
        statistics.policy_loss += terms.policy_loss.item() * n_envs
        statistics.value_loss += terms.value_loss.item() * n_envs
        statistics.entropy += terms.entropy.item() * n_envs
        statistics.return_moments = added(statistics.return_moments, _moments(returns))
        statistics.error_moments = added(statistics.error_moments, _moments(returns - values))

    def _drop(self, fault: Fault) -> None:
        """An update is not made."""
        self.replica.discard()
        self._statistics.skipped_updates += 1
        self._statistics.fault = fault.what
        self._guard.dropped(fault)


def _moments(x: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Sums of the numbers and of their squares, in double precision: they are pooled and subtracted later."""
    x = x.astype(np.float64)
    return float(x.sum()), float(np.square(x).sum())
