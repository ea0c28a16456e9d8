"""``make_ale_vec_env`` against SB3's ``make_atari_env``: equal step for step, and usable wherever that is."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3 import A2C
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.envs.sharding import split_env
from sb3_a3c.envs.wrapper_state import FirstReset

PONG, BREAKOUT, INVADERS = (f"{game}NoFrameskip-v4" for game in ("Pong", "Breakout", "SpaceInvaders"))
SHORT_GAMES: dict[str, Any] = {"max_num_frames_per_episode": 100}


@pytest.fixture
def envs() -> Iterator[Callable[..., VecEnv]]:
    """``make_ale_vec_env``; closes the environments after the test."""
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
    """Steps SB3's environments and ours; raises if anything but the pixels differs. The attributes are counts."""

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
            obs, rewards, dones, infos = sb3.step(actions)
            our_obs, our_rewards, our_dones, our_infos = ours.step(actions)
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


def test_a_game_of_which_ale_reads_wrong_grey_levels() -> None:
    comparison = compare("AirRaidNoFrameskip-v4", 100, wrapper_kwargs={"noop_max": 0})
    assert comparison.levels[0] == comparison.levels.sum() > 0


@pytest.mark.parametrize("env_id", [PONG, BREAKOUT, INVADERS])
def test_games(env_id: str) -> None:
    comparison = compare(env_id, 1500, wrapper_kwargs={"noop_max": 0})
    assert comparison.rewards > 0
    assert comparison.dones >= comparison.episodes >= 1
    assert (comparison.dones > comparison.episodes) == (env_id != PONG)  # Pong has no lives to lose
    assert comparison.truncations == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {},  # with no-ops
        {"wrapper_kwargs": {"screen_size": 83}},  # has no common divisor with the 210 lines of a frame
        {"wrapper_kwargs": {"screen_size": 270}},  # larger than the frames
        {"wrapper_kwargs": {"terminal_on_life_loss": False, "clip_reward": False}},
        {"wrapper_kwargs": {"frame_skip": 1, "screen_size": 42}},
        {"wrapper_kwargs": {"frame_skip": 2, "action_repeat_probability": 0.25}},
        {"env_kwargs": {"mode": 8, "difficulty": 1, "full_action_space": True, "repeat_action_probability": 0.25}},
    ],
)
def test_arguments(kwargs: dict[str, Any]) -> None:
    comparison = compare(BREAKOUT, 150, n_envs=2, **kwargs)
    assert comparison.dones > 0
    assert comparison.levels[1:].sum() == 0  # in this game the pixels are equal, too


def test_an_id_with_its_own_frame_skip() -> None:
    compare("ALE/Pong-v5", 50, n_envs=2)


@pytest.mark.parametrize(("n_frames", "n_steps"), [(5, 20), (6, 20), (50, 60)])  # 5, 6: within the steps of a reset
def test_truncation(n_frames: int, n_steps: int) -> None:
    env_kwargs = {"max_num_frames_per_episode": n_frames}
    assert compare(BREAKOUT, n_steps, n_envs=2, wrapper_kwargs={"noop_max": 0}, env_kwargs=env_kwargs).truncations > 0


def test_time_limit_of_gymnasium() -> None:
    assert compare(BREAKOUT, 60, env_kwargs={"max_episode_steps": 75}).truncations > 0


def test_monitor_files(tmp_path: Path) -> None:
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
    env = envs(BREAKOUT, 3, seed=7, wrapper_kwargs={"terminal_on_life_loss": False})  # so `reset` resets during a game

    def frames() -> list[int]:
        """Number of frames until the end of the first step, no-ops included."""
        env.reset()
        return [info["episode_frame_number"] for info in env.step(np.zeros(3, dtype=int))[3]]

    first = frames()
    assert len(set(first)) > 1
    assert frames() != first
    env.seed(7)
    assert frames() == first
    env.seed(8)
    assert frames()[:2] == first[1:]


# --- errors ---


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


def test_only_this_module_imports_ale() -> None:
    program = "import sys; sys.modules['ale_py'] = None; import sb3_a3c; print('imported'); import sb3_a3c.atari"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "imported\n"
    assert "ImportError: sb3_a3c.atari needs packages" in result.stderr
    assert "pip install ale-py opencv-python-headless" in result.stderr


# --- with workers, wrappers, algorithms ---


def test_is_a_dummy_vec_env_with_monitors(envs: Callable[..., VecEnv]) -> None:
    env = envs(PONG, 2)
    assert type(env) is DummyVecEnv
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(EpisodicLifeEnv) == [True, True]
    env.reset()
    images = env.get_images()
    assert [image.shape for image in images if image is not None] == [(210, 160, 3)] * 2


def test_a_workers_share_plays_the_same_games(envs: Callable[..., VecEnv]) -> None:
    whole = envs(BREAKOUT, 3, seed=2)
    actions = np.random.default_rng(0).integers(0, 4, (60, 3))
    expected: list[Any] = [whole.reset(), *(whole.step(row)[0] for row in actions)]
    share = split_env(whole, [[1, 2]], FirstReset((2, 3, 4), ({},) * 3))[0].open()  # of games that have begun
    played: list[Any] = [share.reset(), *(share.step(row[1:])[0] for row in actions)]
    np.testing.assert_array_equal(np.stack(played), np.stack(expected)[:, 1:])
    share.close()


def test_subproc_vec_env(envs: Callable[..., VecEnv]) -> None:
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
    stack.reset()  # the user's environments still work, and append to the workers' monitor files
    for _ in range(40):
        stack.step(np.zeros(3, dtype=int))
    assert len(load_results(str(tmp_path))) >= n_games + 3


def test_a2c(envs: Callable[..., VecEnv]) -> None:
    policy_kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    assert A2C("CnnPolicy", envs(PONG, 2), n_steps=8, policy_kwargs=policy_kwargs).learn(32).num_timesteps == 32
