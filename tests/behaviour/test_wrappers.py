"""SB3's VecEnv wrappers and monitor files give the same numbers around the environments of workers."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_a3c import A3C, RemoteTraceback

IMAGE = spaces.Box(0, 255, (12, 10, 3), dtype=np.uint8)
DICT = spaces.Dict({"image": IMAGE, "clock": spaces.Box(0, np.inf, (2,))})


class Clock(gym.Env[Any, Any]):
    """
    Observes its number and the time in the episode. Episode k (from 0) of environment i lasts i + 2 steps and returns
    1000 * i + k.
    """

    def __init__(self, number: int, kind: str = "clock") -> None:
        self.observation_space = DICT if kind == "dict" else DICT[kind]
        self.action_space = spaces.Discrete(2)
        self.render_mode = "rgb_array"
        self.number, self.kind = number, kind
        self.episode, self.t, self.total = -1, 0, 0
        self.bad_step = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.total += 1
        reward = 1000.0 * self.number + self.episode if self.t == 1 else 0.0
        if self.total == self.bad_step:
            reward = float("nan")
        return self._observe(), reward, self.t >= self.number + 2, False, {"step": self.t}

    def render(self) -> Any:
        return np.full((32, 32, 3), 20 + 50 * self.number, dtype=np.uint8)

    def _observe(self) -> Any:
        clock = np.array([self.number, self.t], dtype=np.float32)
        image = np.full(IMAGE.shape, 40 * self.number + self.t, dtype=np.uint8)
        return {"clock": clock, "image": image} if self.kind == "dict" else clock if self.kind == "clock" else image


def clocks(vec_env: Any = DummyVecEnv, kind: str = "clock", folder: Path | None = None) -> VecEnv:
    def maker(i: int) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: Clock(i, kind) if folder is None else Monitor(Clock(i, kind), str(folder / str(i)))

    env: VecEnv = vec_env([maker(i) for i in range(4)])
    return env


class Recorder(BaseCallback):
    """
    Keeps each transition as (environment, reward, info). With ``n_steps``, and workers that take turns, it also keeps the
    observations at the ends of rollouts.
    """

    def __init__(self, n_steps: int | None = None) -> None:
        super().__init__()
        self.n_steps = n_steps
        self.rows: list[tuple[int, float, dict[str, Any]]] = []
        self.obs: list[Any] = []
        self.times: list[list[int]] = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        for reward, info in zip(self.locals["rewards"], infos, strict=True):
            self.rows.append((info["env_index"], float(reward), info))
        if self.n_steps and self.n_calls % self.n_steps == 0:
            assert [info["env_index"] for info in infos] == [0, 1, 2, 3]
            self.obs.append(self.locals["new_obs"])
            self.times.append([0 if done else info["step"] for done, info in zip(self.locals["dones"], infos, strict=True)])
        return True

    def returns(self, env: int) -> list[float]:
        """Return those of an environment's episodes, after checking that none is missing."""
        mine = [info for index, _, info in self.rows if index == env]
        returns = [float(info["episode"]["r"]) for info in mine if "episode" in info]
        assert returns == [returns[0] + k for k in range(len(returns))]
        assert all(1000 * env <= value < 1000 * env + 200 for value in returns)
        assert len(returns) == len(mine) // (env + 2)
        return returns


@pytest.fixture(params=["Dummy, 0", "Dummy, 2", "Subproc, 2"])
def setup(request: pytest.FixtureRequest) -> tuple[Any, int]:
    kind, n_workers = request.param.split(", ")
    return DummyVecEnv if kind == "Dummy" else SubprocVecEnv, int(n_workers)


BOTH = pytest.mark.parametrize("n_workers", [0, 2])


# --- monitors -------------------------------------------------------------------------------------------------------


