"""Atari environments as ``make_atari_env`` makes them, only faster: equal step for step, and of use wherever those are."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.envs.sharding import split_env
from sb3_a3c.envs.wrapper_state import FirstReset

PONG, BREAKOUT, INVADERS = (f"{game}NoFrameskip-v4" for game in ("Pong", "Breakout", "SpaceInvaders"))
SHORT_GAMES: dict[str, Any] = {"max_num_frames_per_episode": 100}


@pytest.fixture
def envs() -> Iterator[Callable[..., VecEnv]]:
    """Makes environments, and closes them."""
    made: list[VecEnv] = []

    def make(*args: Any, **kwargs: Any) -> VecEnv:
        made.append(make_ale_vec_env(*args, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


# --- equal to SB3's wrappers ---


@dataclass
class Comparison:
    """Of SB3's environments with ours; raises where anything but the pixels differs."""

    levels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))  #: pixels by difference
    rewards: float = 0.0  #: sum of their absolute values
    dones: int = 0
    truncations: int = 0
    episodes: int = 0

    def play(self, sb3: VecEnv, ours: VecEnv, n_steps: int) -> None:
        assert sb3.observation_space == ours.observation_space
        assert sb3.action_space == ours.action_space
        self._compare_pixels(sb3.reset(), ours.reset())
        assert sb3.reset_infos == ours.reset_infos
        for actions in np.random.default_rng(0).integers(0, sb3.action_space.n, (n_steps, sb3.num_envs)):  # type: ignore[attr-defined]
            (obs, rewards, dones, infos), (our_obs, our_rewards, our_dones, our_infos) = (
                sb3.step(actions),
                ours.step(actions),
            )
            self._compare_pixels(obs, our_obs)
            np.testing.assert_array_equal(rewards, our_rewards)
            np.testing.assert_array_equal(dones, our_dones)
            assert (rewards.dtype, dones.dtype) == (our_rewards.dtype, our_dones.dtype)
            self.rewards += float(np.abs(rewards).sum())
            for info, our_info in zip(infos, our_infos, strict=True):
                self._compare_infos(info, our_info)
            assert sb3.reset_infos == ours.reset_infos

    def _compare_pixels(self, obs: Any, our_obs: Any) -> None:
        assert (obs.shape, obs.dtype) == (our_obs.shape, our_obs.dtype)
        self.levels += np.bincount(np.abs(obs.astype(int) - our_obs).ravel(), minlength=256)

    def _compare_infos(self, info: dict[str, Any], our_info: dict[str, Any]) -> None:
        assert {"lives", "TimeLimit.truncated"} <= info.keys()
        if "terminal_observation" in info:
            self.dones += 1
            self.truncations += info["TimeLimit.truncated"]
            self._compare_pixels(info.pop("terminal_observation"), our_info.pop("terminal_observation"))
        if "episode" in info:
            self.episodes += 1
            assert info["episode"].pop("t") > 0
            assert our_info["episode"].pop("t") > 0
        assert info == our_info


def compare(env_id: str, n_steps: int, n_envs: int = 1, **kwargs: Any) -> Comparison:
    comparison = Comparison()
    sb3, ours = make_atari_env(env_id, n_envs, seed=1, **kwargs), make_ale_vec_env(env_id, n_envs, seed=1, **kwargs)
    comparison.play(sb3, ours, n_steps)
    sb3.close()
    ours.close()
    assert comparison.levels[:4].sum() >= 0.99 * comparison.levels.sum()
    return comparison


def test_a_game_for_which_ale_has_wrong_grey_levels() -> None:
    comparison = compare("AirRaidNoFrameskip-v4", 100, wrapper_kwargs={"noop_max": 0})
    assert comparison.levels[0] == comparison.levels.sum() > 0


