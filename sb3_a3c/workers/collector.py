"""
The Hogwild collector: what ``A3C.collect_rollouts`` drives.

It runs the workers (processes of this machine or of other hosts, or one in this process), assembles their reports into
steps of ``n_envs`` transitions for Stable-Baselines3's callbacks, and passes on to the workers what callbacks change.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecVideoRecorder

from sb3_a3c.actor_learner.config import Hyperparams
from sb3_a3c.actor_learner.report import RolloutStatistics
from sb3_a3c.envs.last_step import allow_last_step, refuse_last_step
from sb3_a3c.envs.monitor_rows import MonitorRows
from sb3_a3c.envs.normalize import StatisticsMerger, options
from sb3_a3c.envs.subproc import take_back
from sb3_a3c.envs.wrapper_state import WrapperCounts, continue_from, finish_videos, wrappers
from sb3_a3c.errors import WorkerDiedError, warn
from sb3_a3c.processes.machine import n_cores
from sb3_a3c.processes.owner import Owned
from sb3_a3c.processes.signals import uninterrupted
from sb3_a3c.store.shared_memory import NO_GOAL, SharedMemoryStore
from sb3_a3c.workers.assignment import MAX_ROLLOUTS_WAITING, Assignment, counted
from sb3_a3c.workers.env_proxy import EnvProxy, call_users_env
from sb3_a3c.workers.protocol import (
    EnvCall,
    FinalState,
    RolloutFinished,
    Shutdown,
    Ticket,
    TrainingDone,
    UpdateHyperparams,
    Workers,
)
from sb3_a3c.workers.statistics import TrainingStatistics
from sb3_a3c.workers.step_assembler import Step, StepAssembler
from sb3_a3c.workers.tickets import Tickets
from sb3_a3c.workers.worker_processes import workers_here

#: Seconds in which workers that have been asked to stop must have sent their final state, where they save a video, or drive
#: the processes of a ``SubprocVecEnv``, which may be in a step …
LONG_STOP_SECONDS = 60.0
#: … and from a second Ctrl-C on, for which the collector looks every 0.1 s.
HURRY_SECONDS, LOOK_SECONDS = 0.5, 0.1


#: Makes the workers of an assignment, with a store.
MakeWorkers: TypeAlias = Callable[[Assignment, SharedMemoryStore], Workers]


class HogwildCollector(Owned):
    """
    Workers that learn on shared parameters, and what they report. They start at once and run until :meth:`stop`. Until
    then calls to ``env`` reach the workers' environments.

    :param policy: the policy to start from, optimizer included; it stays private to this process
    :param steps_before: transitions made in earlier calls of ``learn``
    :param total_steps: goal, ``steps_before`` included; may be infinite
    :param learning_rate: of the remaining progress (1 to 0); called for each rollout, in this process
    """

    def __init__(
        self,
        assignment: Assignment,
        policy: ActorCriticPolicy,
        steps_before: int,
        total_steps: float,
        learning_rate: Callable[[float], float],
        make_workers: MakeWorkers = workers_here,
        max_restarts: int = 0,
    ) -> None:
        super().__init__()
        self._env = env = assignment.env
        self.hyperparams, self._normalization = assignment.hyperparams, options(env)
        self._assignment = assignment
        self._n_workers = assignment.n_workers
        has_processes = bool(assignment.shares)
        goal = int(min(total_steps, NO_GOAL))
        self.store = SharedMemoryStore(policy, self._n_workers, goal, steps_before, share_memory=has_processes)
        self.statistics = TrainingStatistics()
        self._assembler = StepAssembler(env.num_envs, MAX_ROLLOUTS_WAITING)
        self._normalize = StatisticsMerger(env, self._n_workers)
        self._monitor_rows = MonitorRows(env) if assignment.on_other_hosts else None
        self._statistics_of: list[deque[RolloutStatistics]] = [deque() for _ in range(self._n_workers)]  # not consumed yet
        self._total_steps, self._learning_rate = total_steps, learning_rate
        self._tickets = Tickets(assignment, steps_before)
        self._done: set[int] = set()  # workers that make no more rollouts
        self._given_up: set[int] = set()  # dead workers that could not be replaced
        self._wrapper_counts: dict[int, WrapperCounts] = {}  # of workers that have sent their final state
        self._max_restarts = max_restarts
        self.n_restarts = 0
        self._is_ending = False
        self._env_proxy: EnvProxy | None = None
        self._n_threads = th.get_num_threads()
        if has_processes:
            finish_videos(env)
        self._workers = make_workers(assignment, self.store)
        try:
            self._workers.start()
        except BaseException:
            self._take_environments_back(threading.Event())  # workers that have started may have begun to step them
            raise
        if has_processes:
            self._env_proxy = EnvProxy(self._env, self._assignment.env_indices, self._ask_envs)
            # the cores are the workers': a second thread here would wait for one of them, and the first for the second
            th.set_num_threads(max(1, min(self._n_threads, n_cores() - self._workers.n_here)))
        refuse_last_step(self._env)  # only now: where a start fails, nothing is left to be undone

    def wait_for_step(self) -> bool:
        """
        Return whether there is a next step; False when all workers have finished and all steps were taken. Raise what a
        worker raised, or a WorkerDiedError.
        """
        while True:
            # only now: callbacks of the last step may have changed what a schedule reads
            while self._tickets.due and self._may_begin_more:
                self._send_ticket(self._tickets.due.pop(0))
            if self._assembler.has_step(flush=self._all_done):
                return True
            if self._all_done:
                self._workers.sync()
                return False
            self._receive()

    def take_step(self) -> Step:
        """Return the next step of all environments, after :meth:`wait_for_step` has returned True."""
        step = self._assembler.take_step()
        for env_index in self._assembler.take_used_up():
            worker = self._assignment.worker_of[env_index]
            # its other environments' rollouts are used up with this one, or soon
            if env_index == self._assignment.env_indices[worker][0]:
                self.statistics.add(self._statistics_of[worker].popleft())
                self._tickets.consume(worker)
        return step

    def update_hyperparams(self, hyperparams: Hyperparams) -> None:
        """
        Let the workers use these hyper-parameters, and the options of the user's ``VecNormalize``, from their next rollouts
        on. Does nothing if none has changed.
        """
        normalization = options(self._env)
        if (hyperparams, normalization) != (self.hyperparams, self._normalization):
            self.hyperparams, self._normalization = hyperparams, normalization
            for worker in range(self._n_workers):
                self._workers.send(worker, UpdateHyperparams(hyperparams, normalization))

    def drain(self) -> None:
        """Let the workers learn no more, and receive what they did last. Calls to the environments still reach them."""
        if self.is_forked:
            return
        self._is_ending = True
        self._workers.request_stop()
        self._receive_rest(lambda: self._all_done, threading.Event())
        self._workers.sync()

    def load_policy(self, policy: ActorCriticPolicy) -> None:
        """Let the workers continue from the parameters and the optimizer state of a policy."""
        self._workers.load(policy)

    def fetch_optimizer(self, policy: ActorCriticPolicy) -> None:
        """Copy the present state of the shared optimizer into ``policy.optimizer``."""
        self._workers.sync(with_optimizer=True)
        self.store.fetch_optimizer(policy)

    def pop_hint(self) -> str:
        """What keeps training from going well, if that has just been found."""
        return self.statistics.pop_hint() or self._workers.pop_hint()

    def pop_figures(self) -> Mapping[str, Any]:
        """Values for the logger since the last call."""
        figures = {**self.statistics.pop(), **self._workers.pop_figures()}
        if self.n_restarts > 0:
            figures["time/worker_restarts"] = self.n_restarts
        return figures

    def take_leftovers(self) -> tuple[list[dict[str, Any]], npt.NDArray[np.bool_]]:
        """Return of the transitions that no step has shown the infos, and whether each ended an episode."""
        for waiting in self._statistics_of:
            while waiting:
                self.statistics.add(waiting.popleft())
        return self._assembler.leftovers()

    def stop(self, hurry: threading.Event) -> None:
        """End the workers, at once if ``hurry`` is set, and free what they used. Store and leftovers stay readable."""
        self._is_ending = True
        if self._env_proxy is not None:
            self._env_proxy.remove()
            th.set_num_threads(self._n_threads)
            self._env_proxy = None  # it refers to this object: together they would keep the shared memory for a while
        try:
            self._workers.request_stop()
            for worker in range(self._n_workers):
                self._workers.send(worker, Shutdown())
            self._receive_rest(lambda: self._workers.finished, hurry)
        finally:
            try:
                self._workers.stop(hurry)
            finally:
                self._take_environments_back(hurry)

    def _receive_rest(self, is_over: Callable[[], bool], hurry: threading.Event) -> None:
        already_failing = sys.exc_info()[0] is not None  # `learn` is about to raise something
        deadline = time.monotonic() + self._stop_seconds()
        while not is_over() and (left := deadline - time.monotonic()) > 0:
            if hurry.is_set():
                deadline, hurry = min(deadline, time.monotonic() + HURRY_SECONDS), threading.Event()
            try:
                self._receive(min(left, LOOK_SECONDS))
            except Exception as error:  # the model is complete: a warning is enough
                if not already_failing:
                    warn(f"At the end of training a worker failed: {type(error).__name__}: {error}")

    def _stop_seconds(self) -> float:
        """
        A worker that saves a video needs longer; and one that is killed while the process of a ``SubprocVecEnv`` makes a
        step leaves that process with an answer that no one waits for.
        """
        records = any(isinstance(wrapper, VecVideoRecorder) for wrapper in wrappers(self._env))
        is_long = records or isinstance(self._env.unwrapped, SubprocVecEnv)
        return LONG_STOP_SECONDS if is_long else self._workers.stop_seconds

    def _take_environments_back(self, hurry: threading.Event) -> None:
        allow_last_step(self._env)
        continue_from(self._env, list(self._wrapper_counts.values()))
        base = self._env.unwrapped
        if not isinstance(base, SubprocVecEnv):
            return
        if sys.exc_info()[0] is not None:  # a terminal's Ctrl-C ends their processes too, or has interrupted a step
            to_check = list(self._assignment.worker_of)
        elif not self._assignment.shares:
            to_check = []
        else:  # those of workers that died
            to_check = [index for index, worker in self._assignment.worker_of.items() if worker not in self._wrapper_counts]
        if to_check:
            take_back(base, to_check, HURRY_SECONDS if hurry.is_set() else math.inf)

    @property
    def _all_done(self) -> bool:
        return len(self._done | self._workers.ended) == self._n_workers

    def _receive(self, timeout: float | None = None) -> None:
        """Wait for messages of the workers, and handle them."""
        try:
            self._workers.wait(timeout)
        except WorkerDiedError as death:
            self._replace(death)
        else:
            with uninterrupted():
                self._handle_all()

    def _handle_all(self) -> None:
        for worker, message in self._workers.take():
            match message:
                case RolloutFinished(report, deltas):
                    self._assembler.add(report)
                    self._tickets.use_up(worker, report.rewards.size)
                    self._statistics_of[worker].append(report.statistics)
                    self._normalize.merge(worker, deltas)
                    self.statistics.warn_of_skipped(report.statistics)
                    if self._monitor_rows is not None:
                        self._monitor_rows.write(report.env_indices, report.infos)
                    self._stop_at_goal()
                case TrainingDone():
                    self._done.add(worker)
                    for other in range(self._n_workers):
                        self._send_ticket(other)  # a worker that waits for one must learn that there is no more to do
                case FinalState(deltas, counts):
                    self._normalize.merge(worker, deltas)
                    self._wrapper_counts[worker] = counts

    @uninterrupted()
    def _replace(self, death: WorkerDiedError) -> None:
        """
        Start processes in the place of dead ones: with the shared parameters, with new episodes, and with seeds of their
        own. The rollouts that the dead ones were in are lost, and not counted.
        """
        self._handle_all()  # their final messages
        workers = death.workers
        if not death.can_be_replaced and not self._is_ending:
            self._give_up(death)
            return
        if self.n_restarts == self._max_restarts > 0:
            death.add_note(f"{self.n_restarts} workers were replaced before: max_worker_restarts is used up.")
        if self._is_ending or isinstance(self._env.unwrapped, SubprocVecEnv) or self.n_restarts == self._max_restarts:
            raise death
        self.n_restarts += 1
        self._assignment.renew(workers, self.n_restarts, self.hyperparams)
        for worker in workers:
            self.store.release(worker, self._tickets.n_reported[worker])
            self._normalize.pop(worker)  # the user's statistics travel with the environments, and include these
            self._done.discard(worker)
        self._workers.replace_all(workers)
        for worker in workers:
            self._tickets.renew(worker, len(self._statistics_of[worker]))
        self._stop_at_goal()
        were = "It was" if len(workers) == 1 else "They were"
        message = f"{death} {were} replaced: restart {self.n_restarts} of at most {self._max_restarts}."
        if self._env_proxy is not None and (methods := sorted(self._env_proxy.methods)):
            message += f" If calls of env_method changed its environments, repeat them ({', '.join(methods)}), or use"
            message += " set_wrapper_attr, which reaches new workers too."
        warn(message)

    def _give_up(self, death: WorkerDiedError) -> None:
        """Go on without workers for which there is no place."""
        self._given_up.update(death.workers)
        if len(self._given_up) == self._n_workers:
            raise death
        self._done.update(death.workers)
        self._tickets.give_up(death.workers)
        warn(f"{death} Training continues with {counted(self._n_workers - len(self._given_up), 'worker')}.")

    @property
    def _may_begin_more(self) -> bool:
        """Whether a worker may be sent a ticket: if they don't stop at the goal themselves, not beyond it."""
        return self._workers.stops_at_goal or self._tickets.n_begun(self.hyperparams.n_steps) < self._total_steps

    def _stop_at_goal(self) -> None:
        """Tell workers that don't know it that there is no more to do."""
        if not self._workers.stops_at_goal and self._tickets.n_done >= self._total_steps:
            self._workers.request_stop()

    def _send_ticket(self, worker: int) -> None:
        """Let a worker begin one more rollout, with the learning rate for the progress at its end."""
        if not self._tickets.send(worker):
            return
        progress = self._tickets.n_begun(self.hyperparams.n_steps) / self._total_steps
        self._workers.send(worker, Ticket(self._learning_rate(max(0.0, 1 - progress)), self._normalize.pop(worker)))

    def _ask_envs(self, calls: Mapping[int, EnvCall]) -> dict[int, Any]:
        to_workers = {worker: call for worker, call in calls.items() if worker not in self._given_up}
        answers = self._workers.ask(to_workers, self._replace)
        # there are no environments of workers that were given up, but the user's own
        lost = calls.keys() & self._given_up
        return answers | {w: call_users_env(self._env, self._assignment.env_indices[w], calls[w]) for w in lost}
