"""The examples: each runs without warnings, and saves the files that it should."""

import ast
import importlib.util
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results

from sb3_a3c import A3C
from sb3_a3c.resume import load_statistics

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ["quick_start", "callbacks", "vec_normalize", "curriculum", "custom_network"]
N_ENVS = 8


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example as ``__main__`` of this process, in which torch is imported and a fork server runs already."""

    def run_in_this_process(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_in_this_process


def load(path: Path, timesteps: int, n_steps: int = 20) -> A3C:
    model = A3C.load(path)
    assert timesteps <= model.num_timesteps <= timesteps + n_steps * N_ENVS
    assert model._n_updates > 0
    return model


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short_and_need_no_main_guard(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    tree = ast.parse(source)
    assert "__name__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert f"python examples/{name}.py [timesteps]" in docstring
    assert len(source.splitlines()) <= 80


def test_quick_start(tmp_path: Path) -> None:
    """In its own process, which must end without warnings, such as of files left open."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / "quick_start.py"), "2000"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "Return of 20 episodes: " in result.stdout
    assert "One more episode: " in result.stdout
    model = load(tmp_path / "logs/quick_start/model.zip", 2_000)
    assert model.predict(np.zeros((3, 4), dtype=np.float32))[0].shape == (3,)


def test_callbacks(run: Callable[..., str], tmp_path: Path) -> None:
    output = run("callbacks", "5500")
    folder = tmp_path / "logs/callbacks"
    with np.load(folder / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [5_000]
        best = float(np.mean(evaluations["results"]))
    assert f"Best evaluation: {best:.1f}, after " in output
    assert A3C.load(folder / "best_model.zip").num_timesteps == 5_000
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["a3c_5000_steps.zip"]
    (events,) = (folder / "A3C_1").glob("events.*")
    written = events.read_bytes()
    for expected in (b"_hparams_/session_start_info", b"ent_coef", b"eval/mean_reward", b"rollout/n_episodes"):
        assert expected in written


def test_vec_normalize(run: Callable[..., str], tmp_path: Path) -> None:
    output = run("vec_normalize", "2000")
    assert "Return of 20 episodes: " in output
    folder = tmp_path / "logs/vec_normalize"
    load(folder / "model.zip", 2_000, n_steps=100)
    env = load_statistics(folder / "model.zip", make_vec_env("MountainCarContinuous-v0"))
    assert not isinstance(env.obs_rms, dict)
    assert env.obs_rms.count >= 2_000
    position, velocity = env.obs_rms.mean
    assert -1.2 < position < 0.0  # the valley's bottom is at -0.5
    assert abs(velocity) < 0.02
    assert 0 < env.obs_rms.var[1] < 0.07**2  # 0.07 is the top speed
    env.close()


def test_curriculum(run: Callable[..., str], tmp_path: Path) -> None:
    output = run("curriculum", "17000")  # the logger's first table comes after 16,000
    (line,) = (line for line in output.splitlines() if line.startswith("Difficulty at the end: "))
    levels = ast.literal_eval(line.removeprefix("Difficulty at the end: "))
    assert len(levels) == N_ENVS
    assert len(set(levels)) == 1
    assert levels[0] >= 5
    length = re.search(r"ep_len_mean +\| +([\d.]+)", output)
    assert length is not None
    assert float(length[1]) > 2  # the first difficulty's episodes take 1 or 2 steps: the workers' environments became harder
    load(tmp_path / "logs/curriculum/model.zip", 17_000)


def test_custom_network(run: Callable[..., str], tmp_path: Path) -> None:
    output = run("custom_network", "2000")
    assert "(features_extractor): Extractor(" in output  # print(model.policy)
    assert "(lstm): LSTM(32, 64)" in output
    model = load(tmp_path / "logs/custom_network/model.zip", 2_000, n_steps=32)
    assert isinstance(model.policy.optimizer, th.optim.AdamW)
    assert type(model.policy.features_extractor).__name__ == "Extractor"
    action, state = model.predict(np.zeros((3, 2), dtype=np.float32))
    assert action.shape == (3,)
    assert state is not None
    assert state[0].shape == (1, 3, 64)


ATARI = ["--env", "BreakoutNoFrameskip-v4", "--n-envs", "4", "--save-freq", "200", "--seed", "1"]  # random games are short


def test_train_atari(run: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "BreakoutNoFrameskip-v4"
    output = run("train_atari", *ATARI, "--timesteps", "400")
    assert "%" in output  # the progress bar
    first = A3C.load(folder / "model.zip")
    assert 400 <= first.num_timesteps <= 480
    assert len(list(folder.glob("*.monitor.csv"))) == 4
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"a3c_200_steps.zip", "a3c_400_steps.zip"}
    assert list(folder.glob("A3C_*/events.*"))
    episodes = load_results(str(folder))["l"].tolist()

    run("train_atari", *ATARI, "--timesteps", "800", "--resume")
    second = A3C.load(folder / "model.zip")
    assert 800 <= second.num_timesteps <= 880
    assert second._n_updates > first._n_updates
    steps = [float(state["step"]) for state in second.policy.optimizer.state.values()]
    assert all(step > first._n_updates * 0.9 for step in steps)  # continued from the saved moments (Hogwild may lose a few)
    assert len(list(folder.glob("*.monitor.csv"))) == 8
    assert load_results(str(folder))["l"].tolist()[: len(episodes)] == episodes

    output = run("train_atari", *ATARI, "--record", "game.mp4")
    assert (tmp_path / "game.mp4").stat().st_size > 10_000
    assert "steps in game.mp4" in output


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_train_atari(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(EXAMPLES / "train_atari.py"), *ATARI, "--timesteps", "1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        timer = threading.Timer(100.0, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("A3C starts"):
                process.send_signal(signal.SIGINT)
                break
        output = process.stdout.read()
        timer.cancel()
    assert process.returncode == 130
    assert "Traceback" not in output
    last = output.rstrip().splitlines()[-1]
    assert re.search(r"Saved logs/\S+/model\.zip after \d+ timesteps\. Continue with --resume$", last)
    A3C.load(next(tmp_path.glob("logs/*/model.zip")))


def test_train_atari_records_gifs(tmp_path: Path) -> None:
    """Of CartPole, as a GIF of hundreds of frames takes seconds."""
    env = make_vec_env("CartPole-v1", seed=0, env_kwargs={"render_mode": "rgb_array"})
    model = A3C("MlpPolicy", env, seed=0)
    runpy.run_path(str(EXAMPLES / "train_atari.py"))["record"](model, env, tmp_path / "game.gif")
    assert (tmp_path / "game.gif").read_bytes().startswith(b"GIF89a")
    env.close()


def test_train_atari_in_bfloat16(run: Callable[..., str], tmp_path: Path) -> None:
    run("train_atari", *ATARI, "--timesteps", "80", "--bfloat16")
    model = A3C.load(tmp_path / "logs" / "BreakoutNoFrameskip-v4" / "model.zip")  # as --resume does
    assert vars(model.policy.features_extractor)["dtype"] == th.bfloat16


def test_train_atari_without_a_model(run: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="train one first"):
        run("train_atari", "--play")


def test_results_keep_a_commit_that_looks_like_a_number(tmp_path: Path) -> None:
    update_csv = runpy.run_path(str(EXAMPLES / "results" / "reproduce.py"))["update_csv"]
    for seed in (1, 2):
        update_csv(tmp_path / "evaluations.csv", [{"seed": seed, "commit": "18347e6"}], ["seed"])
    assert (tmp_path / "evaluations.csv").read_text().splitlines() == ["seed,commit", "1,18347e6", "2,18347e6"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_seeds_are_aggregated(tmp_path: Path) -> None:
    """In a virtual environment of its own, as the script says."""
    subprocess.run([sys.executable, "-m", "venv", "venv"], cwd=tmp_path, check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "rliable", "pandas<3"], check=True, timeout=500)
    (tmp_path / "pong").mkdir()
    scores = [19.4, 1.0, 19.6, 19.5, 20.0]
    lines = ["algo,seed,actions,mean", *(f"a3c,{seed},sampled,{score}" for seed, score in enumerate(scores))]
    (tmp_path / "pong" / "evaluations.csv").write_text("\n".join([*lines, "ppo,1,sampled,18.0"]))
    command = [python, str(EXAMPLES / "results" / "aggregate.py"), "--folder", str(tmp_path), "--samples", "2000"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, line = output.splitlines()  # one seed of PPO is too few
    assert line.startswith("| pong | a3c | sampled | 5 | 19.5 (1.0 to 20.0) | 19.5 (")  # the mean of 19.4, 19.5 and 19.6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_results_are_reproduced_quickly(tmp_path: Path) -> None:
    """Every row for a moment: curves, evaluations and pictures are there, and those of the project are left alone."""
    script = EXAMPLES / "results" / "reproduce.py"
    before = {path: path.stat().st_mtime for path in script.parent.rglob("*")}
    subprocess.run([sys.executable, str(script), "all", "--quick"], cwd=tmp_path, check=True, timeout=1000)
    assert {path: path.stat().st_mtime for path in script.parent.rglob("*")} == before
    quick = tmp_path / "logs" / "quick"
    evaluations = [pd.read_csv(path) for path in quick.glob("*/evaluations.csv")]
    assert sum(map(len, evaluations)) == 2 * 14
    for table in evaluations:
        assert set(table["actions"]) == {"sampled", "most probable"}
        assert (table["timesteps"] >= 2000).all()
    assert len(list(quick.glob("*/curves.png"))) == len(evaluations)
    curve = pd.read_csv(quick / "cartpole-v1" / "a3c_seed1.csv")
    assert curve["timesteps"].is_monotonic_increasing
    assert curve["timesteps"].iloc[-1] == pytest.approx(2000, abs=300)
    assert curve["return"].between(9, 200).all()
    command = [
        sys.executable,
        str(script.with_name("trained_agent.py")),
        "pong",
        "--logs",
        "logs/quick",
        "--folder",
        "trained",
    ]
    subprocess.run([*command, "--steps", "30"], cwd=tmp_path, check=True, timeout=100)
    kept = tmp_path / "trained" / "a3c" / "PongNoFrameskip-v4_1"
    assert (kept / "PongNoFrameskip-v4.zip").stat().st_size < 7e6
    assert (kept / "PongNoFrameskip-v4.gif").read_bytes().startswith(b"GIF89a")
    command = [sys.executable, "-m", "sb3_a3c.zoo", "enjoy", "--env", "PongNoFrameskip-v4", "-f", "trained", "--no-render"]
    subprocess.run([*command, "-n", "100"], cwd=tmp_path, check=True, timeout=100)


@pytest.mark.slow
def test_cluster(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e .[cluster]")
    command = [sys.executable, "-W", "error", str(EXAMPLES / "cluster.py"), "6000"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    of_hosts = re.findall(r"^Host with agent \d+: (\d+) timesteps by 2 workers$", result.stdout, re.MULTILINE)
    counts = [int(n) for n in of_hosts]
    assert len(counts) == 3 and 5900 < sum(counts) <= 7000
    assert "Return of 20 episodes: " in result.stdout
