"""A3C as its user sees it: counts, errors, and what a call of ``learn`` leaves behind."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_a3c import A3C, RemoteTraceback, WorkerDiedError
from tests.toy_envs import Images

BOTH = pytest.mark.parametrize("n_workers", [0, 2])


def cartpole(n_envs: int = 4, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, **kwargs)


def children_of(parents: set[int]) -> set[int]:
    """Running processes whose parent is one of these. (A process may end while its entry is read.)"""
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _parent(path) in parents}


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def children() -> set[int]:
    """Running child processes, including the fork server and the resource tracker, which stay."""
    return children_of({os.getpid()})


def workers() -> set[int]:
    """Worker processes: children of the fork server."""
    return children_of(children())


class Recorder(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []
        self.episodes: list[tuple[int, float]] = []
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.timesteps.append(self.num_timesteps)
        self.seen.append({k: self.locals[k] for k in ("rewards", "dones", "infos", "actions", "new_obs", "n_steps")})
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            assert done == ("episode" in info)
            if done:
                self.episodes.append((info["env_index"], info["episode"]["r"]))
        return True


# --- counts -----------------------------------------------------------------------------------------------------------


@BOTH
def test_timesteps_calls_and_episodes_are_exact(n_workers: int, tmp_path: Path) -> None:
    env = cartpole(5, monitor_dir=str(tmp_path))
    model = A3C("MlpPolicy", env, n_steps=16, n_workers=n_workers, seed=0)
    recorder = Recorder()
    model.learn(1000, callback=recorder)
    # no rollout starts once 1000 timesteps are reserved: 13 rollouts of 5 x 16 in this process, of shares otherwise
    assert 1000 <= model.num_timesteps < 1000 + 5 * 16
    if n_workers == 0:
        assert model.num_timesteps == 13 * 80
    assert recorder.timesteps == [5 * (call + 1) for call in range(model.num_timesteps // 5)]
    for step in recorder.seen:
        assert step["rewards"].shape == step["dones"].shape == step["actions"].shape == (5,)
        assert step["new_obs"].shape == (5, 4)
        assert len(step["infos"]) == 5
    episodes = load_results(str(tmp_path))
    n_unseen = len(episodes) - len(recorder.episodes)
    assert 0 <= n_unseen <= 4  # in the remainder, which makes no whole step
    assert sorted(r for _, r in recorder.episodes) == sorted(episodes["r"])[: len(recorder.episodes)] or n_unseen
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == min(100, len(episodes))
    assert episodes["l"].sum() <= model.num_timesteps

    before = model.num_timesteps
    model.learn(500, reset_num_timesteps=False)
    assert before + 500 <= model.num_timesteps < before + 500 + 5 * 16
    assert len(load_results(str(tmp_path))) > len(episodes)  # the files are continued
    env.close()


def test_single_environment_is_copied_only_on_request() -> None:
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=0)
    assert model.learn(1e2).num_timesteps == 100
    assert model.n_envs == 1
    assert A3C("MlpPolicy", "CartPole-v1").learn(40).n_envs == 1
    for env in ("CartPole-v1", gym.make("CartPole-v1")):
        cloned = A3C("MlpPolicy", env, n_workers=2, seed=3)
        recorder = Recorder()
        cloned.learn(400, callback=recorder)
        assert cloned.n_envs == 2
        first, second = (
            [s["new_obs"][i].tolist() for s in recorder.seen if s["n_steps"] % cloned.n_steps == cloned.n_steps - 1]
            for i in range(2)
        )
        assert first != second  # different seeds


def weights_of(model: Any) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def test_model_in_callbacks_is_private_and_follows_the_workers() -> None:
    weights: list[th.Tensor] = []

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            assert not any(p.is_shared() for p in self.model.policy.parameters())  # type: ignore[no-untyped-call]
            weights.append(weights_of(self.model))

        def _on_step(self) -> bool:
            return self.n_calls < 200

        def _on_training_end(self) -> None:
            weights.append(weights_of(self.model))

    model = A3C("MlpPolicy", cartpole(), n_workers=2).learn(100_000, callback=Watch())
    assert not th.equal(weights[0], weights[-2])
    assert th.equal(weights[-1], weights_of(model))  # complete when training ends by False


def test_evaluate_and_predict_as_with_recurrent_ppo() -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=2).learn(400)
    mean, _ = evaluate_policy(model, cartpole(3), n_eval_episodes=6)
    assert mean > 0  # type: ignore[operator]
    env = model.get_env()
    assert env is not None
    obs: Any = env.reset()
    state, starts = None, np.ones(4, dtype=bool)
    for _ in range(20):
        action, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        obs, _, starts, _ = env.step(action)
    assert state is not None
    assert state[0].shape == (1, 4, 64)


# --- what is left behind ----------------------------------------------------------------------------------------------


def outside() -> dict[str, Any]:
    return {
        "threads": th.get_num_threads(),
        "signal handlers": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)},
        "start method": multiprocessing.get_start_method(allow_none=True),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "children": children(),
        "workers": workers(),
        "python threads": threading.active_count(),
    }


@BOTH
def test_learn_leaves_everything_as_it_was(n_workers: int) -> None:
    A3C("MlpPolicy", cartpole(), n_workers=2).learn(100)  # starts the fork server, which stays
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers)
    th.set_num_threads(2)
    before = outside()
    for _ in range(2):
        model.learn(200)
        assert outside() == before
    th.set_num_threads(1)


def test_workers_of_a_second_learn_act_within_half_a_second() -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=2).learn(100)

    class First(BaseCallback):
        def _on_step(self) -> bool:
            self.is_complete = {info["env_index"] for info in self.locals["infos"]} == {0, 1, 2, 3}
            self.seconds = time.perf_counter() - began
            return not self.is_complete

    seconds = []
    for _ in range(3):
        first, began = First(), time.perf_counter()
        model.learn(400, callback=first)
        assert first.is_complete
        seconds.append(first.seconds)
    assert sorted(seconds)[1] <= 0.5, seconds  # the median


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Fragile(gym.Wrapper[Any, Any, Any, Any]):
    """Raises or kills its process at step 31."""

    def __init__(self, env: gym.Env[Any, Any], how: str) -> None:
        super().__init__(env)
        self.how, self.n_steps = how, 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if self.n_steps > 30:
            if self.how == "raise":
                raise FileNotFoundError("the level file is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def fragile_env(how: str) -> VecEnv:
    env = cartpole()
    assert isinstance(env, DummyVecEnv)
    env.envs[2] = Fragile(env.envs[2], how)
    return env


@BOTH
def test_exception_of_an_environment_is_raised_by_learn(n_workers: int) -> None:
    model = A3C("MlpPolicy", fragile_env("raise"), n_workers=n_workers)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="the level file is gone") as caught:
        model.learn(100_000)
    assert time.monotonic() - began < 5
    assert not workers()
    if n_workers > 0:
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "the level file is gone" in str(caught.value.__cause__)
        assert "test_a3c.py" in str(caught.value.__cause__)
    assert model._n_updates > 0


def test_killed_worker_without_restarts() -> None:
    model = A3C("MlpPolicy", fragile_env("kill"), n_workers=2, max_worker_restarts=0)
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        model.learn(100_000)
    assert time.monotonic() - began < 5
    assert not workers()
    assert all(th.isfinite(p).all() for p in model.policy.parameters())


def test_other_workers_count_when_one_fails() -> None:
    model = A3C("MlpPolicy", fragile_env("raise"), n_workers=2, n_steps=5)
    with pytest.raises(FileNotFoundError):
        model.learn(100_000)
    assert model.num_timesteps == model._n_updates * 5 * 2  # one update for each 5 steps of 2 environments


def test_every_learn_starts_different_episodes_after_a_seed_was_set() -> None:
    class Starts(BaseCallback):
        def _on_step(self) -> bool:
            first.append(self.locals["new_obs"].tolist())
            return False

    env = cartpole(2)
    model = A3C("MlpPolicy", env, n_workers=2, n_steps=1, seed=0).learn(2)
    model.set_random_seed(77)
    first: list[Any] = []
    for _ in range(3):
        model.learn(10, callback=Starts(), reset_num_timesteps=False)
    assert first[0] != first[1] != first[2] != first[0]


def test_defaults_are_those_of_baby_a3c_except_for_learning_rate_betas_and_entropy() -> None:
    of_adam: dict[str, tuple[float, tuple[float, float]]] = {}
    for policy, env in ("CnnLstmPolicy", Images()), ("MlpPolicy", "CartPole-v1"), ("MlpLstmPolicy", "CartPole-v1"):
        model = A3C(policy, env)
        (group,) = model.policy.optimizer.param_groups
        of_adam[policy] = group["eps"], group["betas"]
        assert (group["lr"], group["fused"]) == (5e-4, True)
    assert of_adam == {
        "CnnLstmPolicy": (1e-8, (0.9, 0.99)),
        "MlpPolicy": (1e-8, (0.9, 0.999)),
        "MlpLstmPolicy": (1e-3, (0.9, 0.999)),  # whose losses are in units of the values' scale
    }
    assert (model.n_steps, model.gamma, model.gae_lambda) == (20, 0.99, 1.0)
    assert (model.ent_coef, model.vf_coef, model.max_grad_norm) == (0.003, 0.5, 40.0)
    assert model.device == th.device("cpu")
    assert model.policy_kwargs == {}


def test_train_outside_learn() -> None:
    with pytest.raises(RuntimeError, match=r"no workers run\. Call `learn`"):
        A3C("MlpPolicy", "CartPole-v1").train()
