"""The algorithm as its user sees it: counts, callbacks, errors, saving, and what a call of ``learn`` leaves behind."""

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
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imports slowly: not inside a test with a time limit)

from sb3_a3c import A3C, RemoteTraceback, WorkerDiedError

BOTH = pytest.mark.parametrize("n_workers", [0, 2])


def cartpole(n_envs: int = 4, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs, **kwargs)


def children() -> set[int]:
    """Living child processes of this one, the fork server and the resource tracker (which stay) included."""
    path = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()}


def workers() -> set[int]:
    """Worker processes: children of the fork server."""
    return {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) in children()}


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


class Recorder(BaseCallback):
    """Notes what it sees; returns False at call number ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
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
        return self.n_calls != self.stop_at


# --- counts ---------------------------------------------------------------------------------------------------------


@BOTH
def test_timesteps_calls_and_episodes_are_exact(n_workers: int, tmp_path: Path) -> None:
    env = cartpole(5, monitor_dir=str(tmp_path))
    model = A3C("MlpPolicy", env, n_steps=16, n_workers=n_workers, seed=0)
    recorder = Recorder()
    model.learn(1000, callback=recorder)
    # workers stop beginning rollouts once 1000 are begun: 13 rollouts of 5 x 16 in this process, by shares otherwise
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
    assert 0 <= n_unseen <= 4  # only those in the remainder that makes no whole step
    assert sorted(r for _, r in recorder.episodes) == sorted(episodes["r"])[: len(recorder.episodes)] or n_unseen
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == min(100, len(episodes))
    assert episodes["l"].sum() <= model.num_timesteps

    before = model.num_timesteps
    model.learn(500, reset_num_timesteps=False)
    assert before + 500 <= model.num_timesteps < before + 500 + 5 * 16
    assert len(load_results(str(tmp_path))) > len(episodes)  # the files go on
    env.close()


@BOTH
def test_after_false_no_further_call_but_all_is_counted(n_workers: int) -> None:
    recorder = Recorder(stop_at=20)
    model = A3C("MlpPolicy", cartpole(), n_steps=16, n_workers=n_workers)
    model.learn(100_000, callback=recorder)
    assert recorder.n_calls == 20
    assert 80 <= model.num_timesteps < 10_000
    assert model._n_updates >= 2


def test_stop_training_on_max_episodes_stops_where_the_count_says() -> None:
    recorder = Recorder()
    A3C("MlpPolicy", cartpole(), n_workers=2).learn(100_000, [StopTrainingOnMaxEpisodes(5), recorder])
    n_last = sum(recorder.seen[-1]["dones"])
    assert len(recorder.episodes) - n_last < 5 * 4 <= len(recorder.episodes)


def test_learn_takes_floats_and_a_single_environment_is_cloned_only_on_request() -> None:
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
        assert first != second  # seeds of their own


# --- SB3's surroundings ---------------------------------------------------------------------------------------------


def test_log_keys_progress_bar_tensorboard_checkpoints_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=2, verbose=1, tensorboard_log=str(tmp_path / "tb"))
    scored: list[tuple[float, th.Tensor]] = []

    class Score(BaseCallback):
        def _on_step(self) -> bool:
            assert isinstance(self.parent, EvalCallback)
            weights = th.cat([p.detach().flatten() for p in self.model.policy.parameters()])
            scored.append((self.parent.last_mean_reward, weights))
            return True

    evaluation = EvalCallback(
        cartpole(1),
        callback_on_new_best=Score(),
        eval_freq=250,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    checkpoints = CheckpointCallback(save_freq=250, save_path=str(tmp_path / "checkpoints"))
    model.learn(4000, [checkpoints, evaluation], log_interval=10, progress_bar=True)

    output = capsys.readouterr().out
    for key in (
        "ep_len_mean",
        "ep_rew_mean",
        "fps",
        "iterations",
        "time_elapsed",
        "total_timesteps",
        "entropy_loss",
        "explained_variance",
        "learning_rate",
        "n_updates",
        "policy_loss",
        "value_loss",
        "grad_norm",
        "staleness",
        "skipped_updates",
        "acting",
        "stepping",
        "learning",
        "sharing",
    ):
        assert f"|    {key} " in output, key
    assert list((tmp_path / "tb" / "A3C_1").glob("events.*"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == sorted(f"rl_model_{n}_steps.zip" for n in (1000, 2000, 3000, 4000))
    # a checkpoint made while workers ran holds the optimizer's moments too
    checkpoint = A3C.load(tmp_path / "checkpoints" / "rl_model_2000_steps.zip")
    assert checkpoint.num_timesteps == 2000
    assert all(float(state["step"]) > 0 for state in checkpoint.policy.optimizer.state.values())
    # the best model is the one that was scored
    best = A3C.load(tmp_path / "best_model")
    assert th.equal(th.cat([p.detach().flatten() for p in best.policy.parameters()]), scored[-1][1])


def test_the_model_in_a_callback_is_private_and_follows_the_workers() -> None:
    weights: list[th.Tensor] = []

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            assert not any(p.is_shared() for p in self.model.policy.parameters())  # type: ignore[no-untyped-call]
            weights.append(th.cat([p.detach().flatten() for p in self.model.policy.parameters()]))

        def _on_step(self) -> bool:
            return True

    A3C("MlpPolicy", cartpole(), n_workers=2).learn(2000, callback=Watch())
    assert not th.equal(weights[0], weights[-1])


@BOTH
def test_evaluate_and_predict_work_as_with_recurrent_ppo(n_workers: int) -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers).learn(400)
    mean, _ = evaluate_policy(model, cartpole(3), n_eval_episodes=6)
    assert isinstance(mean, float)
    assert mean > 0
    env = model.get_env()
    assert env is not None
    obs: Any = env.reset()
    state, starts = None, np.ones(4, dtype=bool)
    for _ in range(20):
        action, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        obs, _, starts, _ = env.step(action)
    assert state is not None
    assert state[0].shape == (1, 4, 256)


# --- what is left behind --------------------------------------------------------------------------------------------


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
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers)
    A3C("MlpLstmPolicy", cartpole(), n_workers=2).learn(100)  # starts the fork server, which stays
    th.set_num_threads(2)
    before = outside()
    for _ in range(3):
        model.learn(400)
        assert outside() == before
    th.set_num_threads(1)
    assert model._last_obs is not None


def test_the_workers_of_a_second_learn_run_within_half_a_second() -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=2).learn(100)

    class First(BaseCallback):
        seconds = 0.0

        def _on_step(self) -> bool:
            if {info["env_index"] for info in self.locals["infos"]} == {0, 1, 2, 3} and not self.seconds:
                self.seconds = time.perf_counter() - began
            return True

    seconds = []
    for _ in range(3):
        first, began = First(), time.perf_counter()
        model.learn(400, callback=first)
        seconds.append(first.seconds)
    print(f"from the call of learn to a step of all environments: {sorted(seconds)[1]:.2f} s (median of 3)")
    assert sorted(seconds)[1] <= 0.5


@BOTH
def test_what_was_learned_survives_an_exception_in_a_callback(n_workers: int) -> None:
    def fail(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps >= 800:
            raise KeyboardInterrupt
        return True

    model = A3C("MlpLstmPolicy", cartpole(), n_workers=n_workers)
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(KeyboardInterrupt):
        model.learn(100_000, callback=fail)
    assert not workers()
    assert model.num_timesteps >= 800
    assert model._n_updates >= 5
    assert not any(th.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))
    model.learn(100, reset_num_timesteps=False)


# --- what goes wrong ------------------------------------------------------------------------------------------------


class Fragile(gym.Wrapper[Any, Any, Any, Any]):
    """After some steps: raises, or kills its process."""

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
def test_an_environments_exception_reaches_the_user(n_workers: int) -> None:
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


def test_a_killed_worker_ends_learn_within_five_seconds() -> None:
    model = A3C("MlpPolicy", fragile_env("kill"), n_workers=2, max_worker_restarts=0)
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match="Worker 1 was killed by SIGKILL"):
        model.learn(100_000)
    assert time.monotonic() - began < 5
    assert not workers()
    assert all(th.isfinite(p).all() for p in model.policy.parameters())


def test_what_the_others_did_counts_when_a_worker_fails() -> None:
    model = A3C("MlpPolicy", fragile_env("raise"), n_workers=2, n_steps=5)
    with pytest.raises(FileNotFoundError):
        model.learn(100_000)
    assert model.num_timesteps == model._n_updates * 5 * 2  # one update for each 5 steps of 2 environments


def test_every_learn_begins_other_episodes_also_after_a_seed_was_set() -> None:
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


def test_the_model_is_up_to_date_when_training_ends_by_false() -> None:
    class Last(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 200

        def _on_training_end(self) -> None:
            self.weights = [p.clone() for p in self.model.policy.parameters()]

    last = Last()
    model = A3C("MlpPolicy", cartpole(), n_workers=2).learn(100_000, callback=last)
    assert all(th.equal(p, q) for p, q in zip(last.weights, model.policy.parameters(), strict=True))


class OwnVecEnv(DummyVecEnv):
    """A class of the user's, of which nobody knows what it does"""


