"""A few seconds of what a long run does: environments, workers, pushes and a training, each measured."""

import contextlib
import multiprocessing
import os
import pickle
import threading
import time
from dataclasses import dataclass
from typing import Any

import cloudpickle
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
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.machine import process_memory
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.workers.collector import PRELOAD

#: Pushes that are compared: a gradient that is never forgotten shows at the second.
N_PUSHES = 3
#: Each environment makes so many rollouts, after which its worker has all the memory that it needs. In slow environments
#: one must do, after so many seconds.
N_ROLLOUTS, ENOUGH_SECONDS = 3, 20.0

_PROBE = "sb3_a3c.doctor"


@dataclass(frozen=True)
class ShortRun:
    """What a short training was like."""

    n_workers: int  #: worker processes; 0 if it was done in this one
    n_steps: int
    n_updates: int
    seconds: float  #: from the moment when the workers run
    has_moved: bool  #: whether the weights changed
    n_threads: int  #: of torch in a worker; the most of them
    memory: list[int | None]  #: bytes of each worker


def make_env(env_id: str, n_envs: int) -> VecEnv:
    """
    :param env_id: of any environment that gymnasium knows, or of an Atari game
    :param n_envs: how many
    :return: what a user of this package would train on
    :raises Exception: if it can't be made
    """
    with contextlib.suppress(ImportError):
        import ale_py

        gym.register_envs(ale_py)
    spec = gym.registry.get(env_id)
    if spec is not None and spec.entry_point == "ale_py.env:AtariEnv":
        from sb3_a3c.atari import make_ale_vec_env

        return make_ale_vec_env(env_id, n_envs)
    return make_vec_env(env_id, n_envs)


def default_policy(observation_space: gym.Space[Any]) -> str:
    """
    :param observation_space: of the environment
    :return: alias of the LSTM policy for it, which needs the most memory
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputLstmPolicy"
    return "CnnLstmPolicy" if is_image_space(observation_space) else "MlpLstmPolicy"


def start_workers(n_workers: int, start_method: str | None, timeout: float) -> float:
    """
    Start processes as workers are started, and stop them again.

    :param n_workers: how many
    :param start_method: A3C's argument
    :param timeout: seconds that they may take to answer
    :return: seconds until all had answered
    :raises Exception: if one can't be started, ends or does not answer
    """
    begin = time.monotonic()
    supervisor = Supervisor(_say_hello, [()] * n_workers, start_method, PRELOAD)
    silent = set(range(n_workers))
    try:
        supervisor.start()
        while silent:
            received = supervisor.receive(max(0.0, begin + timeout - time.monotonic()))
            if not received:
                raise TimeoutError(f"{len(silent)} of {n_workers} have not answered within {timeout:g} s")
            silent -= {worker for worker, _ in received}
        return time.monotonic() - begin
    finally:
        supervisor.stop()


def _say_hello(channel: WorkerChannel) -> None:
    channel.send("hello")


def gradient_mismatch(policy: ActorCriticPolicy, obs: Obs) -> str | None:
    """
    Let a worker's end of a store pull, compute gradients and push, and do the same to private parameters with torch's
    optimizer alone.

    :param policy: is left as it is
    :param obs: (n_envs, …), to compute gradients from
    :return: what differs, by any bit; None if nothing does
    """
    store = SharedMemoryStore(policy, n_workers=1)
    own, private = _copied(policy), _copied(policy)
    replica = store.replica(own, 0)
    for push in range(1, N_PUSHES + 1):
        _compute_gradient(own, obs)
        for parameter, private_one in zip(own.parameters(), private.parameters(), strict=True):
            private_one.grad = None if parameter.grad is None else parameter.grad.clone()
        norm = th.nn.utils.get_total_norm([p.grad for p in private.parameters() if p.grad is not None])
        if not (norm.isfinite() and norm > 0):
            return f"push {push}: the gradient's norm is {norm.item()}"
        replica.push()
        private.optimizer.step()
        replica.pull()
        for (name, shared), expected in zip(own.named_parameters(), private.parameters(), strict=True):
            if not th.equal(shared, expected):
                difference = (shared - expected).detach().abs().max().item()
                return f"push {push}: {name} is off by up to {difference:.3g} from what torch's optimizer makes of it"
    return None


def _copied(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    """As it travels to a worker."""
    copied: ActorCriticPolicy = pickle.loads(cloudpickle.dumps(policy))
    return copied


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
    :param model: on a ``DummyVecEnv``; it learns a little
    :param timeout: seconds in which each environment must have made a rollout
    :return: what that was like
    :raises TimeoutError: if one has not; its worker was killed
    :raises Exception: as ``learn``
    """
    assert model.env is not None and isinstance(model.env.unwrapped, DummyVecEnv)
    base = model.env.unwrapped
    base.envs = [_Probe(env) for env in base.envs]
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    watch = _Watch(model.n_steps, base.num_envs, timeout)
    try:
        model.learn(10**9, callback=watch)
    except Exception as error:
        if watch.timed_out:
            raise TimeoutError(f"environment {int(watch.n_seen.argmin())} made no rollout within {timeout:g} s") from error
        raise
    finally:
        watch.stop_clock()
    return ShortRun(
        n_workers=len(watch.workers - {os.getpid()}),
        n_steps=model.num_timesteps,
        n_updates=model._n_updates,
        seconds=watch.seconds,
        has_moved=any(not th.equal(before[name], value) for name, value in model.policy.state_dict().items()),
        n_threads=watch.n_threads,
        memory=watch.memory,
    )


class _Probe(gym.Wrapper[Any, Any, Any, Any]):
    """Notes in each step's information which process made it, and how many threads torch has there."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, _PROBE: (os.getpid(), th.get_num_threads())}


class _Watch(BaseCallback):
    """Ends the training once enough is known of it, or workers that tell nothing."""

    def __init__(self, n_steps: int, n_envs: int, timeout: float) -> None:
        super().__init__()
        self.n_steps = n_steps
        self.n_seen = np.zeros(n_envs, dtype=np.int64)  # transitions of each environment
        self.workers: set[int] = set()  # process ids
        self.n_threads = 0
        self.memory: list[int | None] = []
        self.seconds = 0.0
        self.timed_out = False
        self._begin = 0.0
        self._processes: list[Any] = []
        self._clock = threading.Timer(timeout, self._kill_workers)
        self._clock.daemon = True

    def _on_rollout_start(self) -> None:
        if not self._begin:  # now the workers run
            self._begin = time.monotonic()
            self._processes = list(multiprocessing.active_children())
            self._clock.start()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            pid, n_threads = info[_PROBE]
            self.workers.add(pid)
            self.n_threads = max(self.n_threads, n_threads)
            self.n_seen[info["env_index"]] += 1
        self.seconds = time.monotonic() - self._begin
        n_rollouts = 1 if self.seconds > ENOUGH_SECONDS else N_ROLLOUTS
        return bool(self.n_seen.min() < n_rollouts * self.n_steps)

    def _on_training_end(self) -> None:
        self.memory = [process_memory(pid) for pid in sorted(self.workers)]

    def stop_clock(self) -> None:
        self._clock.cancel()

    def _kill_workers(self) -> None:
        """Of the clock's thread. What a hanging environment waits for, nobody knows; ``learn`` raises as for any death."""
        self.timed_out = True
        for process in self._processes:
            with contextlib.suppress(ValueError, OSError):  # it has ended already
                process.kill()
