"""The algorithm class :class:`A3C`."""

import io
import threading
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.actor_learner.config import Hyperparams
from sb3_a3c.arguments import (
    check_arguments,
    check_device,
    check_names,
    check_observation_space,
    check_policy,
    check_rate,
    check_total_timesteps,
    check_workers,
    warn_of_small_clipping,
)
from sb3_a3c.envs.sharding import clone_env
from sb3_a3c.envs.wrapper_state import next_reset_skipped, pending_options, pending_seeds
from sb3_a3c.policies import CnnLstmPolicy, CnnPolicy, MlpLstmPolicy, MlpPolicy, MultiInputLstmPolicy, MultiInputPolicy
from sb3_a3c.policies.sampling import to_env_actions
from sb3_a3c.processes.signals import uninterrupted
from sb3_a3c.save_util import atomic_write, check_archive, complete_archive, old_policy_kwargs, saved_version
from sb3_a3c.store.finite import check_finite
from sb3_a3c.store.optimizer_state import check_optimizer, check_parameters, fixed_options
from sb3_a3c.version import __version__
from sb3_a3c.workers.assignment import Assignment
from sb3_a3c.workers.callback_locals import can_see_observations, install
from sb3_a3c.workers.collector import HogwildCollector, MakeWorkers
from sb3_a3c.workers.learning_rate import DefaultLearningRate, annealing
from sb3_a3c.workers.worker_processes import workers_here

SelfA3C = TypeVar("SelfA3C", bound="A3C")
_hyperparam_values = attrgetter(*(field.name for field in fields(Hyperparams)[:-1]))  # without ``trainable``


