"""Runs that are killed at any moment, and go on from what is whole of the files they left."""

import argparse
import contextlib
import json
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c import A3C, resume
from sb3_a3c.resume import (
    carry_over_monitor_files,
    continue_evaluations,
    newest_model,
    save_with_statistics,
    statistics_path,
)
from sb3_a3c.save_util import write_whole

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_atari.py"

# --- models and their statistics ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normalized() -> Iterator[VecEnv]:
    with_statistics = VecNormalize(make_vec_env("CartPole-v1", n_envs=2), norm_obs=False)
    yield with_statistics
    with_statistics.close()


@pytest.fixture
def run_folder(tmp_path: Path, normalized: VecEnv) -> Path:
    """Checkpoints with statistics after 40, 80 and 120 timesteps, and a best model without them."""
    folder = tmp_path / "run"
    model = A3C("MlpPolicy", normalized, n_steps=5, n_workers=0, seed=1, policy_kwargs=dict(net_arch=[8]))
    model.learn(120, CheckpointCallback(20, str(folder / "checkpoints"), "a3c", save_vecnormalize=True))
    model.num_timesteps = 60
    model.save(folder / "best_model")
    return folder


def checkpoint(folder: Path, timesteps: int) -> Path:
    return folder / "checkpoints" / f"a3c_{timesteps}_steps.zip"


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_statistics_are_where_callbacks_save_them(run_folder: Path) -> None:
    for timesteps in (40, 80, 120):
        assert statistics_path(checkpoint(run_folder, timesteps)).is_file()
    assert statistics_path(Path("logs/best_model.zip")) == Path("logs/best_model_vecnormalize.pkl")