def test_vec_monitor_counts_every_episode_once_and_appends(setup: tuple[Any, int], tmp_path: Path) -> None:
    vec_env, n_workers = setup
    env = VecMonitor(clocks(vec_env), str(tmp_path / "all"), info_keywords=("step",))
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10)
    n_before = 0
    for n_steps in (400, 200):
        recorder = Recorder()
        model.learn(n_steps, callback=recorder, reset_num_timesteps=False)
        rows = load_results(str(tmp_path))
        assert env.episode_count == len(rows)
        for i in range(4):
            assert [float(r) for r in rows["r"].iloc[n_before:] if r // 1000 == i] == recorder.returns(i)
        assert (rows["l"] == rows["r"] // 1000 + 2).all()
        n_before = len(rows)
    env.close()
    times = [float(line.split(",")[2]) for line in (tmp_path / "all.monitor.csv").read_text().splitlines()[2:]]
    assert all(later >= earlier - 0.01 for earlier, later in pairwise(times))


def test_monitor_files_hold_every_episode_once_and_in_order(setup: tuple[Any, int], tmp_path: Path) -> None:
    vec_env, n_workers = setup
    env = clocks(vec_env, folder=tmp_path)
    first, second = Recorder(), Recorder()
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(400, callback=first)
    model.learn(200, callback=second)
    env.close()
    for i in range(4):
        lines = (tmp_path / f"{i}.monitor.csv").read_text().splitlines()
        assert lines[1] == "r,l,t"
        assert [float(line.split(",")[0]) for line in lines[2:]] == first.returns(i) + second.returns(i)


# --- observations ---------------------------------------------------------------------------------------------------


@BOTH
def test_frames_are_stacked_and_transposed(n_workers: int) -> None:
    env = VecFrameStack(VecTransposeImage(clocks(kind="image")), 3)
    recorder = Recorder(7)
    A3C("CnnLstmPolicy", env, n_workers=n_workers, n_steps=7, take_turns=True).learn(140, callback=recorder)
    assert len(recorder.obs) >= 3
    for obs, times in zip(recorder.obs, recorder.times, strict=True):
        assert obs.shape == (4, 9, 12, 10)
        for i, t in enumerate(times):
            frames = [40 * i + time if time >= 0 else 0 for time in (t - 2, t - 1, t)]
            assert obs[i, ::3, 0, 0].tolist() == frames


@BOTH
def test_vec_extract_dict_obs(n_workers: int) -> None:
    env = VecExtractDictObs(clocks(kind="dict"), "clock")
    recorder = Recorder(7)
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=7, take_turns=True).learn(140, callback=recorder)
    assert len(recorder.obs) >= 3
    for obs, times in zip(recorder.obs, recorder.times, strict=True):
        assert obs.tolist() == [[i, t] for i, t in enumerate(times)]
    ends = [(index, info["terminal_observation"]) for index, _, info in recorder.rows if "terminal_observation" in info]
    assert all(obs.tolist() == [index, index + 2] for index, obs in ends)


# --- VecCheckNan ----------------------------------------------------------------------------------------------------


@BOTH
def test_vec_check_nan_raises_in_learn(n_workers: int) -> None:
    env = VecCheckNan(clocks(), raise_exception=True)
    env.set_attr("bad_step", 90, indices=[3])
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10)
    with pytest.raises(ValueError, match="found nan in rewards") as caught:
        model.learn(10_000)
    assert isinstance(caught.value.__cause__, RemoteTraceback) == (n_workers > 0)
    assert model.num_timesteps < 10_000  # the other worker may be far ahead


@BOTH
def test_vec_check_nan_warns_and_training_continues(n_workers: int) -> None:
    env = VecCheckNan(clocks())
    env.set_attr("bad_step", 30, indices=[0])
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10, take_turns=True)
    with pytest.warns(UserWarning, match="update was dropped|nan in rewards") as caught:
        model.learn(400)
    expected = ["An update was dropped, as a reward was NaN"]
    if n_workers == 0:  # workers write theirs to standard error
        expected.insert(0, "found nan in rewards")
    assert len(caught) == len(expected)
    assert all(str(warning.message).startswith(text) for warning, text in zip(caught, expected, strict=True))
    assert model.num_timesteps == 400
    assert model._n_updates == (20 if n_workers else 10) - 1


# --- VecVideoRecorder -----------------------------------------------------------------------------------------------


def frames(path: Path) -> list[npt.NDArray[Any]]:
    capture, found = cv2.VideoCapture(str(path)), []
    while (frame := capture.read())[0]:
        found.append(frame[1])
    return found


@pytest.fixture
def recorded(setup: tuple[Any, int], tmp_path: Path) -> Iterator[tuple[VecVideoRecorder, int]]:
    vec_env, n_workers = setup
    env = VecVideoRecorder(clocks(vec_env), str(tmp_path), lambda step: step % 40 == 0, video_length=10)
    yield env, n_workers
    env.close()


def test_videos_are_recorded_once_and_continue_in_a_second_call(
    recorded: tuple[VecVideoRecorder, int], tmp_path: Path
) -> None:
    env, n_workers = recorded
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10, take_turns=True).learn(240)
    assert env.step_id == 60
    model.learn(200, reset_num_timesteps=False)
    assert env.step_id == 110
    env.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"rl-video-step-{start}-to-step-{start + 10}.mp4" for start in range(0, 110, 40)}
    video = frames(tmp_path / "rl-video-step-40-to-step-50.mp4")
    assert len(video) == 11
    # a mosaic of the environments of one worker, each of its own grey
    greys = [[20, 70], [120, 170]] if n_workers == 0 else [[20, 70]]
    tiles = video[0].shape[0] // 32, video[0].shape[1] // 32
    found = [int(video[0][32 * y + 16, 32 * x + 16].mean()) for y in range(tiles[0]) for x in range(tiles[1])]
    expected = [grey for row in greys for grey in row]
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, abs=6)


def test_a_video_begun_before_training_is_saved_first(tmp_path: Path) -> None:
    env = VecVideoRecorder(clocks(), str(tmp_path), lambda step: step == 0, video_length=20)
    env.reset()
    for _ in range(5):
        env.step(np.zeros(4, dtype=int))
    A3C("MlpPolicy", env, n_workers=2).learn(100)
    assert not env.recording
    (video,) = tmp_path.iterdir()
    assert len(frames(video)) in (5, 6)  # moviepy rounds
    env.close()
