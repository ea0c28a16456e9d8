"""
The Hogwild collector: the other half of ``A3C.collect_rollouts``.

It deals the environments out, runs the workers (processes under the supervisor, or one in this very process), hands
their reports to Stable-Baselines3 as steps of ``n_envs`` transitions, and tells the workers what callbacks changed.
"""

import dataclasses
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecVideoRecorder

from sb3_a3c.envs import (
    EnvShare,
    FirstReset,
    WrapperCounts,
    begin_episodes,
    continue_from,
    deal,
    finish_videos,
    split_env,
    wrappers,
)
from sb3_a3c.errors import WorkerDiedError
from sb3_a3c.hints import hint
from sb3_a3c.inprocess import InProcessWorker
from sb3_a3c.interrupts import EndOfProgram, uninterrupted
from sb3_a3c.normalization import News, merge_news, no_news, options
from sb3_a3c.redirect import Redirect
from sb3_a3c.reports import Obs, RolloutStatistics, Step, StepAssembler, TrainingStatistics
from sb3_a3c.service import Change, Close, Credit, Done, EnvCall, Farewell, Progress, run_worker
from sb3_a3c.shared import Counter, ParameterStore
from sb3_a3c.subproc import take_back
from sb3_a3c.supervisor import Supervisor
from sb3_a3c.task import Settings, WorkerTask

#: So many rollouts of one worker may wait for the others' before they fill the others' rows; one more is on its way.
MAX_ROLLOUTS_WAITING = 3
#: Seconds within which workers that have been asked to stop must have told what they did last.
PATIENCE, LONG_PATIENCE = 2.0, 60.0
#: The same from a second Ctrl-C on, and seconds between two looks for one.
NO_PATIENCE, LOOK_SECONDS = 0.5, 0.1
#: Modules that a fork server imports once for all workers. torch's optimizers import torch._dynamo at their first step,
#: which takes seconds; cv2 and ale_py, slow to import too, are there for Atari.
PRELOAD = ("sb3_a3c.service", "stable_baselines3.common.vec_env", "torch._dynamo", "cv2", "ale_py")