@pytest.mark.parametrize("env_id", [PONG, BREAKOUT, INVADERS])
def test_games_are_those_of_make_atari_env(env_id: str) -> None:
    comparison = compare(env_id, 1500, wrapper_kwargs={"noop_max": 0})
    assert comparison.rewards > 0
    assert comparison.dones >= comparison.episodes >= 1
    assert (comparison.dones > comparison.episodes) == (env_id != PONG)  # lives are lost, but in Pong there are none
    assert comparison.truncations == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {},  # also the number of no-ops is the same
        {"wrapper_kwargs": {"screen_size": 83}},  # has no divisor with the frames' 210 lines
        {"wrapper_kwargs": {"screen_size": 270}},  # larger than the frames
        {"wrapper_kwargs": {"terminal_on_life_loss": False, "clip_reward": False}},
        {"wrapper_kwargs": {"frame_skip": 1, "screen_size": 42}},
        {"wrapper_kwargs": {"frame_skip": 2, "action_repeat_probability": 0.25}},
        {"env_kwargs": {"mode": 8, "difficulty": 1, "full_action_space": True, "repeat_action_probability": 0.25}},
    ],
)
def test_arguments_mean_the_same(kwargs: dict[str, Any]) -> None:
    comparison = compare(BREAKOUT, 150, n_envs=2, **kwargs)
    assert comparison.dones > 0
    assert comparison.levels[1:].sum() == 0  # in this game even the pixels are equal


def test_an_id_with_a_frame_skip_of_its_own_means_the_same() -> None:
    compare("ALE/Pong-v5", 50, n_envs=2)


@pytest.mark.parametrize(("n_frames", "n_steps"), [(5, 20), (6, 20), (50, 60)])  # 5, 6: within the steps of a reset
def test_truncation_is_the_same(n_frames: int, n_steps: int) -> None:
    env_kwargs = {"max_num_frames_per_episode": n_frames}
    assert compare(BREAKOUT, n_steps, n_envs=2, wrapper_kwargs={"noop_max": 0}, env_kwargs=env_kwargs).truncations > 0


def test_a_time_limit_of_gymnasium_is_the_same() -> None:
    assert compare(BREAKOUT, 60, env_kwargs={"max_episode_steps": 75}).truncations > 0


def test_monitor_files_are_the_same(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"start_index": 3, "monitor_kwargs": {"info_keywords": ("lives",)}, "env_kwargs": SHORT_GAMES}
    for make in (make_atari_env, make_ale_vec_env):
        env = make(BREAKOUT, 2, seed=5, monitor_dir=str(tmp_path / make.__name__), **kwargs)
        env.reset()
        for _ in range(70):
            env.step(np.full(2, 3))
        env.close()
    sb3, ours = (load_results(str(tmp_path / make.__name__)) for make in (make_atari_env, make_ale_vec_env))
    assert len(ours) >= 4
    columns = ["l", "lives", "r"]
    assert sorted(map(tuple, sb3[columns].to_numpy())) == sorted(map(tuple, ours[columns].to_numpy()))
    text = (tmp_path / "make_ale_vec_env" / "4.monitor.csv").read_text()
    assert f'"env_id": "{BREAKOUT}"' in text


def test_seeds(envs: Callable[..., VecEnv]) -> None:
    env = envs(BREAKOUT, 3, seed=7, wrapper_kwargs={"terminal_on_life_loss": False})  # so that `reset` resets in mid-game

    def frames() -> list[int]:
        """:return: how many frames there were until the end of the first step, no-ops included"""
        env.reset()
        return [info["episode_frame_number"] for info in env.step(np.zeros(3, dtype=int))[3]]

    first = frames()
    assert len(set(first)) > 1
    assert frames() != first
    env.seed(7)
    assert frames() == first
    env.seed(8)
    assert frames()[:2] == first[1:]