@pytest.mark.parametrize("with_statistics", [False, True])
def test_newest_is_what_was_trained_longest(with_statistics: bool, run_folder: Path, tmp_path: Path) -> None:
    os.utime(run_folder / "best_model.zip")
    os.utime(checkpoint(run_folder, 40))
    assert newest_model(run_folder, with_statistics) == checkpoint(run_folder, 120)
    assert newest_model(tmp_path / "nothing") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_models_that_are_cut_off_are_passed_over(share: float, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(checkpoint(run_folder, 120), share)
    assert newest_model(run_folder) == checkpoint(run_folder, 80)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Passed over: {checkpoint(run_folder, 120)} ")
    cut(checkpoint(run_folder, 80), share)
    assert newest_model(run_folder) == run_folder / "best_model.zip"
    cut(run_folder / "best_model.zip", share)
    assert newest_model(run_folder) == checkpoint(run_folder, 40)
    cut(checkpoint(run_folder, 40), share)
    assert newest_model(run_folder) is None


def test_one_wrong_byte(run_folder: Path) -> None:
    content = bytearray(checkpoint(run_folder, 120).read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint(run_folder, 120).write_bytes(content)
    assert newest_model(run_folder) == checkpoint(run_folder, 80)


def test_statistics_are_a_part_of_the_model(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = statistics_path(checkpoint(run_folder, 120))
    for share in (0.99, 0.5, 0.0):
        cut(damaged, share)
        assert newest_model(run_folder, with_statistics=True) == checkpoint(run_folder, 80)
        assert re.match(f"Passed over: {damaged} .*damaged", capsys.readouterr().out)
    damaged.unlink()
    assert newest_model(run_folder, with_statistics=True) == checkpoint(run_folder, 80)
    assert re.match(f"Passed over: {damaged}.*is missing", capsys.readouterr().out)
    statistics_path(checkpoint(run_folder, 80)).write_bytes(pickle.dumps("other"))
    assert newest_model(run_folder, with_statistics=True) == checkpoint(run_folder, 40)  # not the best, which has none
    assert newest_model(run_folder) == checkpoint(run_folder, 120)


def test_a_model_that_does_not_fit_together(
    run_folder: Path, normalized: VecEnv, capsys: pytest.CaptureFixture[str]
) -> None:
    model = A3C("MlpPolicy", normalized, n_workers=0, policy_kwargs=dict(net_arch=[8]))
    model.policy_kwargs = dict(net_arch=[4])
    model.num_timesteps = 1000
    model.save(run_folder / "odd")
    assert newest_model(run_folder) == checkpoint(run_folder, 120)
    assert f"Passed over: {run_folder / 'odd.zip'} can't be loaded (" in capsys.readouterr().out


def test_what_a_killed_save_leaves_is_no_model(run_folder: Path) -> None:
    model = checkpoint(run_folder, 120)
    model.rename(model.with_name(f".{model.name}.123.part"))
    assert newest_model(run_folder) == checkpoint(run_folder, 80)


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("at", ["model", "statistics"])
def test_a_model_never_has_the_statistics_of_another(
    at: str, run_folder: Path, normalized: VecEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = A3C.load(checkpoint(run_folder, 120), normalized)
    path = run_folder / "model.zip"
    for timesteps in (200, 300):
        model.num_timesteps = timesteps
        save_with_statistics(model, path)
        assert newest_model(run_folder, with_statistics=True) == path

    def killed(*_args: Any) -> None:
        raise KilledError

    model.num_timesteps = 400
    monkeypatch.setattr("sb3_a3c.a3c.A3C.save" if at == "model" else "sb3_a3c.resume.write_whole", killed)
    with pytest.raises(KilledError):
        save_with_statistics(model, path)
    # the first could be undone; the second has left a model without statistics
    expected = path if at == "model" else checkpoint(run_folder, 120)
    assert newest_model(run_folder, with_statistics=True) == expected
    assert A3C.load(path).num_timesteps == (300 if at == "model" else 400)


def test_the_schedule_goes_on_from_a_checkpoint(run_folder: Path, normalized: VecEnv) -> None:
    model = A3C.load(checkpoint(run_folder, 80), normalized, learning_rate=lambda progress: 1e-3 * progress)
    seen = []

    def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append((model.num_timesteps, local["self"]._current_progress_remaining))
        return True

    model.learn(120 - model.num_timesteps, note, reset_num_timesteps=False)
    assert [timesteps for timesteps, _ in seen] == list(range(82, 122, 2))
    for timesteps, progress in seen[5:]:  # it is updated once a rollout, which has 10 timesteps
        assert progress == pytest.approx(1 - (timesteps - 1) // 10 * 10 / 120)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


# --- evaluations ----------------------------------------------------------------------------------------------------


def evaluation(folder: Path) -> EvalCallback:
    return EvalCallback(make_vec_env("CartPole-v1"), log_path=str(folder), verbose=0)


def write_evaluations(folder: Path) -> Path:
    path = folder / "evaluations.npz"
    np.savez(path, timesteps=[10, 20], results=[[1.0, 3.0], [0.0, 2.0]], ep_lengths=[[5, 6], [7, 8]])
    return path


def test_evaluations_go_on(tmp_path: Path) -> None:
    callback = evaluation(tmp_path)
    continue_evaluations(callback, write_evaluations(tmp_path))
    assert callback.best_mean_reward == 2.0
    assert callback.evaluations_timesteps == [10, 20]
    assert callback.evaluations_results == [[1.0, 3.0], [0.0, 2.0]]
    assert callback.evaluations_length == [[5, 6], [7, 8]]


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 500, -1])
def test_damaged_evaluations_begin_anew(n_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_evaluations(tmp_path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    callback = evaluation(tmp_path)
    continue_evaluations(callback, path)
    assert callback.best_mean_reward == -np.inf
    assert [callback.evaluations_timesteps, callback.evaluations_results, callback.evaluations_length] == [[], [], []]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path} is damaged")
    assert line.endswith("evaluations begin anew.")


def test_no_evaluations_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = evaluation(tmp_path)
    continue_evaluations(callback, tmp_path / "evaluations.npz")
    assert callback.evaluations_timesteps == []
    assert capsys.readouterr().out == ""


# --- monitor files --------------------------------------------------------------------------------------------------


def write_monitor(path: Path, t_start: float, rows: list[str], columns: str = "r,l,t") -> None:
    """As SB3 does: the header ends as the system's lines, all the others as those of CSV."""
    header = f"#{json.dumps({'t_start': t_start, 'env_id': 'CartPole-v1'})}\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text(header + "".join(f"{row}\r\n" for row in [columns, *rows]), newline="")


def rows_of(path: Path) -> list[str]:
    header, _columns, *rows = path.read_bytes().decode().split("\n")
    assert header.startswith("#")
    assert rows.pop() == ""  # the last one ends too
    assert all(row.endswith("\r") for row in rows)
    return [row.removesuffix("\r") for row in rows]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Episodes of two environments. They end at 101 and 105 s, and at 103 and 106 s."""
    folder = tmp_path / "CartPole-v1_1"
    write_monitor(folder / "0.monitor.csv", 100.0, ["10.0,10,1.0", "10.0,10,5.0"])
    write_monitor(folder / "1.monitor.csv", 102.0, ["20.0,20,1.0", "5.0,5,4.0"])
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "CartPole-v1_2"
    folder.mkdir()
    return folder


LATE = 1e9


@pytest.mark.parametrize(
    ("until", "n_kept"),
    [(LATE, (2, 2)), (106.0, (2, 2)), (105.9, (2, 1)), (104.9, (1, 1)), (102.9, (1, 0)), (100.5, (0, 0))],
)
def test_episodes_are_cut_where_the_model_was_saved(
    until: float, n_kept: tuple[int, int], source: Path, target: Path
) -> None:
    carry_over_monitor_files(source, target, until)
    for i, (t_start, n) in enumerate(zip((100, 102), n_kept, strict=True)):
        assert rows_of(target / f"{t_start}.{i}.monitor.csv") == rows_of(source / f"{i}.monitor.csv")[:n]


def test_copies_are_to_the_letter(source: Path, target: Path) -> None:
    carry_over_monitor_files(source, target, LATE)
    assert names(target) == ["100.0.monitor.csv", "102.1.monitor.csv"]
    for i, name in enumerate(names(target)):
        assert (target / name).read_bytes() == (source / f"{i}.monitor.csv").read_bytes()
    assert names(source) == ["0.monitor.csv", "1.monitor.csv"]


def test_sb3_reads_copies_and_new_files_together(source: Path, target: Path) -> None:
    carry_over_monitor_files(source, target, 105.0)
    write_monitor(target / "0.monitor.csv", 200.0, ["7.0,7,2.0"])
    write_monitor(target / "1.monitor.csv", 200.0, ["8.0,8,1.0"])
    results = load_results(str(target))
    assert results["l"].tolist() == [10, 20, 10, 8, 7]
    assert results["t"].tolist() == [1.0, 3.0, 5.0, 101.0, 102.0]  # since the very beginning


def test_copies_of_copies_keep_their_name(source: Path, target: Path, tmp_path: Path) -> None:
    carry_over_monitor_files(source, target, LATE)
    write_monitor(target / "0.monitor.csv", 200.0, ["7.0,7,2.0"])
    third = tmp_path / "CartPole-v1_3"
    third.mkdir()
    carry_over_monitor_files(target, third, LATE)
    assert names(third) == ["100.0.monitor.csv", "102.1.monitor.csv", "200.0.monitor.csv"]
    assert load_results(str(third))["l"].tolist() == [10, 20, 10, 5, 7]


LAST = "12.5,13,6.789"


@pytest.mark.parametrize("n_bytes", range(len(LAST) + 1))
def test_a_half_written_row_is_left_out(n_bytes: int, source: Path, target: Path) -> None:
    """Without the line's end nobody knows whether "6.7" is all of the number."""
    with (source / "0.monitor.csv").open("a", newline="") as file:
        file.write(LAST[:n_bytes])
    carry_over_monitor_files(source, target, LATE)
    assert rows_of(target / "100.0.monitor.csv") == ["10.0,10,1.0", "10.0,10,5.0"]
    assert load_results(str(target))["l"].tolist() == [10, 20, 10, 5]


def test_extra_columns(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "Reach_1"
    rows = ["1.0,10,1.0,True,a", '2.0,10,2.0,False,"b, c"']
    write_monitor(source / "0.monitor.csv", 100.0, rows, columns="r,l,t,is_success,name")
    carry_over_monitor_files(source, target, LATE)
    assert rows_of(target / "100.0.monitor.csv") == rows
    assert load_results(str(target))["is_success"].tolist() == [True, False]


def test_no_monitor_files(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "empty"
    source.mkdir()
    (source / "CartPole-v1.zip").touch()
    carry_over_monitor_files(source, target, LATE)
    assert names(target) == []


@pytest.mark.parametrize("text", ["", "#{}", '#{"t_start": 100.0}\n', '#{"t_start": 100.0}\nr,l'])
def test_files_without_a_table_are_left_out(text: str, source: Path, target: Path) -> None:
    (source / "0.monitor.csv").write_text(text)
    carry_over_monitor_files(source, target, LATE)
    assert names(target) == ["102.1.monitor.csv"]


def test_no_episode_has_ended(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "CartPole-v1_1"
    write_monitor(source / "0.monitor.csv", 100.0, [])
    carry_over_monitor_files(source, target, LATE)
    assert rows_of(target / "100.0.monitor.csv") == []
    assert len(load_results(str(target))) == 0


def test_in_the_same_folder_there_are_only_copies_afterwards(source: Path) -> None:
    whole = [(source / f"{i}.monitor.csv").read_bytes() for i in range(2)]
    with (source / "0.monitor.csv").open("a", newline="") as file:
        file.write(LAST[:3])
    (source / "2.monitor.csv").touch()  # killed before its first line
    for _ in range(2):
        carry_over_monitor_files(source, source)
        assert names(source) == ["100.0.monitor.csv", "102.1.monitor.csv"]
        assert [(source / name).read_bytes() for name in names(source)] == whole
    for i in range(2):
        write_monitor(source / f"{i}.monitor.csv", 200.0, [f"{i}.0,7,2.0"])
    results = load_results(str(source))
    assert results["l"].tolist() == [10, 20, 10, 5, 7, 7]
    assert results["t"].tolist() == [1.0, 3.0, 5.0, 6.0, 102.0, 102.0]


@pytest.mark.parametrize("name", ["train_0.monitor.csv", "monitor.csv"])
def test_whatever_the_files_are_called_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    for begin in (100.0, 200.0, 300.0):
        write_monitor(tmp_path / name, begin, [f"{begin},7,2.0"])
        carry_over_monitor_files(tmp_path, tmp_path)
        assert not (tmp_path / name).exists()
    assert load_results(str(tmp_path))["r"].tolist() == [100.0, 200.0, 300.0]


@pytest.mark.parametrize("moment", range(4))
def test_killed_before_each_change_of_the_folder(moment: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies are made, then two files go."""
    left = moment

    def until_killed(change: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Path, *args: Any, **kwargs: Any) -> None:
            nonlocal left
            if path.suffix == ".csv":
                if left == 0:
                    raise KilledError
                left -= 1
            change(path, *args, **kwargs)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_whole", until_killed(write_whole))
        patch.setattr(Path, "unlink", until_killed(Path.unlink))
        with pytest.raises(KilledError):
            carry_over_monitor_files(source, source)
    carry_over_monitor_files(source, source)
    assert load_results(str(source))["l"].tolist() == [10, 20, 10, 5]


# --- the Atari example ----------------------------------------------------------------------------------------------

GAME = "BreakoutNoFrameskip-v4"  # random games are short
SAVE_FREQ = 400
OPTIONS = ["--env", GAME, "--n-envs", "4", "--n-workers", "2", "--save-freq", str(SAVE_FREQ)]


@contextlib.contextmanager
def example(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The example as it runs; it is killed at the end, and its workers are soon gone."""
    with (folder / "output.txt").open("wb") as output:
        command = [sys.executable, str(EXAMPLE), *OPTIONS, *options]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        own = {process.pid, os.getpid()}
        workers = {pid for pid, parent in processes_in(folder).items() if pid != process.pid and parent not in own}
        process.kill()
        process.wait()
        killed = time.monotonic()
        while running := processes_in(folder):
            # workers take less than a second, the fork server more (it may be importing torch); busy machines are slower
            assert time.monotonic() < killed + (20 if workers & set(running) else 60)
            time.sleep(0.05)


def processes_in(folder: Path) -> dict[int, int]:
    """:return: ids of processes whose working directory this is, and of their parents"""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if Path(os.readlink(path / "cwd")) == folder:
                found[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/a3c_*_steps.zip"))


def episodes(folder: Path) -> set[tuple[float, ...]]:
    """:return: when each one ended, its return and its length, of all whole lines in monitor files"""
    found: set[tuple[float, ...]] = set()
    for path in folder.glob("*.monitor.csv"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[2:]:
            score, length, seconds = map(float, line.split(","))
            found.add((round(json.loads(lines[0][1:])["t_start"] + seconds, 3), score, length))
    return found


class RolloutFinished(NamedTuple):
    """What a model has behind it."""

    timesteps: int
    updates: int
    moments: float  #: how many steps they are of
    rewards: float  #: how many the statistics are of


def progress(path: Path, normalize: bool) -> RolloutFinished:
    model = A3C.load(path)
    moments = [float(state["step"]) for state in model.policy.optimizer.state.values()]
    count = 0.0
    if normalize:
        with statistics_path(path).open("rb") as file:
            count = pickle.load(file).ret_rms.count
        # workers are ahead of what callbacks have seen, at each checkpoint that was gone on from
        assert model.num_timesteps <= count < model.num_timesteps + 5 * SAVE_FREQ
    assert 0.8 * model._n_updates < min(moments) <= max(moments) <= model._n_updates + 10  # Hogwild may lose a few
    return RolloutFinished(model.num_timesteps, model._n_updates, min(moments), count)


def check_monitor_files(folder: Path, before: set[tuple[float, ...]]) -> None:
    """They hold what they held, and SB3 reads what they hold, in the order in which it happened."""
    after = episodes(folder)
    assert before <= after
    results = load_results(str(folder))
    in_order = [(score, length) for _, score, length in sorted(after)]
    assert list(zip(results["r"], results["l"], strict=True)) == in_order
    assert len(list(folder.glob("[0-9].monitor.csv"))) == 4


@pytest.mark.slow
def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    """The newest checkpoint's statistics, a line of a monitor file and the evaluations are cut off as well."""
    folder = tmp_path / "logs" / GAME
    generator = np.random.default_rng(1)
    with example(tmp_path, "--normalize-reward", "--eval-freq", "1000000") as process:
        wait_until(lambda: len(checkpoints(folder)) > 1 and len(episodes(folder)) > 0, process, tmp_path)
        time.sleep(generator.uniform(0, 0.5))
        assert len(processes_in(tmp_path)) >= 4  # with the fork server and two workers
    newest = newest_model(folder, with_statistics=True)
    assert newest is not None
    cut(statistics_path(newest))
    (folder / "evaluations.npz").write_bytes(b"PK")
    with (folder / "0.monitor.csv").open("a", newline="") as file:
        file.write("7.0,10")
    start = newest_model(folder, with_statistics=True)
    assert start not in (None, newest)
    before, played = progress(start, normalize=True), episodes(folder)

    timesteps = before.timesteps + SAVE_FREQ + 200
    with example(tmp_path, "--resume", "--timesteps", str(timesteps), "--eval-freq", str(SAVE_FREQ)) as process:
        process.wait(120)
    output = (tmp_path / "output.txt").read_text()
    assert process.returncode == 0, output
    assert f"Passed over: {statistics_path(newest).relative_to(tmp_path)} " in output
    assert f"Going on from {start.relative_to(tmp_path)}\n" in output
    assert "evaluations begin anew" in output
    after = progress(folder / "model.zip", normalize=True)
    assert timesteps <= after.timesteps < timesteps + 200
    assert all(new > old for new, old in zip(after, before, strict=True))
    check_monitor_files(folder, played)
    with np.load(folder / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [before.timesteps + SAVE_FREQ]
        assert (evaluations["results"] % 1 == 0).all()  # scores, not what was learned from
    assert [path.name for path in folder.glob("A3C_*")] == ["A3C_1"]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_killed_again_and_again(normalize: bool, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / GAME
    generator = np.random.default_rng(int(normalize))
    options = ["--eval-freq", "1500", *(["--normalize-reward"] if normalize else [])]
    before, played = RolloutFinished(0, 0, 0.0, 0.0), set[tuple[float, ...]]()
    for i in range(6):
        with example(tmp_path, *options) as process:
            if i == 0:
                wait_until(lambda: len(checkpoints(folder)) > 0, process, tmp_path)
                time.sleep(generator.uniform(0, 5))
            else:
                time.sleep(generator.uniform(0, 15))  # also while it starts
        assert process.returncode == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        start = newest_model(folder, with_statistics=normalize)
        assert start is not None
        now = progress(start, normalize)
        assert all(new >= old for new, old in zip(now, before, strict=True))
        assert played <= episodes(folder)
        before, played = now, episodes(folder)
        options = ["--eval-freq", "1500", "--resume"]
    with example(tmp_path, *options, "--timesteps", str(before.timesteps + 1000)) as process:
        process.wait(120)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()
    after = progress(folder / "model.zip", normalize)
    assert all(new > old or new == old == 0 for new, old in zip(after, before, strict=True))
    check_monitor_files(folder, played)


@pytest.fixture
def functions() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_the_example_says_what_to_do(functions: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    arguments = argparse.Namespace(normalize_reward=False)
    assert functions["find_start"](arguments, run_folder) == checkpoint(run_folder, 120)
    assert arguments.normalize_reward  # the run has statistics
    for path in run_folder.glob("**/*.pkl"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"run is one without --normalize-reward: go on without it, or begin a new run"):
        functions["find_start"](arguments, run_folder)
    assert functions["find_start"](argparse.Namespace(normalize_reward=False), run_folder) == checkpoint(run_folder, 120)
    for path in run_folder.glob("**/*.zip"):
        cut(path)
    for folder in (run_folder, tmp_path / "nothing"):
        with pytest.raises(SystemExit, match=rf"no model in {folder} that can be loaded: train one first, without --resume"):
            functions["find_start"](argparse.Namespace(normalize_reward=False), folder)


def test_a_run_before_is_moved_aside(functions: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / GAME
    for i in range(2):
        folder.mkdir()
        (folder / f"{i}.monitor.csv").touch()
        functions["move_aside"](folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{GAME}_1", f"{GAME}_2"]
    assert (tmp_path / f"{GAME}_2" / "1.monitor.csv").exists()