def test_a_vec_env_that_cannot_be_split_is_refused_for_a_number_of_workers() -> None:
    env = OwnVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    with pytest.raises(ValueError, match=r"can't deal the environments of a OwnVecEnv out.*n_workers=0"):
        A3C("MlpPolicy", env, n_workers=2)
    with pytest.warns(UserWarning, match="A3C trains in this process"):
        A3C("MlpPolicy", env).learn(40)


def test_too_many_workers_for_an_environment_set_later_are_refused() -> None:
    model = A3C("MlpPolicy", cartpole(2), n_workers=2)
    model.n_workers = 3
    with pytest.raises(ValueError, match="only 2 environments"):
        model.learn(100)


def test_learning_without_an_environment_says_what_to_do(tmp_path: Path) -> None:
    A3C("MlpPolicy", cartpole()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="set_env"):
        A3C.load(tmp_path / "model").learn(100)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rms_prop", [False, True])
def test_save_and_load_keep_parameters_moments_and_counts(use_rms_prop: bool, tmp_path: Path) -> None:
    model = A3C("MlpLstmPolicy", cartpole(), n_workers=2, use_rms_prop=use_rms_prop, learning_rate=3e-4).learn(400)
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=cartpole(2), n_workers=1)
    assert loaded.num_timesteps == model.num_timesteps
    assert loaded._n_updates == model._n_updates
    assert type(loaded.policy.optimizer) is (th.optim.RMSprop if use_rms_prop else th.optim.Adam)
    for p, q in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(p, q)
        state, loaded_state = model.policy.optimizer.state[p], loaded.policy.optimizer.state[q]
        assert state.keys() == loaded_state.keys()
        assert all(th.equal(state[key], loaded_state[key]) for key in state)
    assert loaded.learn(100, reset_num_timesteps=False).n_envs == 2


def test_defaults_are_baby_a3cs_but_for_the_learning_rate() -> None:
    model = A3C("MlpLstmPolicy", "CartPole-v1")
    group = model.policy.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (2e-4, (0.9, 0.999), 1e-8, True)
    assert (model.n_steps, model.gamma, model.gae_lambda) == (20, 0.99, 1.0)
    assert (model.ent_coef, model.vf_coef, model.max_grad_norm) == (0.01, 0.5, 40.0)
    assert model.device == th.device("cpu")
    assert model.policy_kwargs == {}
