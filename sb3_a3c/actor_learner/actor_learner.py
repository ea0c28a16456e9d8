"""
The actor-learner: what each worker does, to be read next to Algorithm S3 of the paper (arXiv:1602.01783).

    pull → act for ``n_steps`` → returns and advantages → for each chunk of environments: loss, gradient, push → report

It knows no processes: ``workers.worker_main`` runs it in a worker process, ``workers.in_process`` in this one.
"""

import pickle
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actor_learner.acting import Actor, Rollout
from sb3_a3c.actor_learner.config import WorkerConfig
from sb3_a3c.actor_learner.loss import LossTerms, a3c_loss, advantages_and_returns, bootstrap_time_limits
from sb3_a3c.actor_learner.report import Report, RolloutStatistics, Timer
from sb3_a3c.actor_learner.update_guard import DroppedUpdateError, Fault, UpdateGuard, check_gradient, check_rollout
from sb3_a3c.store.base import ParameterStore


class ActorLearner:
    """
    One worker: its environments, which begin new episodes at their next reset, and its replica of the policy.
    ``should_stop`` is asked between steps; once it says yes, :meth:`rollout` drops the rollout it is in.
    """

    def __init__(self, config: WorkerConfig, env: VecEnv, store: ParameterStore, should_stop: Callable[[], bool]) -> None:
        set_random_seed(config.seed)
        self.config = config
        self.hyperparams = config.hyperparams
        self.should_stop = should_stop
        self.env = env
        self.policy: ActorCriticPolicy = pickle.loads(config.policy)
        self.replica = store.replica(self.policy, config.index)
        self._trainable = tuple(parameter.requires_grad for parameter in self.policy.parameters())
        self.actor = Actor(self.policy, env)
        self._guard = UpdateGuard(self.replica)
        self._statistics, self._timer = RolloutStatistics(), Timer()

    def rollout(self, learning_rate: float) -> Report | None:
        """An iteration of Algorithm S3's outer loop. None when enough transitions are reserved, or after a stop."""
        self._statistics, self._timer = RolloutStatistics(learning_rate=learning_rate), Timer()
        n_transitions = self.hyperparams.n_steps * self.env.num_envs
        if self.should_stop() or not self.replica.reserve(n_transitions):
            self.replica.leave_turns()
            return None
        update_learning_rate(self.replica.optimizer, learning_rate)
        if self.hyperparams.trainable != self._trainable:
            self._trainable = self.hyperparams.trainable
            self.replica.set_trainable(self._trainable)
        self._pull()
        rollout = self._act()
        if rollout is None:
            return None
        self._learn(rollout)
        self.replica.end_turn()
        return Report(
            env_indices=self.config.env_indices,
            rewards=rollout.rewards,
            dones=rollout.dones,
            actions=rollout.actions.numpy(),
            infos=rollout.infos,
            values=rollout.values,
            obs=rollout.obs if self.config.report_obs else None,
            last_obs=rollout.last_obs if self.config.report_obs else None,
            statistics=self._statistics,
        )

    def close(self) -> None:
        """Release the environments, which stay open."""
        self.actor.close()

    def _pull(self) -> None:
        """Algorithm S3: "Synchronize thread-specific parameters θ' = θ and θ'_v = θ_v"."""
        self.replica.pull()
        if self.hyperparams.use_sde:
            self.policy.reset_noise(self.env.num_envs)
        self._timer.spent("sharing")

    def _act(self) -> Rollout | None:
        """Algorithm S3: "Perform a_t according to policy π(a_t|s_t; θ'); receive reward r_t and new state s_{t+1}"."""
        return self.actor.act(self.hyperparams, self.should_stop, self._timer)

    def _learn(self, rollout: Rollout) -> None:
        """
        Algorithm S3 from "R = …" to "Perform asynchronous update", once for each chunk of environments. As for the paper's
        threads, all gradients are those at the parameters θ' that have acted.
        """
        gamma, gae_lambda = self.hyperparams.gamma, self.hyperparams.gae_lambda
        rewards = bootstrap_time_limits(rollout.rewards, rollout.terminal_values, gamma)
        advantages, returns = advantages_and_returns(
            rewards, rollout.values, rollout.dones, rollout.last_values, gamma, gae_lambda
        )
        self.policy.set_training_mode(True)
        for index, chunk in enumerate(rollout.chunks):
            with self._guard.dropping(self._statistics):
                check_rollout(rollout.faulty_obs[chunk], rollout.rewards[:, chunk], rollout.terminal_values[:, chunk])
                terms = self._compute_gradient(rollout, index, advantages[:, chunk], returns[:, chunk])
                grad_norm, staleness = self._push(terms)
                self._statistics.add_update(terms, returns[:, chunk], rollout.values[:, chunk], grad_norm, staleness)
        self._timer.spent("learning")
        self._statistics.seconds = self._timer.seconds

    def _compute_gradient(
        self, rollout: Rollout, index: int, advantages: npt.NDArray[np.floating], returns: npt.NDArray[np.floating]
    ) -> LossTerms:
        """
        Leave the gradient of the loss of chunk ``index``, over (n_steps, chunk), in the policy. With normalized values,
        advantages, ``ent_coef`` and errors of the critic are in units of their scale.
        """
        scale, ent_coef = self.actor.update_value_scale(returns), self.hyperparams.ent_coef
        if self.hyperparams.normalize_advantage and advantages.size > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        else:
            advantages, ent_coef = advantages / scale, ent_coef / scale
        values, log_prob, entropy = self.actor.evaluate(rollout, index)
        terms = a3c_loss(
            values / scale,
            log_prob,
            entropy,
            th.as_tensor(returns / scale, dtype=values.dtype),
            th.as_tensor(advantages, dtype=values.dtype),
            ent_coef,
            self.hyperparams.vf_coef,
        )
        terms.loss.backward()  # type: ignore[no-untyped-call]
        return terms

    def _push(self, terms: LossTerms) -> tuple[float, int]:
        """
        Algorithm S3: "Perform asynchronous update of θ using dθ and of θ_v using dθ_v".

        :return: the gradient's norm before clipping, and its staleness
        """
        norm = th.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        check_gradient(terms.loss.item(), norm.item())
        if norm > self.hyperparams.max_grad_norm:
            self._statistics.clipped_updates += 1
            th.nn.utils.clip_grads_with_norm_(self.policy.parameters(), self.hyperparams.max_grad_norm, norm)
        self._timer.spent("learning")
        staleness = self.replica.push()
        self._timer.spent("sharing")
        if staleness is None:
            raise DroppedUpdateError(Fault.PARAMETER)
        return norm.item(), staleness
