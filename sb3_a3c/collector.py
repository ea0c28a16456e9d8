"""
The Hogwild collector: the other half of ``A3C.collect_rollouts``.

It deals the environments out, runs the workers (processes under the supervisor, or one in this very process) and hands
their reports to Stable-Baselines3 as steps of ``n_envs`` transitions.
"""

import contextlib
import multiprocessing
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.envs import LiveShare, PickledShare, deal, split_env
from sb3_a3c.reports import Obs, Report, Step, StepAssembler, TrainingStatistics
from sb3_a3c.shared import ParameterStore
from sb3_a3c.supervisor import Supervisor
from sb3_a3c.worker import ActorLearner, Settings, WorkerTask, run_worker

#: So many rollouts of one worker may wait for the others' before they fill the others' rows.
MAX_ROLLOUTS_AHEAD = 2
#: Seconds within which workers that have been asked to stop must have told what they did last.
DRAIN_SECONDS = 2.0
#: Modules that a fork server imports once for all workers. torch's optimizers import torch._dynamo at their first step,
#: which takes seconds; cv2 and ale_py, slow to import too, are there for Atari.
PRELOAD = ("sb3_a3c.worker", "stable_baselines3.common.vec_env", "torch._dynamo", "cv2", "ale_py")


class _Workers(Protocol):
    """Processes, or the one worker in this process."""

    @property
    def finished(self) -> bool: ...

    def receive(self, timeout: float | None = None) -> list[tuple[int, Report]]: ...

    def request_stop(self) -> None: ...

    def stop(self) -> None: ...


class HogwildCollector:
    """
    Workers that learn on shared parameters, and what they report. They start at once and run until :meth:`stop`.

    :param policy: the policy to start from, optimizer included; it stays private to this process
    :param env: the user's environments
    :param first_obs: (n_envs, …), observations to show until the first reports come
    :param settings: the workers' hyper-parameters
    :param n_workers: number of processes; 0 for one worker in this process; None for one for each core, or for this process,
        with a warning, if the environments can't be sent to others
    :param seed: every seed of this training is derived from it
    :param env_seeds: seeds that the environments are to begin with; None where one is to be derived
    :param steps_before: transitions made in earlier calls of ``learn``
    :param total_steps: goal, ``steps_before`` included
    :param start_method: of the processes; None for the platform's best
    :raises ValueError: if the environments can't be sent to other processes
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        env: VecEnv,
        first_obs: Obs,
        settings: Settings,
        n_workers: int | None,
        seed: int,
        env_seeds: Sequence[int | None],
        steps_before: int,
        total_steps: int,
        start_method: str | None = None,
    ) -> None:
        n_envs = env.num_envs
        # one seed for each environment and each worker; the environments' do not depend on the number of workers
        derived = [int(n) for n in np.random.SeedSequence(seed).generate_state(2 * n_envs) >> 1]
        seeds = [new if old is None else old for new, old in zip(derived[:n_envs], env_seeds, strict=True)]
        shares = _share_out(env, n_workers, seeds)
        in_process = isinstance(shares[0][1], LiveShare)
        pickled_policy = cloudpickle.dumps(policy)
        tasks = [
            WorkerTask(
                index=index,
                seed=derived[n_envs + index],
                env_indices=indices,
                env_share=share,
                policy=pickled_policy,
                settings=settings,
                steps_before=steps_before,
                total_steps=total_steps,
            )
            for index, (indices, share) in enumerate(shares)
        ]
        self.store = ParameterStore(policy, len(tasks), share_memory=not in_process)
        self.statistics = TrainingStatistics()
        self._assembler = StepAssembler(first_obs, n_envs, MAX_ROLLOUTS_AHEAD * settings.n_steps)
        self._workers: _Workers
        if in_process:
            self._workers = _InProcess(tasks[0], self.store)
        else:
            arguments = [(self.store, cloudpickle.dumps(task)) for task in tasks]
            self._workers = Supervisor(run_worker, arguments, start_method, PRELOAD)
            self._workers.start()

    def next_step(self) -> Step | None:
        """
        :return: the next step of all environments; None when all workers have finished and all steps were handed out
        :raises WorkerDiedError: if a worker died
        :raises Exception: what a worker raised
        """
        while (step := self._assembler.next_step(flush=self._workers.finished)) is None:
            if self._workers.finished:
                return None
            self._receive()
        return step

    def drain(self) -> tuple[list[dict[str, Any]], npt.NDArray[np.bool_]]:
        """
        Stop the workers, and take out what they did that no step has shown.

        :return: the infos of those transitions, and whether each ended an episode
        """
        self._workers.request_stop()
        while not self._workers.finished:
            try:
                if not self._receive(DRAIN_SECONDS):
                    break
            except Exception:
                continue
        return self._assembler.leftovers()

    def stop(self) -> None:
        """End the workers and free what was used for them; the store stays readable."""
        self._workers.stop()

    def _receive(self, timeout: float | None = None) -> bool:
        """Take in what the workers have to report; False if that is nothing."""
        reports = self._workers.receive(timeout)
        for _, report in reports:
            self._assembler.add(report)
            self.statistics.add(report.statistics)
        return bool(reports)


def _share_out(
    env: VecEnv, n_workers: int | None, seeds: Sequence[int]
) -> list[tuple[tuple[int, ...], PickledShare | LiveShare]]:
    """For each worker the indices of its environments, and the environments."""
    if n_workers != 0:
        indices = deal(env.num_envs, min(_n_cores(), env.num_envs) if n_workers is None else n_workers)
        try:
            if multiprocessing.current_process().daemon:
                raise ValueError("This process is a daemon, which may not start processes of its own. Use n_workers=0.")
            return list(zip(indices, split_env(env, indices, seeds), strict=True))
        except ValueError as error:
            if n_workers is not None:
                raise
            warnings.warn(f"A3C trains in this process, as with n_workers=0. {error}", stacklevel=2)
    return [(tuple(range(env.num_envs)), LiveShare(env, tuple(seeds)))]


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _InProcess:
    """The one worker of ``n_workers=0``: the same code, with random state and thread count of its own."""

    def __init__(self, task: WorkerTask, store: ParameterStore) -> None:
        self._stop = False
        self.finished = False
        self._random_state = _random_state()
        with self._as_worker():
            self._learner = ActorLearner(task, store, lambda: self._stop)

    def receive(self, timeout: float | None = None) -> list[tuple[int, Report]]:
        with self._as_worker():
            report = self._learner.rollout()
        self.finished = report is None
        return [] if report is None else [(0, report)]

    def request_stop(self) -> None:
        self._stop = True

    def stop(self) -> None:
        self._stop = self.finished = True

    @contextlib.contextmanager
    def _as_worker(self) -> Iterator[None]:
        n_threads, outside = th.get_num_threads(), _random_state()
        th.set_num_threads(1)
        _set_random_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = _random_state()
            _set_random_state(outside)
            th.set_num_threads(n_threads)


def _random_state() -> tuple[Any, Any, th.Tensor]:
    return random.getstate(), np.random.get_state(), th.get_rng_state()


def _set_random_state(state: tuple[Any, Any, th.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    th.set_rng_state(state[2])
