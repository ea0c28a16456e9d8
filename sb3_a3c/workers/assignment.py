"""Assigns environments and seeds to workers, and makes the arguments that each is started with."""

import dataclasses
import math
import multiprocessing
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actor_learner.config import Hyperparams, WorkerConfig
from sb3_a3c.envs.sharding import EnvShare, deal, split_env
from sb3_a3c.envs.wrapper_state import FirstReset
from sb3_a3c.errors import warn
from sb3_a3c.policies.pickling import dump_policy
from sb3_a3c.processes.machine import n_cores

#: Up to 3 rollouts of a worker wait for those of the others before they fill the others' rows; one more is on its way.
MAX_ROLLOUTS_WAITING = 3


class Assignment:
    """
    Deals environments and seeds out to workers. Every seed of a training derives from one; those of the environments do not
    depend on the number of workers.

    :param n_workers: number of processes; 0 for one worker in this process; None for one for each core, or for this process,
        with a warning, if the environments can't be sent to others
    :param env_seeds: seeds that the environments begin with; None where one is to be derived
    :param report_obs: whether a callback can see observations
    :param on_other_hosts: whether workers run there, where they can't write monitor files
    :raises ValueError: if the environments can't be sent to other processes, or the policy can't be copied
    """

    def __init__(
        self,
        env: VecEnv,
        policy: ActorCriticPolicy,
        hyperparams: Hyperparams,
        n_workers: int | None,
        seed: int,
        env_seeds: Sequence[int | None],
        env_options: Sequence[dict[str, Any]],
        report_obs: bool = True,
        on_other_hosts: bool = False,
    ) -> None:
        self.on_other_hosts = on_other_hosts
        self.env, self.hyperparams, self._seed = env, hyperparams, seed
        n_envs = env.num_envs
        derived = _derived_seeds(seed, 2 * n_envs)
        seeds = [new if given is None else given for new, given in zip(derived[:n_envs], env_seeds, strict=True)]
        self.first_reset = FirstReset(tuple(seeds), tuple(env_options))
        shares = _shares(env, n_workers, self.first_reset, keep_writers=not on_other_hosts)
        #: of each worker process its environments, until it is started; empty to train in this process
        self.shares: list[EnvShare | None] = list(shares.values())
        self.env_indices = list(shares) or [tuple(range(n_envs))]  #: of each worker
        self.n_workers = len(self.env_indices)  #: at least 1
        self.worker_of = {index: worker for worker, indices in enumerate(self.env_indices) for index in indices}
        pickled_policy = dump_policy(policy)
        self.configs = [
            WorkerConfig(worker, derived[n_envs + worker], indices, pickled_policy, hyperparams, report_obs)
            for worker, indices in enumerate(self.env_indices)
        ]

    @property
    def _n_updates(self) -> list[int]:
        """Of each worker, the number of updates that one of its rollouts makes."""
        return [math.ceil(len(indices) / self.hyperparams.envs_per_update) for indices in self.env_indices]

    @property
    def n_simultaneous_updates(self) -> int:
        """
        Number of updates that begin from about the same parameters: those of one rollout of every worker, because each
        pushes while the others act; where workers take turns, of one worker.
        """
        return max(self._n_updates) if self.hyperparams.take_turns else sum(self._n_updates)

    def summary(self, place: str | None = None) -> str:
        """
        What is about to start, in one line for the user.

        :param place: where; by default on how many cores
        """
        n_envs, hyperparams = self.env.num_envs, self.hyperparams
        sizes = [len(indices) for indices in self.env_indices]
        updates = f"{1000 * sum(self._n_updates) / (hyperparams.n_steps * n_envs):.3g} updates per 1,000 timesteps"
        if not self.shares:
            return f"A3C trains in this process (n_workers=0), with {counted(n_envs, 'environment')}: {updates}"
        workers, place = counted(self.n_workers, "worker"), place or counted(n_cores(), "core")
        envs = (
            f"{min(sizes)} or {max(sizes)} environments" if min(sizes) < max(sizes) else counted(max(sizes), "environment")
        )
        each = " each" if self.n_workers > 1 else ""
        text = f"A3C starts {workers} on {place}, with {envs}{each}: {updates}"
        if n_envs == 1:
            text += ". One environment is not asynchronous: use A3C(…, n_workers=k), or make_vec_env(…, n_envs=k)"
        return text

    def arguments(self, worker: int) -> tuple[EnvShare, bytes]:
        """The arguments of ``run_worker`` after the channel and the store. They are not kept: environments may be large."""
        share, self.shares[worker] = self.shares[worker], None
        assert share is not None
        return share, cloudpickle.dumps(self.configs[worker])

    def n_tickets(self, worker: int) -> int:
        """Number of rollouts that a worker may begin before the first of them is consumed."""
        if not self.shares:  # in this process, which does one thing after another
            return 1
        # with short rollouts, those of one worker must be able to fill a whole step
        config = self.configs[worker]
        return MAX_ROLLOUTS_WAITING + 1 + self.env.num_envs // (config.hyperparams.n_steps * len(config.env_indices))

    def renew(self, workers: Sequence[int], n_restarts: int, hyperparams: Hyperparams) -> None:
        """
        Prepare for new processes in the place of dead ones: with the environments as the user's are now, and new seeds,
        which depend on the number of restarts so far, this one included.
        """
        n_envs = self.env.num_envs
        first, *others = _derived_seeds([self._seed, n_restarts], n_envs + len(workers))
        first_reset = dataclasses.replace(self.first_reset, seeds=tuple(others[:n_envs]))
        shares = split_env(self.env, [self.env_indices[w] for w in workers], first_reset, not self.on_other_hosts)
        for worker, share, seed in zip(workers, shares, [first, *others[n_envs:]], strict=True):
            self.shares[worker] = share
            self.configs[worker] = dataclasses.replace(self.configs[worker], seed=seed, hyperparams=hyperparams)


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _derived_seeds(seed: int | list[int], n: int) -> list[int]:
    return [int(derived) for derived in np.random.SeedSequence(seed).generate_state(n) >> 1]


def _shares(
    env: VecEnv, n_workers: int | None, first_reset: FirstReset, keep_writers: bool
) -> dict[tuple[int, ...], EnvShare]:
    """For each worker process the indices of its environments, and the environments; empty to train in this process."""
    if n_workers == 0:
        return {}
    indices = deal(env.num_envs, min(n_cores(), env.num_envs) if n_workers is None else n_workers)
    try:
        if multiprocessing.current_process().daemon:
            raise ValueError("This process is a daemon, which may not start processes of its own. Use n_workers=0.")
        return dict(zip(indices, split_env(env, indices, first_reset, keep_writers), strict=True))
    except ValueError as error:
        if n_workers is not None:
            raise
        warn(f"A3C trains in this process, as with n_workers=0. {error}")
        return {}
