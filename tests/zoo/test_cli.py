"""RL Zoo's commands with A3C, as users run them, with the files that a wheel holds."""

import contextlib
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import stable_baselines3
import torch as th
from moviepy import VideoFileClip
from rl_zoo3 import ALGOS, hyperparams_opt
from rl_zoo3 import train as train_module
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import A2C
from stable_baselines3.common.monitor import load_results

import sb3_a3c
from sb3_a3c import A3C
from sb3_a3c.zoo import cli as zoo
from sb3_a3c.zoo.experiment_manager import A3CExperiment, Experiment

CHECKOUT = Path(__file__).parents[2]
CARTPOLE = ["--env", "CartPole-v1"]
N_STEPS, N_ENVS = 16, 4
#: Two workers and a small network.
FAST = ["-params", f"n_envs:{N_ENVS}", f"n_steps:{N_STEPS}", "n_workers:2", "policy_kwargs:dict(net_arch=[16])"]
TRAIN = ["train", *CARTPOLE, "-n", "1200", "--eval-freq", "500", "--eval-episodes", "2", *FAST]

#: The commands that share one run's files, with their defaults: A3C, and the folder ``logs``. "train" is run twice, as some
#: plots need several runs.
COMMANDS = {
    "train": [*TRAIN, "-P", "--save-freq", "600", "--tensorboard-log", "tb"],
    "train again": TRAIN,
    "train a2c": ["train", "--algo", "a2c", "--env", "CartPole-v1", "-n", "200", "--eval-freq", "-1", "-f", "sb3"],
    "enjoy": ["enjoy", *CARTPOLE, "--no-render", "-n", "600"],
    "enjoy a2c": ["enjoy", "--algo", "a2c", *CARTPOLE, "-f", "sb3", "--no-render", "-n", "10"],
    "record_video": ["record_video", *CARTPOLE, "-n", "30", "-o", "videos"],
    "plot_train": ["plot_train", "-e", "CartPole-v1", "-w", "5"],
    "all_plots": ["all_plots", "-e", "CartPole-v1", "-o", "results", "-print"],
    "plot_from_file": ["plot_from_file", "-i", "results", "-o", "figure.png", "--format", "png", "-b"],
    "benchmark": ["benchmark", "--benchmark-dir", "benchmark", "-n", "300"],
    "train FrozenLake": ["train", "--env", "FrozenLake-v1", "-n", "2000"],
    "enjoy FrozenLake": ["enjoy", "--env", "FrozenLake-v1", "--no-render", "-n", "300"],
}

#: Most of a command's time is imports, so one process runs all of them.
RUN_ALL = """
import sys

from matplotlib import pyplot

from sb3_a3c.zoo import main

for name, arguments in COMMANDS.items():
    print("\\n=== " + name, flush=True)
    sys.argv = ["sb3-a3c", *arguments]
    main()
    pyplot.close("all")
"""


class Zoo:
    """A working folder, and commands that import the package from ``site``."""

    def __init__(self, site: Path, folder: Path) -> None:
        self.site = site
        self.folder = folder
        hidden = {"MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY"}  # no screen
        self.environ = {key: value for key, value in os.environ.items() if key not in hidden} | {"PYTHONPATH": str(site)}

    def run(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "sb3_a3c.zoo", *arguments)

    def call(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=150, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    def run_folder(self, number: int = 1) -> Path:
        return self.folder / "logs" / "a3c" / f"CartPole-v1_{number}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel. They are made from a copy, as setuptools writes into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(CHECKOUT / "sb3_a3c", folder / "sb3_a3c", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", "site"]
    subprocess.run(command, cwd=folder, timeout=120, check=True)
    return folder / "site"


