"""Measurements for the doctor: a few seconds of what a long run does."""

import contextlib
import copy
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_a3c.a3c import A3C
from sb3_a3c.actor_learner.loss import a3c_loss
from sb3_a3c.envs.observations import Obs, as_tensor
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.processes.machine import process_memory
from sb3_a3c.store.shared_memory import SharedMemoryStore

#: Pushes that are compared. A gradient that is never cleared shows at the second.
N_PUSHES = 3

_INFO_KEY = "sb3_a3c.doctor"


@dataclass(frozen=True)
class ShortRun:
    """What was measured during a short training."""

    n_workers: int  #: worker processes; 0 if this process trained
    n_steps: int
    n_updates: int
    start_seconds: float  #: from the call of ``learn`` to the first rollout
    seconds: float  #: since the processes were started
    n_threads: int  #: of torch; the maximum over the workers
    memory: list[int | None]  #: bytes of each worker


def make_env(env_id: str, n_envs: int) -> VecEnv:
    """What a user would train on; for a game of Atari, ``make_ale_vec_env``."""
    with contextlib.suppress(ImportError):
        import ale_py

        gym.register_envs(ale_py)
    spec = gym.registry.get(env_id)
    if spec is not None and spec.entry_point == "ale_py.env:AtariEnv":
        from sb3_a3c.atari import make_ale_vec_env

        return make_ale_vec_env(env_id, n_envs)
    return make_vec_env(env_id, n_envs)


def default_policy(observation_space: gym.Space[Any]) -> str:
    """Alias of the LSTM policy for these observations: of our policies, it needs the most memory."""
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputLstmPolicy"
    return "CnnLstmPolicy" if is_image_space(observation_space) else "MlpLstmPolicy"


def gradient_mismatch(policy: ActorCriticPolicy, obs: Obs) -> str | None:
    """
    Push gradients through a replica, apply the same to a reference copy with torch's optimizer alone, and compare. Return
    what differs, if only by a bit; None if nothing does. The policy is left as it is.
    """
    store = SharedMemoryStore(policy, n_workers=1)
    local, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    replica = store.replica(local, 0)
    for push in range(1, N_PUSHES + 1):
        _compute_gradient(local, obs)
        for parameter, expected in zip(local.parameters(), reference.parameters(), strict=True):
            expected.grad = None if parameter.grad is None else parameter.grad.clone()
        norm = th.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        if not (norm.isfinite() and norm > 0):
            return f"push {push}: the gradient's norm is {norm.item()}"
        replica.push()
        reference.optimizer.step()
        replica.pull()
        for (name, pulled), expected in zip(local.named_parameters(), reference.parameters(), strict=True):
            if not th.equal(pulled, expected):
                difference = (pulled - expected).detach().abs().max().item()
                return f"push {push}: {name} differs by up to {difference:.3g} from the result of torch's optimizer"
    return None


def _compute_gradient(policy: ActorCriticPolicy, obs: Obs) -> None:
    """Leave in the policy the gradient of A3C's loss over one step, as if each action had been worth 1."""
    n_envs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    actor, tensors, starts = as_recurrent(policy), as_tensor(obs), th.ones(1, n_envs, dtype=th.bool)
    state = actor.initial_state(n_envs)
    with th.no_grad():
        actions, _, _ = actor.act(tensors, state, starts[0])
    values, log_prob, entropy = actor.evaluate_actions(tensors, actions, state, starts)
    one = th.ones(1, n_envs, dtype=values.dtype)
    shaped_entropy = None if entropy is None else entropy.reshape(1, n_envs)
    terms = a3c_loss(values.reshape(1, n_envs), log_prob.reshape(1, n_envs), shaped_entropy, one, one, 0.01, 0.5)
    terms.loss.backward()  # type: ignore[no-untyped-call]


def train(model: A3C, timeout: float) -> ShortRun:
    """
    Learn until each environment has made one rollout.

    :param model: on a ``DummyVecEnv``
    :raises TimeoutError: if that takes more than ``timeout`` seconds; the workers were killed
    :raises Exception: as ``learn``; a worker that dies is not replaced
    """
    assert model.env is not None and isinstance(model.env.unwrapped, DummyVecEnv)
    base = model.env.unwrapped
    base.envs = [_Probe(env) for env in base.envs]
    model.max_worker_restarts = 0
    callback = _Measure(model.n_steps, base.num_envs, timeout)
    begin = time.monotonic()
    try:
        model.learn(10**9, callback=callback)
    except Exception as error:
        if callback.timed_out:
            late = int(callback.n_seen.argmin())
            raise TimeoutError(f"environment {late} made no rollout within {timeout:g} s") from error
        raise
    finally:
        callback.timer.cancel()
    return ShortRun(
        n_workers=len(callback.pids - {os.getpid()}),
        n_steps=model.num_timesteps,
        n_updates=model._n_updates,
        start_seconds=callback.first_step - begin,
        seconds=callback.seconds,
        n_threads=callback.n_threads,
        memory=callback.memory,
    )


class _Probe(gym.Wrapper[Any, Any, Any, Any]):
    """Adds to each step's info which process made the step, and how many threads torch has there."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, _INFO_KEY: (os.getpid(), th.get_num_threads())}


class _Measure(BaseCallback):
    """Reads what ``_Probe`` reports, and kills the workers after ``timeout`` seconds."""

    def __init__(self, n_steps: int, n_envs: int, timeout: float) -> None:
        super().__init__()
        self.n_steps = n_steps
        self.n_seen = np.zeros(n_envs, dtype=np.int64)  # transitions of each environment
        self.pids: set[int] = set()
        self.n_threads = 0
        self.memory: list[int | None] = []
        self.seconds = self.first_step = 0.0
        self.timed_out = False
        self.timer = threading.Timer(timeout, self._kill_workers)
        self.timer.daemon = True
        self._begin = 0.0
        self._processes: list[Any] = []

    def _on_rollout_start(self) -> None:
        if not self._begin:  # the workers have just been started
            self._begin = time.monotonic()
            self._processes = list(multiprocessing.active_children())
            self.timer.start()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            pid, n_threads = info[_INFO_KEY]
            self.pids.add(pid)
            self.n_threads = max(self.n_threads, n_threads)
            self.n_seen[info["env_index"]] += 1
        now = time.monotonic()
        self.first_step = self.first_step or now
        self.seconds = now - self._begin
        return bool(self.n_seen.min() < self.n_steps)

    def _on_training_end(self) -> None:
        self.memory = [process_memory(pid) for pid in sorted(self.pids)]

    def _kill_workers(self) -> None:
        """Called by the timer's thread. ``learn`` then raises a ``WorkerDiedError``."""
        self.timed_out = True
        for process in self._processes:
            with contextlib.suppress(ValueError, OSError):  # it has ended already
                process.kill()
