"""The logger: the keys of A2C and our own, in every format, with the same values in all of them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_a3c import A3C

BOTH = pytest.mark.parametrize("n_workers", [0, 2])
FORMATS = ["stdout", "csv", "json", "tensorboard"]
OURS = {
    "train/grad_norm",
    "train/staleness",
    "train/skipped_updates",
    "time/acting",
    "time/stepping",
    "time/learning",
    "time/sharing",
}
NOT_FOR_TENSORBOARD = {"time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}

Row = dict[str, float]


def cartpole(**kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=4, **kwargs)


def learn_and_log(model: OnPolicyAlgorithm, folder: Path, total_timesteps: int, log_interval: int = 1) -> None:
    """Learn, and log in all formats to a folder."""
    model.set_logger(configure(str(folder), FORMATS))
    model.learn(total_timesteps, log_interval=log_interval)
    model.logger.close()


def json_rows(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def csv_rows(folder: Path) -> list[Row]:
    with (folder / "progress.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """For each key of the event files the values by step."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
        accumulator.Reload()
        for key in accumulator.Tags()["scalars"]:
            found.setdefault(key, {}).update({event.step: event.value for event in accumulator.Scalars(key)})
    return found


def tables(output: str) -> list[dict[str, str]]:
    """The tables on standard output, with whole keys."""
    found: list[dict[str, str]] = []
    inside, tag = False, ""
    for line in output.splitlines():
        if line.startswith("---"):
            inside = not inside
            if inside:
                found.append({})
        elif inside:
            key, value = line.strip("|").split("|")
            if key.strip().endswith("/"):
                tag = key.strip()
            else:
                found[-1][tag + key.strip()] = value.strip()
    return found