@pytest.fixture
def fresh(site: Path, tmp_path: Path) -> Zoo:
    return Zoo(site, tmp_path)


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(site, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def outputs(trained: Zoo) -> dict[str, str]:
    """What each of the commands prints."""
    output = trained.call(sys.executable, "-c", f"COMMANDS = {COMMANDS!r}\n{RUN_ALL}")
    printed = {}
    for section in output.split("\n=== ")[1:]:
        name, _, printed[name] = section.partition("\n")
    assert list(printed) == list(COMMANDS)
    return printed


def frames(path: Path) -> int:
    """Number of a video's frames; the first is a picture of something."""
    with VideoFileClip(str(path)) as clip:
        assert np.ptp(clip.get_frame(0)) > 100
        return int(clip.duration * clip.fps + 0.5)


def is_picture(path: Path) -> bool:
    return float(np.ptp(plt.imread(path)[..., :3])) > 0.5


def rows_of(folder: Path) -> list[list[str]]:
    """All episodes in a folder's monitor files."""
    lines = [line for path in folder.glob("*.monitor.csv") for line in path.read_text().splitlines()[2:]]
    return [line.split(",") for line in lines]


def test_train(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "%" in outputs["train"]  # the progress bar
    assert f"Loading hyperparameters from: {trained.site}/sb3_a3c/zoo/hyperparams/a3c.yml\n" in outputs["train"]
    for number in (1, 2):
        folder = trained.run_folder(number)
        assert 1200 <= A3C.load(folder / "CartPole-v1.zip").num_timesteps <= 1200 + N_ENVS * N_STEPS
        with np.load(folder / "evaluations.npz") as evaluations:
            assert evaluations["timesteps"].tolist() == [500, 1000]
            assert evaluations["results"].shape == (2, 2)
        assert (folder / "best_model.zip").exists()
        assert len(list(folder.glob("*.monitor.csv"))) == N_ENVS
        assert len(load_results(str(folder))) > 0
        assert (folder / "CartPole-v1" / "config.yml").exists()
    checkpoints = {path.name for path in trained.run_folder().glob("rl_model_*")}
    assert checkpoints == {"rl_model_600_steps.zip", "rl_model_1200_steps.zip"}
    (events,) = (trained.folder / "tb" / "CartPole-v1").glob("A3C_1/events.*")
    assert b"eval/mean_reward" in events.read_bytes()


def test_algorithms_of_sb3_have_their_own_hyperparameters(trained: Zoo, outputs: dict[str, str]) -> None:
    assert re.search(r"Loading hyperparameters from: .*/rl_zoo3/hyperparams/a2c\.yml\n", outputs["train a2c"])
    assert A2C.load(trained.folder / "sb3" / "a2c" / "CartPole-v1_1" / "CartPole-v1.zip").num_timesteps >= 200
    assert "Loading sb3/a2c/CartPole-v1_1/CartPole-v1.zip" in outputs["enjoy a2c"]


def test_enjoy(outputs: dict[str, str]) -> None:
    assert "Loading logs/a3c/CartPole-v1_2/CartPole-v1.zip" in outputs["enjoy"]
    reward = re.search(r"Mean reward: ([\d.]+) ", outputs["enjoy"])
    assert reward is not None
    assert 8 < float(reward[1]) <= 500


def test_default_hyperparameters_with_discrete_observations(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "Using 'default' hyperparameters" in outputs["train FrozenLake"]
    assert "Normalization activated: {'norm_obs': False}" in outputs["train FrozenLake"]
    assert A3C.load(trained.folder / "logs" / "a3c" / "FrozenLake-v1_1" / "FrozenLake-v1.zip").num_timesteps >= 2000
    assert "Mean reward: " in outputs["enjoy FrozenLake"]


def test_record_video(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "Saving video to " in outputs["record_video"]
    (video,) = (trained.folder / "videos").glob("*.mp4")
    assert video.name.startswith("final-model-a3c-CartPole-v1")
    assert frames(video) == 31


def test_plots(trained: Zoo, outputs: dict[str, str]) -> None:
    """``plot_from_file`` needs at least two runs with the same number of evaluations, of several episodes each."""
    assert "Saved plot_train_1.png" in outputs["plot_train"]
    assert "CartPole-v1-A3C-logs: 2" in outputs["all_plots"]
    assert "Saved all_plots_1.png" in outputs["all_plots"]
    assert "keys: ['A3C-logs']" in outputs["plot_from_file"]
    assert "Saved plot_from_file_3.png" in outputs["plot_from_file"]
    for name in ("plot_train_1", "all_plots_1", "figure", "plot_from_file_1", "plot_from_file_2", "plot_from_file_3"):
        assert is_picture(trained.folder / f"{name}.png")
    results = pickle.loads((trained.folder / "results.pkl").read_bytes())["CartPole-v1"]["A3C-logs"]
    assert results["timesteps"].tolist() == [500, 1000]
    means = [np.load(trained.run_folder(number) / "evaluations.npz")["results"][-1].mean() for number in (1, 2)]
    assert sorted(results["last_evals"]) == pytest.approx(sorted(means))


def test_benchmark(trained: Zoo, outputs: dict[str, str]) -> None:
    """It evaluates the models of ``logs``, and looks for none on a hub."""
    assert "Error" not in outputs["benchmark"]
    assert "1/1\n" in outputs["benchmark"]
    table = (trained.folder / "benchmark.md").read_text()
    assert re.search(r"\|a3c *\|CartPole-v1\| +[\d.]+\|", table)
    episodes = load_results(str(trained.folder / "benchmark" / "a3c-CartPole-v1"))
    assert f"Mean reward: {episodes['r'].mean():.2f} " in outputs["benchmark"]


@pytest.mark.slow
@pytest.mark.usefixtures("outputs")
def test_record_training(trained: Zoo, fresh: Zoo) -> None:
    """Only of the final model and one checkpoint, as each takes a process."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    (fresh.folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    fresh.environ["PATH"] = f"{fresh.folder}{os.pathsep}{fresh.environ['PATH']}"
    ignored = shutil.ignore_patterns("best_model.zip", "rl_model_1200_steps.zip", "*.monitor.csv")
    shutil.copytree(trained.run_folder(), fresh.run_folder(), ignore=ignored)
    fresh.run("record_training", *CARTPOLE, "-n", "20")
    videos = {path.name.split("-a3c-")[0]: path for path in (fresh.run_folder() / "videos").glob("*.mp4")}
    assert videos.keys() == {"checkpoint-600", "final-model", "training.mp4"}
    assert frames(videos["final-model"]) == frames(videos["checkpoint-600"]) == 21
    assert frames(videos["training.mp4"]) == 2 * 21


@pytest.mark.parametrize(
    ("vec_env", "output_is_read"),
    [
        pytest.param("subproc", False, marks=pytest.mark.slow),
        pytest.param("subproc", True, marks=pytest.mark.slow),
        ("dummy", False),
        pytest.param("dummy", True, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_saves_the_model(vec_env: str, output_is_read: bool, fresh: Zoo) -> None:
    """In a terminal, Ctrl-C also goes to the processes of environments, and to what reads the output (``| tee``)."""
    options = ["--eval-freq", "-1", "-n", "100000000", "--vec-env", vec_env, *FAST]
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_a3c.zoo", "train", *CARTPOLE, *options],
        cwd=fresh.folder,
        env=fresh.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the signal goes to all of its processes, and to no others
    )
    folder = fresh.run_folder()
    with contextlib.ExitStack() as stack:
        stack.callback(process.communicate)
        stack.callback(process.kill)
        deadline = time.monotonic() + 90
        while len(rows_of(folder)) < 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if not output_is_read:
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert not output_is_read or "Saving to logs/a3c/CartPole-v1_1" in output
    done = A3C.load(folder / "CartPole-v1.zip").num_timesteps
    assert done > 0
    paths = list(folder.glob("*.monitor.csv"))
    assert len(paths) == N_ENVS
    assert all(path.read_bytes().endswith(b"\n") for path in paths)
    rows = rows_of(folder)
    assert all(len(row) == 3 and float(row[0]) == float(row[1]) and float(row[2]) > 0 for row in rows)
    if vec_env == "dummy":  # what each worker was in the middle of is dropped
        assert sum(int(row[1]) for row in rows) <= done + N_ENVS * N_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("n_trials", [1, 2])  # with one, the best trial is number 0
def test_the_example_of_a_search(n_trials: int, fresh: Zoo) -> None:
    fresh.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{fresh.environ['PATH']}"
    output = fresh.call("bash", str(CHECKOUT / "examples" / "zoo_search.sh"), "CartPole-v1", str(n_trials), "1000", "2000")
    assert f"Number of finished trials:  {n_trials}" in output
    (model,) = (fresh.folder / "logs" / "a3c").glob("*/CartPole-v1.zip")
    trained = A3C.load(model)
    assert trained.num_timesteps >= 2000
    best = re.search(r"learning_rate: (\S+)", output)
    assert best is not None
    assert trained.learning_rate(1.0) == pytest.approx(float(best[1]))  # type: ignore[operator]


EVERYTHING = """
CartPole-v1:
  n_envs: 2
  n_workers: 2
  n_timesteps: 400
  policy: MlpLstmPolicy
  policy_kwargs: {lstm_hidden_size: 8}
  normalize: {norm_reward: false}
  frame_stack: 2
  env_wrapper:
    - mine.TimeFeatureWrapper
  vec_env_wrapper:
    - stable_baselines3.common.vec_env.VecCheckNan: {raise_exception: true}
  callback:
    - stable_baselines3.common.callbacks.CheckpointCallback: {save_freq: 100, save_path: checkpoints}
"""


@pytest.mark.slow
def test_wrappers_and_callbacks_of_a_file(fresh: Zoo) -> None:
    """The wrapper's module is in the working directory."""
    (fresh.folder / "mine.yml").write_text(EVERYTHING)
    (fresh.folder / "mine.py").write_text("from sb3_contrib.common.wrappers import TimeFeatureWrapper")
    options = ["--conf-file", "mine.yml", "--vec-env", "subproc", "--eval-freq", "-1"]
    output = fresh.call(str(Path(sys.executable).parent / "sb3-a3c"), "train", *CARTPOLE, *options)
    assert "Loading hyperparameters from: mine.yml" in output
    model = A3C.load(fresh.run_folder() / "CartPole-v1.zip")
    assert model.observation_space.shape == ((4 + 1) * 2,)  # the time, two frames
    assert model.num_timesteps >= 400
    checkpoints = {path.name for path in (fresh.folder / "checkpoints").iterdir()}
    assert checkpoints >= {"rl_model_200_steps.zip", "rl_model_400_steps.zip"}
    statistics: Any = pickle.loads((fresh.run_folder() / "CartPole-v1" / "vecnormalize.pkl").read_bytes())
    assert statistics.obs_rms.mean.shape == (5,)
    assert statistics.obs_rms.count >= 400
    assert not statistics.norm_reward
    assert "Mean reward" in fresh.run("enjoy", *CARTPOLE, "--no-render", "-n", "100")


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, what `register` does is undone."""
    for known in (ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER):
        monkeypatch.setitem(known, "a3c", None)
        del known["a3c"]
    monkeypatch.setattr(train_module, "ExperimentManager", ExperimentManager)


@pytest.mark.parametrize("program", ["/usr/bin/sb3-a3c", "/site/sb3_a3c/zoo/__main__.py"])
def test_wrong_commands(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "sb3-a3c" if program.endswith("sb3-a3c") else "python -m sb3_a3c.zoo"
    for argument, message in (("fly", "invalid choice: 'fly'"), ("--algo", "arguments are required: command")):
        monkeypatch.setattr(sys, "argv", [program, argument])
        with pytest.raises(SystemExit) as ended:
            zoo.main()
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert f"{name}: error: " in errors and message in errors
        assert all(command in errors for command in ("train", "enjoy", "plot_train", "benchmark", "doctor"))


@pytest.mark.usefixtures("unregistered")
def test_help_is_rl_zoos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-a3c", "train", "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        zoo.main()
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: sb3-a3c train ")
    assert re.search(r"--algo \{[^}]*\ba3c\b[^}]*\}", output)


@pytest.mark.usefixtures("unregistered")
def test_register(tmp_path: Path) -> None:
    assert "a3c" not in ALGOS
    zoo.register()
    zoo.register()  # no harm
    assert ALGOS["a3c"] is A3C
    make: Any = vars(train_module)["ExperimentManager"]
    assert type(make(None, "a3c", "CartPole-v1", str(tmp_path))) is A3CExperiment
    assert type(make(None, "a2c", "CartPole-v1", str(tmp_path))) is Experiment


INSTALL = r"Install what it needs, in the checkout of sb3_a3c: pip install -c constraints\.txt -e \"\.\[zoo\]\"$"


def run_main(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``sb3-a3c`` in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sb3-a3c", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        zoo.main()
    return ended.value.code


def test_without_rl_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(ImportError, match=rf"^RL Zoo can't be imported \(.+\)\. {INSTALL}"):
        zoo.register()
    assert run_main("train", *CARTPOLE, monkeypatch=monkeypatch) == 1
    assert re.match(rf"sb3-a3c: error: RL Zoo can't be imported \(.+\)\. {INSTALL}", capsys.readouterr().err)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)  # it is not needed
    assert run_main("--version", monkeypatch=monkeypatch) == 0
    output = " ".join(capsys.readouterr().out.split())
    start = f"sb3_a3c {sb3_a3c.__version__}, Python {platform.python_version()}, torch {th.__version__}, "
    assert output.startswith(f"{start}stable-baselines3 {stable_baselines3.__version__}, ")


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)  # it is not needed
    assert run_main("doctor", "--env", "CartPol-v1", "--n-envs", "1", monkeypatch=monkeypatch) == 1
    assert "problem  environment    CartPol-v1 can't be made: NameNotFound: " in capsys.readouterr().out
    assert run_main("doctor", "--help", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("usage: sb3-a3c doctor [-h] [--env ID] ")


@pytest.mark.parametrize(
    ("arguments", "options", "offline"),
    [
        (["benchmark", "-n", "5"], ["--log-dir", "logs", "--no-hub", "-n", "5"], "1"),
        (["benchmark", "--no-hub"], ["--log-dir", "logs", "--no-hub", "--no-hub"], "1"),
        (["benchmark", "-n", "5", "--hub"], ["-n", "5"], None),  # as RL Zoo's
        (["record_training", "--algo", "ppo"], ["--algo", "a3c", "--folder", "logs", "--algo", "ppo"], None),
    ],
)
def test_only_benchmark_with_hub_may_download(
    arguments: list[str], options: list[str], offline: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_module(name: str, run_name: str) -> None:
        assert (name, run_name) == (f"rl_zoo3.{arguments[0]}", "__main__")
        sys.exit("called")

    monkeypatch.setattr("runpy.run_module", run_module)
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"})
    assert run_main(*arguments, monkeypatch=monkeypatch) == "called"
    assert sys.argv == [f"sb3-a3c {arguments[0]}", *options]
    assert os.environ.get("HF_HUB_OFFLINE") == offline


def test_other_programs_are_called_unchanged() -> None:
    before = subprocess.call
    with zoo._subprocesses_know_a3c():
        assert subprocess.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert subprocess.call is before