class _Workers(Protocol):
    """Processes, or the one worker in this process."""

    @property
    def ended(self) -> set[int]: ...

    @property
    def finished(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> None: ...

    def take(self) -> list[tuple[int, Any]]: ...

    def send(self, index: int, message: Any) -> None: ...

    def ask(self, requests: Mapping[int, Any], on_death: Callable[[WorkerDiedError], None]) -> dict[int, Any]: ...

    def request_stop(self) -> None: ...

    def stop(self, impatience: Sequence[Any]) -> None: ...


class HogwildCollector:
    """
    Workers that learn on shared parameters, and what they report. They start at once and run until :meth:`stop`. Until
    then calls to ``env`` reach the workers' environments.

    :param policy: the policy to start from, optimizer included; it stays private to this process
    :param env: the user's environments
    :param first_obs: (n_envs, …), observations to show until the first reports come
    :param settings: the workers' hyper-parameters
    :param n_workers: number of processes; 0 for one worker in this process; None for one for each core, or for this process,
        with a warning, if the environments can't be sent to others
    :param seed: every seed of this training is derived from it
    :param env_seeds: seeds that the environments are to begin with; None where one is to be derived
    :param env_options: options that the environments are to begin with
    :param steps_before: transitions made in earlier calls of ``learn``
    :param total_steps: goal, ``steps_before`` included
    :param start_method: of the processes; None for the platform's best
    :param max_restarts: how many workers may be replaced after they died
    :param timeout: seconds that a worker may take for a step, or for learning; None for ever
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
        env_options: Sequence[dict[str, Any]],
        steps_before: int,
        total_steps: int,
        start_method: str | None = None,
        max_restarts: int = 0,
        timeout: float | None = None,
    ) -> None:
        n_envs = env.num_envs
        # one seed for each environment and each worker; the environments' do not depend on the number of workers
        derived = [int(n) for n in np.random.SeedSequence(seed).generate_state(2 * n_envs) >> 1]
        seeds = [new if old is None else old for new, old in zip(derived[:n_envs], env_seeds, strict=True)]
        first_reset = FirstReset(tuple(seeds), tuple(env_options))
        shares = _share_out(env, n_workers, first_reset)
        pickled_policy = cloudpickle.dumps(policy)
        tasks = [
            WorkerTask(
                index=index,
                seed=derived[n_envs + index],
                env_indices=indices,
                policy=pickled_policy,
                settings=settings,
                steps_before=steps_before,
                total_steps=total_steps,
            )
            for index, indices in enumerate(shares or [tuple(range(n_envs))])
        ]
        self.store = ParameterStore(policy, len(tasks), share_memory=bool(shares))
        self.statistics = TrainingStatistics()
        self._env = env
        self._env_indices = [task.env_indices for task in tasks]
        self._worker_of = {index: task.index for task in tasks for index in task.env_indices}
        self._assembler = StepAssembler(first_obs, n_envs, MAX_ROLLOUTS_WAITING)
        self.settings = settings
        self._normalization = options(env)
        self._news_for: list[News] = [no_news(env) for _ in tasks]  # not yet passed on
        self._statistics_of: list[deque[RolloutStatistics]] = [deque() for _ in tasks]  # not yet shown to the end
        self._n_reported = [0] * len(tasks)  # transitions
        self._done: set[int] = set()  # workers that make no more rollouts
        self._wrapper_counts: dict[int, WrapperCounts] = {}  # of workers that have said farewell
        self._tasks = tasks
        self._first_reset, self._seed = first_reset, seed
        self._max_restarts = max_restarts
        self.n_restarts = 0
        self._is_ending = False
        self._redirect: Redirect | None = None
        self._has_hinted = self._has_told_of_skipped = False
        self._n_threads = th.get_num_threads()
        self._workers: _Workers
        if shares:
            finish_videos(env)
            arguments = [self._arguments(task, share) for task, share in zip(tasks, shares.values(), strict=True)]
            self._workers = Supervisor(run_worker, arguments, start_method, PRELOAD, timeout)
            self._start_processes(self._workers)
        else:
            self._workers = InProcessWorker(tasks[0], begin_episodes(env, first_reset), self.store)
        self._end_of_program = EndOfProgram()

    def _start_processes(self, supervisor: Supervisor) -> None:
        try:
            supervisor.start()
        except BaseException:
            self._take_environments_back()  # those that have started may have begun to step them
            raise
        self._redirect = Redirect(self._env, self._call_envs)
        # the cores are the workers': a second thread here would wait for one of them, and the first for the second
        th.set_num_threads(max(1, min(self._n_threads, n_cores() - len(self._env_indices))))

    def _arguments(self, task: WorkerTask, share: EnvShare) -> tuple[Any, ...]:
        """Of a worker's process."""
        # with short rollouts, one worker's must be able to fill a whole step
        credit = MAX_ROLLOUTS_WAITING + 1 + self._env.num_envs // (task.settings.n_steps * len(task.env_indices))
        credit -= len(self._statistics_of[task.index])  # what its predecessor has reported and is not yet used up
        return self.store, share, max(0, credit), cloudpickle.dumps(task)

    def wait_for_step(self) -> bool:
        """
        :return: whether there is a next step; False when all workers have finished and all steps were taken
        :raises WorkerDiedError: if a worker died
        :raises Exception: what a worker raised
        """
        self._end_of_program.pass_or_stay()
        while not self._assembler.has_step(flush=self._all_done):
            if self._all_done:
                return False
            self._receive()
        return True

    def take_step(self) -> Step:
        """
        :return: the next step of all environments, which :meth:`wait_for_step` has promised
        """
        step = self._assembler.take_step()
        for env_index in self._assembler.take_used_up():
            worker = self._worker_of[env_index]
            if env_index == self._env_indices[worker][0]:  # its others' rollouts are used up with this one, or soon
                self.statistics.add(self._statistics_of[worker].popleft())
                self._give_credit(worker)
        return step

    def take_hint(self) -> str | None:
        """
        :return: what to tell a user whose settings waste the machine, as the figures since the last log show it; once
        """
        if self._has_hinted or self.settings.take_turns:  # with turns, one worker computes while the others wait
            return None
        found = hint(self.statistics.pool, len(self._env_indices), n_cores())
        self._has_hinted = found is not None
        return found

    def change(self, settings: Settings) -> None:
        """
        Let the workers go on with these hyper-parameters, and those of the user's ``VecNormalize``, from their next rollouts
        on. Does nothing if none has changed.

        :param settings: the hyper-parameters
        """
        normalization = options(self._env)
        if (settings, normalization) != (self.settings, self._normalization):
            self.settings, self._normalization = settings, normalization
            for worker in range(len(self._env_indices)):
                self._workers.send(worker, Change(settings, normalization))

    def drain(self) -> None:
        """Let the workers learn no more, and hear what they did last. Calls to the environments still reach them."""
        self._is_ending = True
        self._workers.request_stop()
        self._receive_the_last(lambda: self._all_done)

    def take_leftovers(self) -> tuple[list[dict[str, Any]], npt.NDArray[np.bool_]]:
        """
        :return: of the transitions that no step has shown the infos, and whether each ended an episode
        """
        for waiting in self._statistics_of:
            while waiting:
                self.statistics.add(waiting.popleft())
        return self._assembler.leftovers()

    def stop(self, impatience: Sequence[Any] = ()) -> None:
        """
        End the workers and free what was used for them; the store and the leftovers stay readable.

        :param impatience: there is something in it once the user is tired of waiting
        """
        self._is_ending = True
        if self._redirect is not None:
            self._redirect.remove()
            th.set_num_threads(self._n_threads)
            self._redirect = None  # it refers to this object: together they would keep the shared memory for a while
        try:
            self._workers.request_stop()
            for worker in range(len(self._env_indices)):
                self._workers.send(worker, Close())
            self._receive_the_last(lambda: self._workers.finished, impatience)
        finally:
            try:
                self._workers.stop(impatience)
            finally:
                self._end_of_program.cancel()
                self._take_environments_back(impatience)

    def _receive_the_last(self, is_over: Callable[[], bool], impatience: Sequence[Any] = ()) -> None:
        already_failing = sys.exc_info()[0] is not None  # `learn` is about to raise something
        deadline = time.monotonic() + self._patience()
        while not is_over() and (left := deadline - time.monotonic()) > 0:
            if impatience:
                deadline, impatience = min(deadline, time.monotonic() + NO_PATIENCE), ()
            try:
                self._receive(min(left, LOOK_SECONDS))
            except Exception as error:  # by now, nothing can be done about it
                if not already_failing:
                    warnings.warn(f"At the end of training a worker failed: {type(error).__name__}: {error}", stacklevel=2)

    def _patience(self) -> float:
        """
        Seconds that workers have for their last step. Those that save a video need more; and one that is stopped while the
        process of a ``SubprocVecEnv`` makes a step leaves it with an answer that nobody waits for.
        """
        records = any(isinstance(wrapper, VecVideoRecorder) for wrapper in wrappers(self._env))
        return LONG_PATIENCE if records or isinstance(self._env.unwrapped, SubprocVecEnv) else PATIENCE

    def _take_environments_back(self, impatience: Sequence[Any] = ()) -> None:
        continue_from(self._env, list(self._wrapper_counts.values()))
        base = self._env.unwrapped
        if not isinstance(base, SubprocVecEnv):
            return
        died = [index for index, worker in self._worker_of.items() if worker not in self._wrapper_counts]
        if isinstance(self._workers, InProcessWorker) and not base.waiting:  # else Ctrl-C has interrupted a step
            died = []
        if died:
            take_back(base, died, NO_PATIENCE if impatience else math.inf)

    @property
    def _all_done(self) -> bool:
        return len(self._done | self._workers.ended) == len(self._env_indices)

    def _receive(self, timeout: float | None = None) -> None:
        """Wait for what the workers have to say, and take it in."""
        try:
            self._workers.wait(timeout)
        except WorkerDiedError as death:
            self._replace(death)
        else:
            with uninterrupted():
                self._take_in_all()

    def _take_in_all(self) -> None:
        for worker, message in self._workers.take():
            self._take_in(worker, message)

    @uninterrupted()
    def _replace(self, death: WorkerDiedError) -> None:
        """
        Start a process in the place of a dead one: with the shared parameters, with new episodes, and with seeds of its own.
        The rollout that the dead one was in the middle of is lost, and not counted.
        """
        self._take_in_all()  # what it said last
        worker = death.worker
        if self.n_restarts == self._max_restarts > 0:
            death.add_note(f"{self.n_restarts} workers were replaced before: max_worker_restarts is used up.")
        if self._is_ending or isinstance(self._env.unwrapped, SubprocVecEnv) or self.n_restarts == self._max_restarts:
            raise death
        self.n_restarts += 1
        derived = np.random.SeedSequence([self._seed, self.n_restarts]).generate_state(self._env.num_envs + 1) >> 1
        seed, *seeds = (int(n) for n in derived)
        first_reset = dataclasses.replace(self._first_reset, seeds=tuple(seeds))
        (share,) = split_env(self._env, [self._env_indices[worker]], first_reset)
        task = dataclasses.replace(self._tasks[worker], seed=seed, settings=self.settings)
        self.store.counters[worker, Counter.RESERVED] = self._n_reported[worker]
        self._news_for[worker] = no_news(self._env)  # the user's statistics, which travel with the environments, have it all
        self._done.discard(worker)
        assert isinstance(self._workers, Supervisor)
        self._workers.replace(worker, self._arguments(task, share))
        warnings.warn(f"{death} It was replaced: restart {self.n_restarts} of at most {self._max_restarts}.", stacklevel=2)

    def _take_in(self, worker: int, message: Any) -> None:
        match message:
            case Progress(report, news):
                self._assembler.add(report)
                self._n_reported[worker] += report.rewards.size
                self._statistics_of[worker].append(report.statistics)
                self._spread(worker, news)
                self._tell_of_skipped(report.statistics)
            case Done():
                self._done.add(worker)
                for other in range(len(self._env_indices)):
                    self._give_credit(other)  # who waits for credit must find out too that there is no more to do
            case Farewell(news, counts):
                self._spread(worker, news)
                self._wrapper_counts[worker] = counts

    def _tell_of_skipped(self, statistics: RolloutStatistics) -> None:
        """Once in a training; `train/skipped_updates` goes on counting."""
        if statistics.skipped_updates > 0 and not self._has_told_of_skipped:
            self._has_told_of_skipped = True
            warnings.warn(
                f"An update was dropped, as {statistics.fault}. Further ones are counted in the log.", stacklevel=2
            )

    def _spread(self, worker: int, news: News) -> None:
        """What a worker's ``VecNormalize`` saw goes into the user's, and to the other workers with their next credit."""
        if not news:
            return
        merge_news(self._env, news)
        for other, waiting in enumerate(self._news_for):
            if other != worker:
                merge_news(waiting, news)

    def _give_credit(self, worker: int) -> None:
        self._workers.send(worker, Credit(self._news_for[worker]))
        self._news_for[worker] = no_news(self._env)

    def _call_envs(
        self, method: str, indices: Iterable[int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """``redirect.Call``"""
        if indices is None:
            calls = {w: EnvCall(method, None, args, kwargs) for w in range(len(self._env_indices))}
            answers = self._workers.ask(calls, self._replace)
            return [value for answer in answers.values() for value in (answer if isinstance(answer, list) else [answer])]
        indices = list(indices)
        n_envs = len(self._worker_of)
        wanted = [range(n_envs)[index] for index in indices]  # also negative ones; IndexError where there is none
        theirs = {self._worker_of[i]: [j for j in wanted if self._worker_of[j] == self._worker_of[i]] for i in wanted}
        calls = {
            worker: EnvCall(method, [index - self._env_indices[worker][0] for index in mine], args, kwargs)
            for worker, mine in theirs.items()
        }
        answers = self._workers.ask(calls, self._replace)
        values = {worker: iter(answer) for worker, answer in answers.items() if answer is not None}
        return [next(values[self._worker_of[index]]) for index in wanted if self._worker_of[index] in values]


def _share_out(env: VecEnv, n_workers: int | None, first_reset: FirstReset) -> dict[tuple[int, ...], EnvShare]:
    """For each worker process the indices of its environments, and the environments; none to train in this process."""
    if n_workers == 0:
        return {}
    indices = deal(env.num_envs, min(n_cores(), env.num_envs) if n_workers is None else n_workers)
    try:
        if multiprocessing.current_process().daemon:
            raise ValueError("This process is a daemon, which may not start processes of its own. Use n_workers=0.")
        return dict(zip(indices, split_env(env, indices, first_reset), strict=True))
    except ValueError as error:
        if n_workers is not None:
            raise
        warnings.warn(f"A3C trains in this process, as with n_workers=0. {error}", stacklevel=2)
        return {}


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
