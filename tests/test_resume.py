"""Resuming runs, also those that were killed: models, statistics, evaluations, monitor files, and the Atari example."""

import argparse
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.resume import (
    carry_over_monitor_files,
    continue_evaluations,
    has_statistics,
    load_statistics,
    newest_model,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_atari.py"

# --- models and their statistics ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normalized() -> Iterator[VecEnv]:
    with_statistics = VecNormalize(make_vec_env("CartPole-v1", n_envs=2), norm_obs=False)
    yield with_statistics
    with_statistics.close()


@pytest.fixture
def run_folder(tmp_path: Path, normalized: VecEnv) -> Path:
    """Checkpoints after 40, 80 and 120 timesteps; a best model after 60, without statistics."""
    folder = tmp_path / "run"
    model = A3C("MlpPolicy", normalized, n_steps=5, n_workers=0, seed=1, policy_kwargs=dict(net_arch=[8]))
    model.learn(120, CheckpointCallback(20, str(folder / "checkpoints"), "a3c"))
    model.num_timesteps = 60
    model.set_env(normalized.unwrapped)
    model.save(folder / "best_model")
    return folder


def checkpoint(folder: Path, timesteps: int) -> Path:
    return folder / "checkpoints" / f"a3c_{timesteps}_steps.zip"


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_callbacks_save_models_with_their_statistics(tmp_path: Path) -> None:
    """SB3's own callbacks: each model has the rewards that were counted until then."""
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2), norm_obs=False)
    evaluation_env = VecNormalize(make_vec_env("CartPole-v1"), training=False, norm_obs=False)
    evaluation = EvalCallback(evaluation_env, eval_freq=30, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0)
    evaluation.best_mean_reward = 0.0
    checkpoints = CheckpointCallback(20, str(tmp_path), "a3c")
    A3C("MlpPolicy", env, n_steps=5, n_workers=0).learn(100, [checkpoints, evaluation])
    for name, timesteps in {"a3c_40_steps": 40, "a3c_80_steps": 80, "best_model": 60}.items():
        assert A3C.load(tmp_path / name).num_timesteps == timesteps
        assert load_statistics(tmp_path / name, make_vec_env("CartPole-v1")).ret_rms.count == pytest.approx(
            timesteps, abs=0.1
        )
    assert not list(tmp_path.glob("*.pkl"))


@pytest.mark.parametrize("with_statistics", [False, True])
def test_newest_model_was_trained_longest(with_statistics: bool, run_folder: Path, tmp_path: Path) -> None:
    os.utime(run_folder / "best_model.zip")
    os.utime(checkpoint(run_folder, 40))
    assert newest_model(run_folder, with_statistics) == checkpoint(run_folder, 120)
    assert newest_model(tmp_path / "nothing") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_models_are_skipped(share: float, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        checkpoint(run_folder, 120),
        checkpoint(run_folder, 80),
        run_folder / "best_model.zip",
        checkpoint(run_folder, 40),
    ]
    for i, model in enumerate(models):
        assert newest_model(run_folder) == model
        lines = capsys.readouterr().out.splitlines()
        assert sorted(line.split(":")[0] for line in lines) == sorted(f"Skipping {skipped}" for skipped in models[:i])
        cut(model, share)
    assert newest_model(run_folder) is None