# --- keys and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "n_workers"), [("CartPole-v1", 0), ("Pendulum-v1", 2)])
def test_keys_are_those_of_a2c_and_ours(
    env_id: str, n_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = make_vec_env(env_id, n_envs=4)
    learn_and_log(A2C("MlpPolicy", env, device="cpu"), tmp_path / "a2c", 1000, log_interval=10)
    learn_and_log(A3C("MlpPolicy", env, n_workers=n_workers), tmp_path / "a3c", 1000, log_interval=2)
    env.close()

    both = [set().union(*json_rows(tmp_path / name)) for name in ("a2c", "a3c")]
    assert ("train/std" in both[0]) == (env_id == "Pendulum-v1")
    assert both[1] == both[0] | OURS
    for name, keys in zip(("a2c", "a3c"), both, strict=True):
        assert set().union(*csv_rows(tmp_path / name)) == keys
        assert set(scalars(tmp_path / name)) == keys - NOT_FOR_TENSORBOARD
    shown = tables(capsys.readouterr().out)
    assert set().union(*shown[: len(shown) // 2]) == both[0]
    assert set().union(*shown[-len(json_rows(tmp_path / "a3c")) :]) == both[1]


def check_that_all_formats_agree(folder: Path, output: str) -> None:
    rows, shown, by_key = json_rows(folder), tables(output), scalars(folder)
    assert csv_rows(folder) == rows
    for table, row in zip(shown, rows, strict=True):
        assert {key: float(value) for key, value in table.items()} == pytest.approx(row, rel=6e-3, abs=1e-12)
    for key in set(rows[0]) - NOT_FOR_TENSORBOARD:
        assert by_key[key] == pytest.approx({row["time/total_timesteps"]: row[key] for row in rows}, rel=1e-6), key


@BOTH
def test_values(n_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = cartpole(monitor_dir=str(tmp_path))
    total = 2000
    model = A3C(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: 1e-3 * remaining,
        n_steps=5,
        n_workers=n_workers,
        envs_per_update=2,
        stats_window_size=10_000,
    )
    learn_and_log(model, tmp_path, total, log_interval=4)
    rows = json_rows(tmp_path)
    assert [row["time/iterations"] for row in rows] == [4 * (i + 1) for i in range(total // 80)]
    assert [row["time/total_timesteps"] for row in rows[:-1]] == [80 * (i + 1) for i in range(len(rows) - 1)]
    assert rows[-1]["time/total_timesteps"] == model.num_timesteps  # the last waits for the workers
    for row in rows:
        assert all(np.isfinite(value) for value in row.values())
        n_timesteps = row["time/total_timesteps"]
        used = row["train/learning_rate"]  # by the last rollout that callbacks have seen
        tolerance = 1e-9 if n_workers == 0 else 1e-3 * 5 * 80 / total  # of two workers one may be ahead
        assert used == pytest.approx(1e-3 * max(0.0, 1 - n_timesteps / total), abs=tolerance)
        assert -math.log(2) - 1e-6 <= row["train/entropy_loss"] < 0  # two actions
        assert row["train/value_loss"] > 0
        assert row["train/explained_variance"] <= 1
        assert row["train/grad_norm"] > 0
        assert row["train/skipped_updates"] == 0
        assert row["train/staleness"] == 0 if n_workers == 0 else row["train/staleness"] >= 0
        shares = [row[f"time/{activity}"] for activity in ("acting", "stepping", "learning", "sharing")]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) == pytest.approx(1)
        assert row["time/fps"] > 0
        # an update learns from 5 steps of 2 environments; workers are ahead of the callbacks
        assert n_timesteps / 10 <= row["train/n_updates"] + 3
    n_updates = [row["train/n_updates"] for row in rows]
    assert n_updates == sorted(n_updates)
    assert n_updates[-1] <= model._n_updates == model.num_timesteps / 10
    check_that_all_formats_agree(tmp_path, capsys.readouterr().out)
    # all episodes of the monitor files are counted at the end
    assert model.ep_info_buffer is not None
    episodes = load_results(str(tmp_path))
    assert len(model.ep_info_buffer) == len(episodes) > 20
    model.set_logger(configure(str(tmp_path / "end"), ["json"]))
    model.dump_logs()
    model.logger.close()
    (end,) = json_rows(tmp_path / "end")
    assert end["rollout/ep_rew_mean"] == pytest.approx(episodes["r"].mean())
    assert end["rollout/ep_len_mean"] == pytest.approx(episodes["l"].mean())
    env.close()


class Success(gym.Wrapper[Any, Any, Any, Any]):
    """An episode of 20 steps or more is a success."""

    def reset(self, **kwargs: Any) -> Any:
        self.n_steps = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "is_success": self.n_steps >= 20}


@BOTH
def test_success_rate_is_over_the_last_episodes(n_workers: int, tmp_path: Path) -> None:
    lengths: list[int] = []
    windows: list[list[int]] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            lengths.extend(info["episode"]["l"] for info in self.locals["infos"] if "episode" in info)
            return True

        def _on_rollout_end(self) -> None:
            windows.append(lengths[-10:])

    env = cartpole(wrapper_class=Success)
    model = A3C("MlpPolicy", env, n_workers=n_workers, stats_window_size=10)
    model.set_logger(configure(str(tmp_path), ["json", "tensorboard"]))
    model.learn(1600, Look(), log_interval=4)
    model.logger.close()
    env.close()
    expected = [np.mean([length >= 20 for length in window]) for window in windows[3::4]]
    assert len(expected) == 5
    assert 0 < sum(expected) < 5
    assert [row["rollout/success_rate"] for row in json_rows(tmp_path)] == pytest.approx(expected)
    assert list(scalars(tmp_path)["rollout/success_rate"].values()) == pytest.approx(expected)


@pytest.mark.parametrize("verbose", [0, 1])
def test_one_line_says_that_rewards_are_too_large(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0)
    env = cartpole(wrapper_class=lambda env: gym.wrappers.TransformReward(env, lambda _: noise.normal(scale=1000)))
    model = A3C("MlpPolicy", env, gamma=0.0, n_steps=5, envs_per_update=1, n_workers=0, verbose=verbose, seed=0)
    with th.no_grad():  # values are as large as rewards and have nothing to do with them
        model.policy.value_net.weight.fill_(1e4)
    for _ in range(2):  # once in each call of `learn`
        model.learn(1000)
        lines = [line for line in capsys.readouterr().out.splitlines() if "VecNormalize(env, norm_obs=False)" in line]
        assert len(lines) == verbose
