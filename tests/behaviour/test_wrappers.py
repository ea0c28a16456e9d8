"""SB3's VecEnv wrappers and monitor files around the environments of workers: the numbers that they give."""

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
    Notes each transition as (environment, reward, info); with ``n_steps`` also the observations at the ends of rollouts, of
    workers that take turns.
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
        return [info["episode"]["r"] for index, _, info in self.rows if index == env and "episode" in info]

    def n_steps_of(self, env: int) -> int:
        return sum(index == env for index, *_ in self.rows)


@pytest.fixture(params=["Dummy, 0", "Dummy, 2", "Subproc, 0", "Subproc, 2"])
def setup(request: pytest.FixtureRequest) -> tuple[Any, int]:
    kind, n_workers = request.param.split(", ")
    return DummyVecEnv if kind == "Dummy" else SubprocVecEnv, int(n_workers)


BOTH = pytest.mark.parametrize("n_workers", [0, 2])


def assert_consecutive(returns: list[float], env: int) -> None:
    """Every episode of a call of ``learn`` once, in order."""
    if not returns:  # its worker had no core for so long that the others made all steps
        return
    first = returns[0]
    assert 0 <= first - 1000 * env < 100
    assert returns == [first + k for k in range(len(returns))]


# --- monitors -------------------------------------------------------------------------------------------------------


def test_vec_monitor_counts_every_episode_once_and_appends(setup: tuple[Any, int], tmp_path: Path) -> None:
    vec_env, n_workers = setup
    env = VecMonitor(clocks(vec_env), str(tmp_path / "all"), info_keywords=("step",))
    first, second = Recorder(), Recorder()
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(400, callback=first)
    n_first = env.episode_count
    rows = load_results(str(tmp_path))
    model.learn(200, callback=second, reset_num_timesteps=False)
    env.close()
    all_rows = load_results(str(tmp_path))
    for recorder, found in ((first, rows), (second, all_rows.iloc[len(rows) :])):
        for i in range(4):
            mine = [float(r) for r in found["r"] if int(r) // 1000 == i]
            assert_consecutive(mine, i)
            assert recorder.returns(i) == mine
            assert len(mine) == recorder.n_steps_of(i) // (i + 2)
        assert (found["l"] == found["r"] // 1000 + 2).all()
    assert n_first == len(rows)
    assert env.episode_count == len(all_rows)
    times = [float(line.split(",")[2]) for line in (tmp_path / "all.monitor.csv").read_text().splitlines()[2:]]
    assert all(later >= earlier - 0.01 for earlier, later in pairwise(times))
    assert (all_rows["t"].diff().dropna() >= 0).all()


def test_monitor_files_hold_every_episode_once_and_in_order(setup: tuple[Any, int], tmp_path: Path) -> None:
    vec_env, n_workers = setup
    env = clocks(vec_env, folder=tmp_path)
    first, second = Recorder(), Recorder()
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(400, callback=first)
    model.learn(200, callback=second)
    env.close()
    n_episodes = 0
    for i in range(4):
        lines = (tmp_path / f"{i}.monitor.csv").read_text().splitlines()
        assert lines[1] == "r,l,t"
        returns = [float(line.split(",")[0]) for line in lines[2:]]
        mine, others = first.returns(i), second.returns(i)
        assert_consecutive(mine, i)
        assert_consecutive(others, i)
        assert returns == mine + others
        assert len(mine) == first.n_steps_of(i) // (i + 2)
        n_episodes += len(returns)
    assert len(load_results(str(tmp_path))) == n_episodes


# --- observations ---------------------------------------------------------------------------------------------------


@BOTH
def test_frames_are_stacked_and_channels_moved_as_ever(n_workers: int) -> None:
    env = VecFrameStack(VecTransposeImage(clocks(kind="image")), 3)
    recorder = Recorder(7)
    A3C("CnnLstmPolicy", env, n_workers=n_workers, n_steps=7, take_turns=True).learn(280, callback=recorder)
    assert len(recorder.obs) >= 5
    for obs, times in zip(recorder.obs, recorder.times, strict=True):
        assert obs.shape == (4, 9, 12, 10)
        for i, t in enumerate(times):
            frames = [40 * i + time if time >= 0 else 0 for time in (t - 2, t - 1, t)]
            assert obs[i, ::3, 0, 0].tolist() == frames


@BOTH
def test_one_part_of_a_dictionary_is_extracted(n_workers: int) -> None:
    env = VecExtractDictObs(clocks(kind="dict"), "clock")
    recorder = Recorder(7)
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=7, take_turns=True).learn(280, callback=recorder)
    assert len(recorder.obs) >= 5
    for obs, times in zip(recorder.obs, recorder.times, strict=True):
        assert obs.tolist() == [[i, t] for i, t in enumerate(times)]
    ends = [(index, info["terminal_observation"]) for index, _, info in recorder.rows if "terminal_observation" in info]
    assert all(obs.tolist() == [index, index + 2] for index, obs in ends)


# --- VecCheckNan ----------------------------------------------------------------------------------------------------


def test_vec_check_nan_raises_in_learn(setup: tuple[Any, int]) -> None:
    vec_env, n_workers = setup
    env = VecCheckNan(clocks(vec_env), raise_exception=True)
    env.set_attr("bad_step", 90, indices=[3])
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10)
    with pytest.raises(ValueError, match="found nan in rewards") as caught:
        model.learn(10_000)
    assert isinstance(caught.value.__cause__, RemoteTraceback) == (n_workers > 0)
    assert model.num_timesteps < 10_000  # how far the other worker came is up to the machine
    env.close()