def test_other_damaged_models_are_skipped(run_folder: Path, normalized: VecEnv, capsys: pytest.CaptureFixture[str]) -> None:
    model = A3C("MlpPolicy", normalized, n_workers=0, policy_kwargs=dict(net_arch=[8]))
    model.policy_kwargs = dict(net_arch=[4])  # the weights do not fit
    model.num_timesteps = 1000
    model.save(run_folder / "odd")
    assert newest_model(run_folder) == checkpoint(run_folder, 120)
    assert f"Skipping {run_folder / 'odd.zip'}: it can't be used (" in capsys.readouterr().out

    content = bytearray(checkpoint(run_folder, 120).read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint(run_folder, 120).write_bytes(content)
    assert newest_model(run_folder) == checkpoint(run_folder, 80)

    unfinished = checkpoint(run_folder, 80)  # as a killed save leaves it
    unfinished.rename(unfinished.with_name(f".{unfinished.name}.123.part"))
    assert newest_model(run_folder) == run_folder / "best_model.zip"


def test_newest_model_of_another_class(run_folder: Path, normalized: VecEnv, capsys: pytest.CaptureFixture[str]) -> None:
    other = run_folder / "a2c.zip"
    A2C("MlpPolicy", normalized, n_steps=5).learn(200).save(other)
    assert newest_model(run_folder) == checkpoint(run_folder, 120)
    assert f"Skipping {other}" in capsys.readouterr().out
    assert newest_model(run_folder, model_class=A2C) == other


def test_models_without_statistics_are_skipped(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run_folder / "best_model.zip"
    cut(checkpoint(run_folder, 120))
    cut(checkpoint(run_folder, 80))
    assert newest_model(run_folder) == best
    assert not has_statistics(best)
    capsys.readouterr()
    assert newest_model(run_folder, with_statistics=True) == checkpoint(run_folder, 40)
    assert has_statistics(checkpoint(run_folder, 40))
    line = next(line for line in capsys.readouterr().out.splitlines() if "best_model" in line)
    assert line.startswith(f"Skipping {best}: it can't be used ({best} has no statistics for VecNormalize: ")


class KilledError(BaseException):
    pass


# --- evaluations ----------------------------------------------------------------------------------------------------


def evaluation(folder: Path) -> EvalCallback:
    return EvalCallback(make_vec_env("CartPole-v1"), log_path=str(folder), verbose=0)


def write_evaluations(folder: Path) -> Path:
    path = folder / "evaluations.npz"
    np.savez(path, timesteps=[10, 20], results=[[1.0, 3.0], [0.0, 2.0]], ep_lengths=[[5, 6], [7, 8]])
    return path


def test_evaluations_continue(tmp_path: Path) -> None:
    callback = evaluation(tmp_path)
    continue_evaluations(callback, write_evaluations(tmp_path))
    assert callback.best_mean_reward == 2.0
    assert callback.evaluations_timesteps == [10, 20]
    assert callback.evaluations_results == [[1.0, 3.0], [0.0, 2.0]]
    assert callback.evaluations_length == [[5, 6], [7, 8]]


@pytest.mark.parametrize("n_bytes", [None, 0, 1, 500, -1])
def test_missing_or_damaged_evaluations(n_bytes: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_evaluations(tmp_path)
    expected = []
    if n_bytes is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:n_bytes])
        expected = [f"{path} is damaged"]
    callback = evaluation(tmp_path)
    continue_evaluations(callback, path)
    assert callback.best_mean_reward == -np.inf
    assert [callback.evaluations_timesteps, callback.evaluations_results, callback.evaluations_length] == [[], [], []]
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == expected


# --- monitor files --------------------------------------------------------------------------------------------------


def write_monitor(path: Path, t_start: float, rows: list[str]) -> None:
    """As SB3 does: the header ends as the system's lines, all the others as those of CSV."""
    header = f"#{json.dumps({'t_start': t_start, 'env_id': 'CartPole-v1'})}\n"
    path.write_text(header + "".join(f"{row}\r\n" for row in ["r,l,t", *rows]), newline="")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Episodes of two environments; they end at 101 and 105 s, and at 103 and 106 s."""
    folder = tmp_path / "CartPole-v1_1"
    folder.mkdir()
    write_monitor(folder / "0.monitor.csv", 100.0, ["10.0,10,1.0", "10.0,10,5.0"])
    write_monitor(folder / "1.monitor.csv", 102.0, ["20.0,20,1.0", "5.0,5,4.0"])
    return folder


@pytest.mark.parametrize("same_folder", [True, False])
def test_monitor_files_of_three_runs(same_folder: bool, source: Path, tmp_path: Path) -> None:
    contents = [(source / f"{i}.monitor.csv").read_bytes() for i in range(2)]
    (source / "2.monitor.csv").touch()  # the run was killed as it created the file
    folders = [source] * 3 if same_folder else [source, tmp_path / "second", tmp_path / "third"]
    for second in (1, 2):
        folders[second].mkdir(exist_ok=True)
        carry_over_monitor_files(folders[second - 1], folders[second])
        carry_over_monitor_files(folders[second - 1], folders[second])  # if it was killed before training began
        for i in range(2):
            write_monitor(folders[second] / f"{i}.monitor.csv", 100.0 * second + 100, [f"{second}.0,7,{i + 1}.0"])
    (folders[-1] / "2.monitor.csv").unlink(missing_ok=True)
    old = ["100.0.monitor.csv", "102.1.monitor.csv"]
    assert names(folders[-1]) == sorted([*old, "200.0.monitor.csv", "200.1.monitor.csv", "0.monitor.csv", "1.monitor.csv"])
    assert [(folders[-1] / name).read_bytes() for name in old] == contents
    results = load_results(str(folders[-1]))
    assert results["l"].tolist() == [10, 20, 10, 5, 7, 7, 7, 7]
    assert results["r"].tolist()[4:] == [1.0, 1.0, 2.0, 2.0]
    assert results["t"].tolist() == [1.0, 3.0, 5.0, 6.0, 101.0, 102.0, 201.0, 202.0]  # since the first run started
    if not same_folder:
        assert [(source / f"{i}.monitor.csv").read_bytes() for i in range(2)] == contents


@pytest.mark.parametrize("n_renamed", [0, 1])
def test_monitor_files_if_killed_halfway(n_renamed: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[Path] = []
    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if len(renamed) == n_renamed:
            raise KilledError
        renamed.append(path)
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KilledError):
            carry_over_monitor_files(source, source)
    carry_over_monitor_files(source, source)
    assert names(source) == ["100.0.monitor.csv", "102.1.monitor.csv"]
    assert load_results(str(source))["l"].tolist() == [10, 20, 10, 5]


# --- the Atari example ----------------------------------------------------------------------------------------------

GAME = "BreakoutNoFrameskip-v4"  # random games are short
SAVE_FREQ = 400
OPTIONS = ["--env", GAME, "--n-envs", "4", "--n-workers", "2", "--save-freq", str(SAVE_FREQ)]


@contextlib.contextmanager
def example(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the example, and kill it at the end; its workers and its fork server must end soon after."""
    with (folder / "output.txt").open("wb") as output:
        command = [sys.executable, str(EXAMPLE), *OPTIONS, *options]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60  # a fork server may be importing torch
        while any(runs_in(folder, path) for path in Path("/proc").glob("[0-9]*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def runs_in(folder: Path, process: Path) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        return Path(os.readlink(process / "cwd")) == folder
    return False


def episodes(folder: Path) -> set[tuple[float, ...]]:
    """Time, return and length of all episodes in the monitor files; the last line may not be complete yet."""
    found: set[tuple[float, ...]] = set()
    for path in folder.glob("*.monitor.csv"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[2:]:
            score, length, seconds = map(float, line.split(","))
            found.add((round(json.loads(lines[0][1:])["t_start"] + seconds, 6), score, length))
    return found


class Progress(NamedTuple):
    """How far a model has been trained."""

    timesteps: int
    updates: int
    optimizer_steps: float
    rewards: float  #: number of rewards in the statistics


def progress(path: Path, normalize: bool) -> Progress:
    model = A3C.load(path)
    steps = [float(state["step"]) for state in model.policy.optimizer.state.values()]
    count = 0.0
    if normalize:
        count = load_statistics(path, make_ale_vec_env(GAME)).ret_rms.count
        # workers are ahead of the callbacks, at each checkpoint that was resumed from
        assert model.num_timesteps <= count < model.num_timesteps + 5 * SAVE_FREQ
    assert 0.8 * model._n_updates < min(steps) <= max(steps) <= model._n_updates + 10  # Hogwild may lose a few
    return Progress(model.num_timesteps, model._n_updates, min(steps), count)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_example_resumes_after_kills(normalize: bool, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / GAME
    generator = np.random.default_rng(int(normalize))
    options = ["--eval-freq", "1500", *(["--normalize-reward"] if normalize else [])]
    before, played = Progress(0, 0, 0.0, 0.0), set[tuple[float, ...]]()
    for i in range(5):
        with example(tmp_path, *options) as process:
            deadline = time.monotonic() + 120
            while i == 0 and not any(folder.glob("checkpoints/a3c_*_steps.zip")):
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(generator.uniform(0, 5 if i == 0 else 15))  # also while it starts
        assert process.returncode == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        start = newest_model(folder, with_statistics=normalize)
        assert start is not None
        now = progress(start, normalize)
        assert all(new >= old for new, old in zip(now, before, strict=True))
        assert played <= episodes(folder)
        before, played = now, episodes(folder)
        options = ["--resume"]

    (folder / "evaluations.npz").write_bytes(b"PK")
    options += ["--eval-freq", str(SAVE_FREQ), "--timesteps", str(before.timesteps + SAVE_FREQ + 200)]
    with example(tmp_path, *options) as process:
        process.wait(120)
    output = (tmp_path / "output.txt").read_text()
    assert process.returncode == 0, output
    assert start is not None and f"Resuming from {start.relative_to(tmp_path)}\n" in output
    assert "evaluations start from scratch" in output
    after = progress(folder / "model.zip", normalize)
    assert before.timesteps + SAVE_FREQ + 200 <= after.timesteps < before.timesteps + SAVE_FREQ + 400
    assert all(new > old or new == old == 0 for new, old in zip(after, before, strict=True))
    with np.load(folder / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [before.timesteps + SAVE_FREQ]
        assert (evaluations["results"] % 1 == 0).all()  # scores, not normalized rewards
    assert [path.name for path in folder.glob("A3C_*")] == ["A3C_1"]

    # SB3 reads all episodes, in the order in which they were played
    assert played <= episodes(folder)
    results = load_results(str(folder))
    in_order = [(score, length) for _, score, length in sorted(episodes(folder))]
    assert list(zip(results["r"], results["l"], strict=True)) == in_order
    assert len(list(folder.glob("[0-9].monitor.csv"))) == 4


@pytest.fixture
def functions() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_example_without_a_model_to_resume(functions: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    arguments = argparse.Namespace(normalize_reward=False)
    assert functions["find_start"](arguments, run_folder) == checkpoint(run_folder, 120)
    assert arguments.normalize_reward  # the run has statistics
    for path in run_folder.glob("checkpoints/*.zip"):
        cut(path)
    with pytest.raises(SystemExit, match=r"was trained without --normalize-reward: resume without it, or start a new run"):
        functions["find_start"](arguments, run_folder)
    assert functions["find_start"](argparse.Namespace(normalize_reward=False), run_folder) == run_folder / "best_model.zip"
    for path in run_folder.glob("**/*.zip"):
        cut(path)
    for folder in (run_folder, tmp_path / "nothing"):
        with pytest.raises(SystemExit, match=rf"no model in {folder} that can be loaded: train one first, without --resume"):
            functions["find_start"](argparse.Namespace(normalize_reward=False), folder)


def test_example_renames_earlier_runs(functions: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / GAME
    for i in range(2):
        folder.mkdir()
        (folder / f"{i}.monitor.csv").touch()
        functions["move_aside"](folder)
    assert names(tmp_path) == [f"{GAME}_1", f"{GAME}_2"]
    assert (tmp_path / f"{GAME}_2" / "1.monitor.csv").exists()