class A3C(OnPolicyAlgorithm):
    """
    Asynchronous Advantage Actor-Critic (A3C)

    Paper: https://arxiv.org/abs/1602.01783 (Algorithm S3). The network for images and most hyper-parameters are those of
    baby-a3c, https://github.com/greydanus/baby-a3c.

    Worker processes act in their own environments and push gradients to shared parameters without waiting for each
    other. A timestep is one action in one environment (with frame skip: several emulator frames).

    :param policy: The policy model to use (MlpLstmPolicy, CnnLstmPolicy, MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str). ``n_workers=k`` makes k copies of a
        single environment or id
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0) over the
        timesteps of all workers. None: 5e-4 * min(1, 4 / n), if one rollout of every worker makes n updates in all
    :param n_steps: The number of steps in each environment per rollout (t_max in the paper)
    :param gamma: Discount factor
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator.
        Equivalent to the paper's n-step advantage when set to 1.
    :param ent_coef: Entropy coefficient for the loss calculation (β in the paper)
    :param vf_coef: Value function coefficient for the loss calculation, which uses *half* the squared error
    :param max_grad_norm: The maximum value for the gradient clipping. The loss is a sum over time, not a mean as in A2C, so
        gradients are larger
    :param rms_prop_eps: RMSProp epsilon. It stabilizes square root computation in denominator of RMSProp update
    :param use_rms_prop: Whether to use shared RMSprop as in the paper, or shared Adam (default) as in baby-a3c
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Must be None, A3C has no rollout buffer
    :param rollout_buffer_kwargs: Must be None
    :param normalize_advantage: Whether to normalize the advantage (over each chunk of ``envs_per_update`` environments)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: "cpu" or "auto", which is also the CPU
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param n_workers: Number of worker processes; the environments are divided evenly among them. None: one for each core
        that this process may use (affinity and CPU quota, rounded down), at most one for each environment. 0: train in this
        process, for debugging
    :param envs_per_update: Number of environments in each chunk of a rollout; every chunk makes one update of the shared
        parameters. Small chunks make more updates, large chunks take less time per step
    :param anneal: Whether the learning rate falls to 0, linearly over the last quarter of the timesteps of ``learn`` (in the
        paper over all of them). At a constant rate, a good policy may be lost again
    :param take_turns: Whether workers pull, act and push one after another, in a fixed order. This is slow, but makes runs
        with the same seed and several workers identical to the bit (without ``VecNormalize``, whose statistics arrive at
        other workers at no fixed time)
    :param start_method: "forkserver" or "spawn", see ``multiprocessing``. None: "forkserver" where the platform has it
    :param max_worker_restarts: Number of workers that may be replaced in one call of ``learn`` because they were killed
        (out of memory, a crash in C code) or hang. Workers of a ``SubprocVecEnv`` can't be replaced
    :param worker_timeout: Seconds that a worker may take for one step of its environments, or for learning from a rollout,
        before it is killed and replaced. None: no limit
    :param cluster: Train on the hosts of a Ray cluster: "auto" for the cluster of this machine, "host:port", or a dictionary
        with ``address`` and, if hosts need your own modules, Ray's ``runtime_env``. With ``n_workers=None`` there is one
        worker for each free CPU of the cluster. None: train on this machine. The argument is not saved with the model. See
        "Several hosts" in the documentation
    :param others: Must be empty. Arguments of other algorithms raise an error that says what to use instead
    :raises ValueError: for bad arguments, before any worker process starts
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule | None = None,
        n_steps: int = 20,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.003,
        vf_coef: float = 0.5,
        max_grad_norm: float = 40.0,
        rms_prop_eps: float = 1e-5,
        use_rms_prop: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        n_workers: int | None = None,
        envs_per_update: int = 4,
        anneal: bool = False,
        take_turns: bool = False,
        start_method: str | None = None,
        max_worker_restarts: int = 10,
        worker_timeout: float | None = 300.0,
        cluster: str | dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        check_policy(policy, self.policy_aliases)
        check_names(others, self.policy_aliases[policy] if isinstance(policy, str) else policy, policy_kwargs)
        check_arguments(locals())
        warn_of_small_clipping(max_grad_norm, n_steps)
        self.rms_prop_eps = rms_prop_eps
        self.use_rms_prop = use_rms_prop
        self.normalize_advantage = normalize_advantage
        self.n_workers = n_workers
        self.envs_per_update = envs_per_update
        self.anneal = anneal
        self.take_turns = take_turns
        self.start_method = start_method
        self.max_worker_restarts = max_worker_restarts
        self.worker_timeout = worker_timeout
        self.cluster = cluster
        self._collector: HogwildCollector | None = None
        self._parameters: list[th.nn.Parameter] = []  # of the policy, while workers run
        self._optimizer: th.optim.Optimizer | None = None  # likewise
        self._optimizer_options: list[dict[str, Any]] = []  # likewise
        self._pending_resets: tuple[list[int | None], list[dict[str, Any]]] = [], []  # seeds and options of the environments
        self._n_updates_at_start = 0
        super().__init__(
            policy,
            _make_env(env, n_workers, verbose),
            learning_rate=learning_rate,  # type: ignore[arg-type]  # None is for `_setup_lr_schedule` below
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=check_device(device, verbose),
            seed=None if seed is None else int(seed),
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        if _init_setup_model:
            self._setup_model()
            if self.env is not None:  # `load` does without: predictions need no workers
                check_workers(self.env, self.n_workers, self.cluster)

    def _setup_model(self) -> None:
        check_arguments(vars(self))  # in a loaded model they may differ from the constructor's
        check_observation_space(getattr(self, "observation_space", None), self.policy_class)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        kwargs = {**self.policy_kwargs}
        if "optimizer_class" not in kwargs:
            kwargs["optimizer_class"] = th.optim.RMSprop if self.use_rms_prop else th.optim.Adam
            options = kwargs.get("optimizer_kwargs") or {}
            defaults: dict[str, Any]
            if self.use_rms_prop:
                defaults = dict(alpha=0.99, eps=self.rms_prop_eps, weight_decay=0)
            else:
                defaults = {} if {"foreach", "differentiable"} & options.keys() else dict(fused=True)
                if issubclass(self.policy_class, CnnLstmPolicy):
                    # averages squared gradients over 100 updates, as the paper's RMSprop does, and not over 1,000
                    defaults["betas"] = (0.9, 0.99)
            kwargs["optimizer_kwargs"] = {**defaults, **options}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **kwargs
        )
        self.policy = self.policy.to(self.device)
        self.rollout_buffer = None  # type: ignore[assignment]
        check_optimizer(self.policy.optimizer)

    def _setup_lr_schedule(self) -> None:
        if self.learning_rate is None:
            self.lr_schedule = DefaultLearningRate()
            return
        if not callable(self.learning_rate):
            self.learning_rate = float(self.learning_rate)  # SB3 does not take numpy's float32
        super()._setup_lr_schedule()

    def _rate_at(self, progress_remaining: float) -> float:
        rate = check_rate("lr_schedule", self.lr_schedule, progress_remaining)
        return rate * annealing(progress_remaining) if self.anneal else rate

    def _hyperparams(self) -> Hyperparams:
        # to look for the parameters in all modules at each step would take longer than the rest of it
        parameters = self._parameters or list(self.policy.parameters())
        return Hyperparams(*(*_hyperparam_values(self), tuple([p.requires_grad for p in parameters])))

    def learn(
        self: SelfA3C,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str = "A3C",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfA3C:
        """
        Return a trained model. Each call starts new episodes. Also after an exception or Ctrl-C, the model has what was
        learned until then.

        :param total_timesteps: The total number of timesteps (agent steps, over all workers). It is exceeded by
            at most one rollout per worker. Infinity: until a callback returns False
        :param callback: callback(s) called once every ``n_envs`` timesteps with state of the algorithm
        :param log_interval: number of iterations (of ``n_steps * n_envs`` timesteps) before logging
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        :raises ValueError: before any worker process starts, if the model has no environment or an argument was changed to
            a bad value; or if a callback does so
        :raises RuntimeError: if called by a callback of the same model
        :raises WorkerDiedError: if a worker process died and could not be replaced
        :raises Exception: what an environment or the policy raised in a worker
        """
        if self._collector is not None:
            raise RuntimeError("This model is already learning. A callback ends a call of `learn` by returning False.")
        total_timesteps = check_total_timesteps(total_timesteps)
        try:
            return super().learn(
                total_timesteps,  # type: ignore[arg-type]  # an int, or infinity
                callback,
                log_interval,
                tb_log_name,
                reset_num_timesteps,
                progress_bar,
            )
        finally:
            try:
                self._stop_workers()
            finally:
                self._stop_workers()  # where a second Ctrl-C came before the first call could defer it

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError(
                "The model has no environment to learn from: call `set_env(env)` or `load(path, env=env)` first."
            )
        check_arguments(vars(self))
        check_workers(self.env, self.n_workers, self.cluster)
        self._base_seed = int(np.random.randint(2**31))
        self._pending_resets = pending_seeds(self.env), pending_options(self.env)
        self._last_obs = None  # so that SB3 resets, or would: workers reset their environments themselves, once
        with next_reset_skipped(self.env):
            result = super()._setup_learn(*args, **kwargs)
        self._last_original_obs = None
        self.env.unwrapped._reset_seeds()  # used up
        self.env.unwrapped._reset_options()
        return result

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # the last rollouts overshoot the goal: schedules end at 0, for the workers and for the logger
        self._current_progress_remaining = max(0.0, self._current_progress_remaining)

    def _start_workers(self, env: VecEnv, callback: BaseCallback) -> HogwildCollector:
        check_arguments(vars(self))  # a callback may have changed them at the start of training
        self._n_updates_at_start = self._n_updates
        self._parameters, self._optimizer = list(self.policy.parameters()), self.policy.optimizer
        self._optimizer_options = fixed_options(self.policy.optimizer)
        if self.cluster is None:
            make_workers = partial(workers_here, start_method=self.start_method, timeout=self.worker_timeout)
            return self._collect_from(make_workers, env, callback, self.n_workers)
        from sb3_a3c.cluster.cluster_workers import ClusterWorkers, engine_of  # only here: few need it

        workers = ClusterWorkers(engine_of(self.cluster), self.start_method, self.worker_timeout)
        try:
            n_workers = workers.n_workers(self.n_workers, env.num_envs)
            return self._collect_from(workers.assign, env, callback, n_workers, workers.place)
        except BaseException:
            workers.stop(threading.Event())
            raise

    def _collect_from(
        self,
        make_workers: MakeWorkers,
        env: VecEnv,
        callback: BaseCallback,
        n_workers: int | None,
        place: str | None = None,
    ) -> HogwildCollector:
        """Assign environments and seeds to workers, and start these; ``place`` says on which hosts they run."""
        assignment = Assignment(
            env,
            self.policy,
            self._hyperparams(),
            n_workers,
            self._base_seed,
            *self._pending_resets,
            report_obs=can_see_observations(callback),
            on_other_hosts=place is not None,
        )
        told = [assignment.summary(place)]
        if isinstance(self.lr_schedule, DefaultLearningRate):
            self.lr_schedule.n_updates = assignment.n_simultaneous_updates
            if (line := self.lr_schedule.summary()) is not None:
                told.append(line)
        if self.seed is not None and assignment.n_workers > 1 and not self.take_turns:
            told.append(
                f"With several workers, two runs with seed={self.seed} differ. "
                "Those with n_workers=1, or take_turns=True and no VecNormalize, are identical."
            )
        if self.verbose >= 1:
            print("\n".join(told), flush=True)
        return HogwildCollector(
            assignment,
            self.policy,
            steps_before=self.num_timesteps,
            total_steps=self._total_timesteps,
            learning_rate=self._rate_at,
            make_workers=make_workers,
            max_restarts=self.max_worker_restarts,
        )

    def _stop_workers(self) -> None:
        """End all worker processes and copy parameters and optimizer state into the model."""
        if self._collector is None or self._collector.is_forked:  # only the process that began may stop them
            return
        with uninterrupted() as hurry:  # set by a second Ctrl-C
            collector, self._collector = self._collector, None
            try:
                collector.stop(hurry)
            finally:
                try:
                    self._take_over(collector)
                    collector.store.fetch_optimizer(self.policy)  # the workers have synchronized it when they stopped
                finally:
                    self._parameters, self._optimizer = [], None
                    collector.store.close()

    def _take_over(self, collector: HogwildCollector) -> None:
        """Count the transitions that no callback has seen (the remainder, or those after False), and fetch the policy."""
        with uninterrupted():
            infos, dones = collector.take_leftovers()
            self.num_timesteps += len(infos)
        self._update_info_buffer(infos, dones)
        self._fetch(collector)

    def _fetch(self, collector: HogwildCollector) -> None:
        """Copy the shared parameters and the number of updates into the model."""
        now, at_start = [self.policy.optimizer, *self.policy.parameters()], [self._optimizer, *self._parameters]
        if any(new is not old for new, old in zip_longest(now, at_start)):
            raise ValueError(
                "Parameters, layers or the optimizer of the policy were replaced while workers run, which use the old. "
                "Replace them between two calls of `learn`; new values for the old ones: `model.set_parameters`."
            )
        collector.store.fetch_policy(self.policy)
        if self.use_sde:
            self.policy.reset_noise(self.n_envs)
        self._n_updates = self._n_updates_at_start + collector.store.n_updates

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Pass the workers' transitions to the callback, until each environment has made ``n_rollout_steps`` steps on average.
        The workers learn meanwhile; the last call in ``learn`` waits for their last rollouts. ``rollout_buffer`` is unused.

        Callbacks find A2C's locals: ``rewards``, ``dones``, ``infos``, ``actions``, ``clipped_actions``, ``values``,
        ``obs_tensor``, ``new_obs``, ``n_steps``, … Row i of each belongs to the same transition, ``infos[i]["env_index"]``
        says of which environment. ``log_probs`` and ``rollout_buffer`` do not exist.

        :return: False if callback terminated the training prematurely.
        """
        del rollout_buffer  # None, and not to be found among the callbacks' locals
        if self._collector is None:
            install(callback)
            with uninterrupted():  # once workers run, `learn` must be able to stop them
                self._collector = self._start_workers(env, callback)
        callback.on_rollout_start()
        n_steps, is_over = 0, False
        while n_steps < n_rollout_steps or self.num_timesteps >= self._total_timesteps:
            is_over = not self._collector.wait_for_step()
            if is_over:
                self._take_over(self._collector)
                break
            with uninterrupted():  # a step that was taken is counted
                step = self._collector.take_step()
                self.num_timesteps += env.num_envs
            self._last_obs = step.obs  # before the step, as in A2C; None if no callback can see it
            rewards, dones, infos, actions = step.rewards, step.dones, step.infos, step.actions
            clipped_actions = to_env_actions(self.policy, actions)
            values = th.as_tensor(step.values)[:, None]  # (n_envs,) -> (n_envs, 1), as in A2C
            if step.obs is not None:
                obs_tensor, new_obs = obs_as_tensor(step.obs, self.device), step.new_obs
            callback.update_locals(locals())
            should_continue = callback.on_step()
            self._last_obs, self._last_episode_starts = step.new_obs, dones
            self._update_info_buffer(infos, dones)
            if not should_continue:
                self._collector.drain()
                self._take_over(self._collector)
                return False
            self._update_workers()
            n_steps += 1
        callback.update_locals(locals())
        callback.on_rollout_end()
        # with fewer timesteps, because a report was lost, False ends SB3's loop
        return not is_over or self.num_timesteps >= self._total_timesteps

    def _update_workers(self) -> None:
        """Send hyper-parameters that a callback has changed to the workers."""
        assert self._collector is not None
        hyperparams = self._hyperparams()
        if hyperparams != self._collector.hyperparams:
            check_arguments(vars(self))
            if hyperparams.take_turns != self._collector.hyperparams.take_turns:
                raise ValueError("`take_turns` can't be changed while workers run: set it before `learn`.")
            if hyperparams.trainable != self._collector.hyperparams.trainable:
                check_parameters(self.policy)
                check_finite(self.policy)
        self._collector.update_hyperparams(hyperparams)

    def train(self) -> None:
        """
        Fetch what the workers have learned so far; they make the gradient steps.

        :raises RuntimeError: if no workers run
        """
        if self._collector is None:
            raise RuntimeError(
                "`train` fetches what workers have learned, and no workers run. Call `learn`, which calls it."
            )
        self._fetch(self._collector)
        if fixed_options(self.policy.optimizer) != self._optimizer_options:
            raise ValueError(
                "Options of the policy's optimizer were changed while workers run, which use the old. Change them between "
                "two calls of `learn`; the learning rate may be a schedule, also one that reads what a callback changes."
            )
        if self._collector.statistics.learning_rate is not None:
            update_learning_rate(self.policy.optimizer, self._collector.statistics.learning_rate)
        if (hint := self._collector.pop_hint()) and self.verbose >= 1:
            print(hint)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log. Values under ``train/`` are means over the time since the last log.

        :param iteration: Current logging iteration
        """
        if self._collector is not None:
            if self._collector.statistics.learning_rate is not None:
                self.logger.record("train/learning_rate", self._collector.statistics.learning_rate)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
            for key, value in self._collector.pop_figures().items():
                self.logger.record(key, value)
            if hasattr(self.policy, "log_std"):
                self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        super().dump_logs(iteration)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        As SB3's ``save``, but an existing file is replaced atomically: after a crash or a kill there is either the old file
        or the new one. If the environments have a ``VecNormalize``, it is saved in the same file, for
        :func:`sb3_a3c.resume.load_statistics`; a model that was loaded without ``env`` has none to save.
        """
        content = io.BytesIO()
        super().save(content, exclude, include)
        complete_archive(content, __version__, self.get_vec_normalize_env())
        if isinstance(path, str | Path):
            atomic_write(path, content.getbuffer())
        else:
            file = open_path(path, "w")  # checks that it can be written to
            file.write(content.getbuffer())
            file.flush()

    @classmethod
    def load(
        cls: type[SelfA3C],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfA3C:
        """
        As SB3's ``load``. Parts of the file are pickled, and unpickling can run any code: load only files that you trust.
        ``env`` is not wrapped: for a ``VecNormalize`` in the file, pass ``sb3_a3c.resume.load_statistics(path, env)``.

        :raises ValueError: if the file is damaged or was saved by another algorithm, or if an argument is bad
        """
        check_archive(path, own_argument="envs_per_update")
        if print_system_info:
            print(f"== sb3_a3c: {__version__}; the model was saved by {saved_version(path)} ==")
        if (policy_kwargs := old_policy_kwargs(path, custom_objects)) is not None:
            custom_objects = {**(custom_objects or {}), "policy_kwargs": policy_kwargs}
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As SB3's ``get_parameters``; while workers run, with the current state of the shared optimizer."""
        if self._collector is not None:
            self._collector.fetch_optimizer(self.policy)
        parameters: dict[str, dict[str, Any]] = super().get_parameters()
        return parameters

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        As SB3's ``set_parameters``. Running workers continue from these parameters; gradients that they are computing from
        older ones are still applied.

        :raises ValueError: while workers run, if a parameter is NaN or infinite
        """
        super().set_parameters(load_path_or_dict, exact_match, device)
        if self._collector is not None:
            check_finite(self.policy)
            self._collector.load_policy(self.policy)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        As SB3's ``set_env``.

        :raises RuntimeError: if called by a callback while workers learn in other environments
        """
        if self._collector is not None:
            raise RuntimeError("A3C's workers are learning in the environments they have. Call `set_env` after `learn`.")
        super().set_env(env, force_reset)

    def _excluded_save_params(self) -> list[str]:
        ours = ["cluster", "_collector", "_parameters", "_optimizer", "_optimizer_options", "_base_seed", "_pending_resets"]
        return [*super()._excluded_save_params(), *ours]


def _make_env(env: GymEnv | str, n_workers: int | None, verbose: int) -> GymEnv:
    """An id or a single environment stays one environment, unless an explicit number of workers makes copies of it."""
    if isinstance(env, type):
        raise ValueError(f"`env` must be an environment, or the id of one, not the class {env.__name__}.")
    n_envs = int(n_workers or 1)
    if isinstance(env, str):
        try:
            return make_vec_env(env, n_envs=n_envs) if n_envs > 1 else maybe_make_env(env, verbose)
        except (gym.error.Error, ImportError, ValueError) as error:
            raise ValueError(f"`env`: {env!r} can't be made: {type(error).__name__}: {error}") from error
    return env if env is None or isinstance(env, VecEnv) or n_envs == 1 else clone_env(env, n_envs)