@BOTH
def test_vec_check_nan_warns_where_the_user_sees_it_and_training_goes_on(n_workers: int) -> None:
    env = VecCheckNan(clocks())
    env.set_attr("bad_step", 30, indices=[0])
    env.set_attr("bad_step", 35, indices=[3])
    skipped: list[int] = []

    def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
        skipped.append(local["self"]._collector.statistics.skipped_updates)
        return True

    dropped = pytest.warns(UserWarning, match="An update was dropped, as a reward was NaN")
    with dropped, pytest.warns(UserWarning, match="found nan in rewards") as caught:
        model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(800, callback=note)
    n_found = len([warning for warning in caught if "found nan" in str(warning.message)])
    assert n_found == 1 if n_workers == 0 else 1 <= n_found <= 2  # one for each worker, with its own action
    assert len(caught) == n_found + 1
    assert model.num_timesteps == 800
    assert 1 <= skipped[-1] <= 2


# --- VecVideoRecorder -----------------------------------------------------------------------------------------------


def frames(path: Path) -> list[npt.NDArray[Any]]:
    capture, found = cv2.VideoCapture(str(path)), []
    while (frame := capture.read())[0]:
        found.append(frame[1])
    return found


@pytest.fixture
def recorded(setup: tuple[Any, int], tmp_path: Path) -> Iterator[tuple[VecVideoRecorder, int]]:
    vec_env, n_workers = setup
    env = VecVideoRecorder(clocks(vec_env), str(tmp_path), lambda step: step % 50 == 0, video_length=20)
    yield env, n_workers
    env.close()


def test_videos_are_recorded_once_and_go_on_in_a_second_call(recorded: tuple[VecVideoRecorder, int], tmp_path: Path) -> None:
    env, n_workers = recorded
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10, take_turns=True).learn(440)
    assert env.step_id == 110
    model.learn(440, reset_num_timesteps=False)
    assert env.step_id == 220
    env.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"rl-video-step-{start}-to-step-{start + 20}.mp4" for start in range(0, 220, 50)}
    video = frames(tmp_path / "rl-video-step-50-to-step-70.mp4")
    assert len(video) == 21
    # a mosaic of the environments of one worker: each has its own grey
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