# --- what can't be ---


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("PingNoFrameskip-v4", {}, "There is no environment 'PingNoFrameskip-v4': .*\"PongNoFrameskip-v4\""),
        ("PongNoFrameskip-v9", {}, "There is no environment 'PongNoFrameskip-v9'"),
        (make_atari_env, {}, "There is no environment <function make_atari_env"),
        ("CartPole-v1", {}, r"'CartPole-v1' is no Atari game of ALE. Use make_vec_env\('CartPole-v1', …\)"),
        (PONG, {"wrapper_kwargs": {"noops": 3}}, "'noops', which AtariWrapper does not know. Use noop_max, frame_skip, "),
        (PONG, {"wrapper_kwargs": {"frame_skip": 0}}, "`frame_skip` in `wrapper_kwargs` must be at least 1, not 0"),
        (PONG, {"wrapper_kwargs": {"noop_max": -1}}, "`noop_max` in `wrapper_kwargs` must be at least 0, not -1"),
        (PONG, {"env_kwargs": {"obs_type": "rgb"}}, "`env_kwargs` has 'obs_type', .* use make_atari_env"),
    ],
)
def test_errors(env_id: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ale_vec_env(env_id, **kwargs)


def test_only_this_module_needs_ale() -> None:
    program = "import sys; sys.modules['ale_py'] = None; import sb3_a3c; print('fine'); import sb3_a3c.atari"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "fine\n"
    assert "ImportError: sb3_a3c.atari needs packages" in result.stderr
    assert "pip install ale-py opencv-python-headless" in result.stderr


# --- with workers, wrappers, algorithms ---


def test_it_is_a_dummy_vec_env_of_monitored_environments(envs: Callable[..., VecEnv]) -> None:
    env = envs(PONG, 2)
    assert type(env) is DummyVecEnv
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(EpisodicLifeEnv) == [True, True]
    env.reset()
    images = env.get_images()
    assert [image.shape for image in images if image is not None] == [(210, 160, 3)] * 2


def test_a_share_plays_the_same_games_from_the_beginning(envs: Callable[..., VecEnv]) -> None:
    whole = envs(BREAKOUT, 3, seed=2)
    actions = np.random.default_rng(0).integers(0, 4, (60, 3))
    expected: list[Any] = [whole.reset(), *(whole.step(row)[0] for row in actions)]
    share = split_env(whole, [[1, 2]], FirstReset((2, 3, 4), ({},) * 3))[0].open()  # of games that are under way
    played: list[Any] = [share.reset(), *(share.step(row[1:])[0] for row in actions)]
    np.testing.assert_array_equal(np.stack(played), np.stack(expected)[:, 1:])
    share.close()


def test_processes(envs: Callable[..., VecEnv]) -> None:
    actions = np.random.default_rng(0).integers(0, 4, (20, 2))
    here, there = (envs(BREAKOUT, 2, seed=2, vec_env_cls=kind) for kind in (DummyVecEnv, SubprocVecEnv))
    np.testing.assert_array_equal(here.reset(), there.reset())
    for row in actions:
        np.testing.assert_array_equal(here.step(row)[0], there.step(row)[0])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a3c(n_workers: int, envs: Callable[..., VecEnv], tmp_path: Path) -> None:
    env = envs(BREAKOUT, 3, seed=0, monitor_dir=str(tmp_path), env_kwargs=SHORT_GAMES)
    stack = VecNormalize(VecFrameStack(VecTransposeImage(env), 2), norm_obs=False)
    eval_env = VecFrameStack(VecTransposeImage(envs(BREAKOUT, 2, env_kwargs=SHORT_GAMES)), 2)
    callback = EvalCallback(
        VecNormalize(eval_env, norm_obs=False, training=False), n_eval_episodes=2, eval_freq=50, verbose=0
    )
    model = A3C("CnnLstmPolicy", stack, n_workers=n_workers, seed=0).learn(300, callback)
    assert callback.last_mean_reward >= 0
    n_games = len(load_results(str(tmp_path)))
    assert n_games >= 3 * (300 // 3 // 30)
    model.save(tmp_path / "model.zip")
    loaded = A3C.load(tmp_path / "model.zip", stack)
    (returns, _) = evaluate_policy(loaded, eval_env, n_eval_episodes=2, return_episode_rewards=True)
    assert np.shape(returns) == (2,)
    stack.reset()  # the user's own environments are still there, and write to the files behind the workers' lines
    for _ in range(40):
        stack.step(np.zeros(3, dtype=int))
    assert len(load_results(str(tmp_path))) >= n_games + 3


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_other_algorithms(algorithm: type[BaseAlgorithm], envs: Callable[..., VecEnv]) -> None:
    kwargs: dict[str, Any] = {"n_steps": 8, "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}}}
    if algorithm is PPO:
        kwargs.update(batch_size=16, n_epochs=1)
    model = algorithm("CnnPolicy", envs(PONG, 2), **kwargs).learn(32)
    assert model.num_timesteps == 32


def test_vec_monitor_goes_on_top(envs: Callable[..., VecEnv]) -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):  # as with make_atari_env
        env = VecMonitor(envs(BREAKOUT, 1, env_kwargs=SHORT_GAMES))
    env.reset()
    lengths = [info["episode"]["l"] for _ in range(40) for info in env.step(np.zeros(1, dtype=int))[3] if "episode" in info]
    assert lengths  # in steps, where Monitor counts frames
    assert all(length <= 25 for length in lengths)


def test_video(envs: Callable[..., VecEnv], tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = VecVideoRecorder(envs(PONG, 2), str(tmp_path), lambda step: step == 0, video_length=5)
    env.reset()
    for _ in range(6):
        env.step(np.zeros(2, dtype=int))
    env.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]
