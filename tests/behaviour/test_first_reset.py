"""Each environment is reset once before its first step, by the worker that steps it."""

import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_a3c import A3C
from tests.toy_envs import Countdown

N_STEPS = 5
SETUPS = pytest.mark.parametrize(
    ("vec_env", "n_workers"),
    [(DummyVecEnv, 0), (DummyVecEnv, 1), (DummyVecEnv, 2), (SubprocVecEnv, 0), (SubprocVecEnv, 2)],
)


class Scenarios(Countdown):
    """Episodes of one step in numbered scenarios; the infos have the number, and the seed that was set last."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(lengths=[1])
        self.scenario = first - 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.scenario += 1
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {**info, "scenario": self.scenario, "seed": self.np_random_seed}

    def observation(self) -> Any:
        return np.array([self.scenario], dtype=np.float32)


class Window(Countdown):
    """Opens in `reset` what can't be pickled."""

    window = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.window = threading.Lock()
        return super().reset(seed=seed)


class Played(BaseCallback):
    """Keeps the scenarios and seeds of each environment, and what there was before the first step."""

    def _on_training_start(self) -> None:
        self.at_start = self.model._last_obs
        self.scenarios: list[list[int]] = [[] for _ in range(self.training_env.num_envs)]
        self.seeds: list[list[int]] = [[] for _ in self.scenarios]

    def _on_step(self) -> bool:
        if self.n_calls == 1:
            self.first_obs = self.model._last_obs
        for row, info in enumerate(self.locals["infos"]):
            self.scenarios[info.get("env_index", row)].append(info["scenario"])
            self.seeds[info.get("env_index", row)].append(info["seed"])
        return True


def scenarios(vec_env: Any, n_envs: int = 2) -> VecEnv:
    env: VecEnv = vec_env([lambda i=i: Scenarios(100 * i) for i in range(n_envs)])
    return env


@SETUPS
def test_the_first_scenario_is_played(vec_env: Any, n_workers: int) -> None:
    env, played = scenarios(vec_env), Played()
    env.seed(7)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=n_workers, take_turns=True).learn(20, played)
    assert played.scenarios == [list(range(10)), list(range(100, 110))]
    assert [set(seeds) for seeds in played.seeds] == [{7}, {8}]
    assert played.at_start is None
    np.testing.assert_array_equal(played.first_obs, [[0], [100]])
    np.testing.assert_array_equal(model._last_obs, [[10], [110]])
    env.close()


def test_as_in_a2c() -> None:
    ours, theirs = Played(), Played()
    A3C("MlpPolicy", VecFrameStack(scenarios(DummyVecEnv), 2), n_steps=N_STEPS, n_workers=0).learn(20, ours)
    A2C("MlpPolicy", VecFrameStack(scenarios(DummyVecEnv), 2), n_steps=N_STEPS).learn(20, theirs)
    assert ours.scenarios == theirs.scenarios
    np.testing.assert_array_equal(ours.first_obs, theirs.first_obs)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_what_a_reset_opens_need_not_be_sent(n_workers: int) -> None:
    env = make_vec_env(Window, n_envs=2)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=n_workers)
    for reset_num_timesteps in (True, True, False):
        model.learn(20, reset_num_timesteps=reset_num_timesteps)
    assert env.get_attr("window") == [None, None]
    env.reset()
    with pytest.raises(ValueError, match="can't be sent"):
        model.learn(20)


@SETUPS
def test_each_call_of_learn_has_seeds_of_its_own(vec_env: Any, n_workers: int) -> None:
    env, seeds = scenarios(vec_env), []
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=n_workers, take_turns=True, seed=3)
    for reset_num_timesteps in (True, True, False):
        played = Played()
        model.learn(20, played, reset_num_timesteps=reset_num_timesteps)
        seeds += [set(each) for each in played.seeds]
    assert seeds[:2] == [{3}, {4}]  # those that SB3 derives from `seed`
    assert all(len(each) == 1 for each in seeds)
    assert len(set.union(*seeds)) == 6
    env.close()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_normalize_sees_each_observation_once(n_workers: int) -> None:
    env = VecNormalize(scenarios(DummyVecEnv), epsilon=1e-8)
    rms: Any = env.obs_rms
    rms.count = 0.0
    A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=n_workers, take_turns=True).learn(20)
    assert rms.count == 22
    seen = [*range(11), *range(100, 111)]
    np.testing.assert_allclose(rms.mean, [np.mean(seen)])
    np.testing.assert_allclose(rms.var, [np.var(seen)])


@pytest.mark.parametrize("n_workers", [0, 1])
def test_the_first_video_is_whole(n_workers: int, tmp_path: Path) -> None:
    class Recording(gym.wrappers.RecordVideo):
        def stop_recording(self) -> None:
            with (tmp_path / "lengths").open("a") as file:
                file.write(f"{len(self.recorded_frames)}\n")
            self.recording, self.recorded_frames = False, []

    class Filmed(Countdown):
        render_mode: Any = "rgb_array"
        metadata: Any = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

        def render(self) -> Any:
            return np.zeros((32, 32, 3), dtype=np.uint8)

    env = DummyVecEnv([lambda: Recording(Filmed(), str(tmp_path / "video"), episode_trigger=lambda _: True)])
    A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=n_workers).learn(30)
    env.close()
    lengths = (tmp_path / "lengths").read_text().split()
    assert lengths[:3] == ["11", "11", "11"]


def test_a_reset_of_the_users_own_is_put_back() -> None:
    env = scenarios(DummyVecEnv)
    env.reset = reset = lambda: type(env).reset(env)  # type: ignore[method-assign]
    A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=0).learn(10)
    assert env.reset is reset
