"""RL Zoo's commands with A3C, as users type them: from a wheel that is installed outside the checkout."""

import csv
import importlib.metadata
import os
import pickle
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
from moviepy import VideoFileClip
from rl_zoo3 import ALGOS, hyperparams_opt
from rl_zoo3 import train as train_module
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import A2C
from stable_baselines3.common.monitor import load_results

from sb3_a3c import A3C
from sb3_a3c.zoo import cli as zoo
from sb3_a3c.zoo.experiment_manager import A3CExperiment

CHECKOUT = Path(__file__).parents[2]
CARTPOLE = ["--algo", "a3c", "--env", "CartPole-v1"]
N_STEPS, N_ENVS = 16, 4
#: Two workers and a small network.
FAST = ["-params", f"n_envs:{N_ENVS}", f"n_steps:{N_STEPS}", "n_workers:2", "policy_kwargs:dict(net_arch=[16])"]
TRAIN = ["train", *CARTPOLE, "-n", "1200", "--eval-freq", "500", "--eval-episodes", "2", *FAST]


class Zoo:
    """A folder to work in, and the wheel's commands."""

    def __init__(self, site: Path, folder: Path) -> None:
        self.site = site
        self.folder = folder
        hidden = {"MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY"}  # no screen, and nobody has said so
        self.environ = {key: value for key, value in os.environ.items() if key not in hidden} | {"PYTHONPATH": str(site)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sb3_a3c.zoo", *arguments]
        pipe = subprocess.PIPE
        # in a session of its own, so that a signal can be sent to all of its processes and to no others
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *arguments: str) -> str:
        return self.call(sys.executable, "-m", "sb3_a3c.zoo", *arguments)

    def run_together(self, *commands: list[str]) -> list[str]:
        """Commands that do not need each other: most of their time is spent on imports."""
        processes = [self.start(*arguments) for arguments in commands]
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (output, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output + errors
            assert "Traceback" not in errors
        return [output + errors for output, errors in outputs]

    def call(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed. The checkout stays as it is: the wheel is built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(CHECKOUT / "sb3_a3c", source / "sb3_a3c", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    # setuptools can make wheels by itself since 70.1; with an older one, pip fetches what pyproject.toml asks for
    new = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) >= (70, 1)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", *(["--no-build-isolation"] if new else []), "--wheel-dir", str(folder / "dist")]
    subprocess.run([*pip, "wheel", *options, str(source)], cwd=folder, timeout=120, check=True)
    (wheel,) = (folder / "dist").iterdir()
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], cwd=folder, timeout=120, check=True)
    return target


@pytest.fixture
def fresh(site: Path, tmp_path: Path) -> Zoo:
    return Zoo(site, tmp_path)


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two runs of equal length, one by ``python -m sb3_a3c.zoo``, one by ``sb3-a3c``."""
    commands = Zoo(site, tmp_path_factory.mktemp("trained"))
    output = commands.run(*TRAIN, "-P", "--save-freq", "600", "--tensorboard-log", "tb")
    assert "%" in output  # the progress bar
    assert f"Loading hyperparameters from: {site}/sb3_a3c/hyperparams/a3c.yml\n" in output
    commands.call(str(site / "bin" / "sb3-a3c"), *TRAIN)
    return commands


@pytest.fixture(scope="module")
def outputs(trained: Zoo) -> dict[str, str]:
    """What is said by the commands that only look at trained models."""
    benchmark = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "--test-mode", "-n", "300"]
    commands = [
        ["enjoy", *CARTPOLE, "-f", "logs", "--no-render", "-n", "600"],
        ["record_video", *CARTPOLE, "-f", "logs", "-n", "30", "-o", "videos"],
        ["plot_train", "-a", "a3c", "-e", "CartPole-v1", "-f", "logs", "-w", "5"],
        ["all_plots", "-a", "a3c", "-e", "CartPole-v1", "-f", "logs", "-o", "results", "-print"],
        ["benchmark", *benchmark],
    ]
    return dict(zip([command[0] for command in commands], trained.run_together(*commands), strict=True))


def frames(path: Path) -> int:
    """How many a video has; its first is a picture of something."""
    with VideoFileClip(str(path)) as clip:
        assert np.ptp(clip.get_frame(0)) > 100
        return int(clip.duration * clip.fps + 0.5)


def is_picture(path: Path) -> bool:
    return float(np.ptp(plt.imread(path)[..., :3])) > 0.5


def rows_of(folder: Path) -> list[list[str]]:
    """All episodes in a folder's monitor files, which may be written at this very moment."""
    lines = [line for path in folder.glob("*.monitor.csv") for line in path.read_text().splitlines()[2:]]
    return [line.split(",") for line in lines]


def run_of(commands: Zoo, number: int = 1) -> Path:
    return commands.folder / "logs" / "a3c" / f"CartPole-v1_{number}"


def test_the_wheel_is_what_runs(trained: Zoo) -> None:
    origin = "import importlib.util; print(importlib.util.find_spec('sb3_a3c').origin)"
    assert trained.call(sys.executable, "-c", origin).strip() == str(trained.site / "sb3_a3c" / "__init__.py")
    commands = [(run_of(trained, number) / "CartPole-v1" / "command.txt").read_text() for number in (1, 2)]
    assert "-m sb3_a3c.zoo train" in commands[0]
    assert f"{trained.site}/bin/sb3-a3c train" in commands[1]


def test_train_leaves_what_rl_zoo_leaves(trained: Zoo) -> None:
    for number in (1, 2):
        folder = run_of(trained, number)
        assert 1200 <= A3C.load(folder / "CartPole-v1.zip").num_timesteps <= 1200 + N_ENVS * N_STEPS
        with np.load(folder / "evaluations.npz") as evaluations:
            assert evaluations["timesteps"].tolist() == [500, 1000]
            assert evaluations["results"].shape == (2, 2)
        assert (folder / "best_model.zip").exists()
        assert len(list(folder.glob("*.monitor.csv"))) == N_ENVS
        assert len(load_results(str(folder))) > 0
        assert (folder / "CartPole-v1" / "config.yml").exists()
    assert {path.name for path in run_of(trained).glob("rl_model_*")} == {
        "rl_model_600_steps.zip",
        "rl_model_1200_steps.zip",
    }
    (events,) = (trained.folder / "tb" / "CartPole-v1").glob("A3C_1/events.*")
    assert b"eval/mean_reward" in events.read_bytes()


def test_enjoy(outputs: dict[str, str]) -> None:
    output = outputs["enjoy"]
    assert "Loading logs/a3c/CartPole-v1_2/CartPole-v1.zip" in output
    reward = re.search(r"Mean reward: ([\d.]+) ", output)
    assert reward is not None
    assert 8 < float(reward[1]) <= 500


def test_record_video(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "Saving video to " in outputs["record_video"]
    (video,) = (trained.folder / "videos").glob("*.mp4")
    assert video.name.startswith("final-model-a3c-CartPole-v1")
    assert frames(video) == 31


@pytest.mark.slow
def test_record_training(trained: Zoo, fresh: Zoo) -> None:
    """Fewer models than there are, as each has a process of its own: the final one and a checkpoint."""
    ignored = shutil.ignore_patterns("best_model.zip", "rl_model_1200_steps.zip", "*.monitor.csv")
    shutil.copytree(run_of(trained), run_of(fresh), ignore=ignored)
    fresh.run("record_training", *CARTPOLE, "-f", "logs", "-n", "20")
    videos = {path.name.split("-a3c-")[0]: path for path in (run_of(fresh) / "videos").glob("*.mp4")}
    assert videos.keys() == {"checkpoint-600", "final-model", "training.mp4"}
    assert frames(videos["final-model"]) == frames(videos["checkpoint-600"]) == 21
    assert frames(videos["training.mp4"]) == 2 * 21


def test_plot_train(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "Saved plot_train_1.png" in outputs["plot_train"]
    assert is_picture(trained.folder / "plot_train_1.png")


def test_all_plots(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "CartPole-v1-A3C-logs: 2" in outputs["all_plots"]
    assert "Saved all_plots_1.png" in outputs["all_plots"]
    assert is_picture(trained.folder / "all_plots_1.png")
    results = pickle.loads((trained.folder / "results.pkl").read_bytes())["CartPole-v1"]["A3C-logs"]
    assert results["timesteps"].tolist() == [500, 1000]
    means = [np.load(run_of(trained, number) / "evaluations.npz")["results"][-1].mean() for number in (1, 2)]
    assert sorted(results["last_evals"]) == pytest.approx(sorted(means))


@pytest.mark.usefixtures("outputs")
def test_plot_from_file(trained: Zoo) -> None:
    """It wants at least two runs with as many evaluations, of several episodes each: it is about their spread."""
    output = trained.run("plot_from_file", "-i", "results", "-o", "figure.png", "--format", "png", "-b")
    assert "keys: ['A3C-logs']" in output
    assert "Saved plot_from_file_3.png" in output
    for name in ("figure", "plot_from_file_1", "plot_from_file_2", "plot_from_file_3"):  # curves, sensitivity, boxes
        assert is_picture(trained.folder / f"{name}.png")


def test_benchmark(trained: Zoo, outputs: dict[str, str]) -> None:
    assert "Error" not in outputs["benchmark"]
    table = (trained.folder / "benchmark" / "benchmark.md").read_text()
    assert re.search(r"\|a3c *\|CartPole-v1\| +[\d.]+\|", table)
    episodes = load_results(str(trained.folder / "benchmark" / "a3c-CartPole-v1"))
    assert f"Mean reward: {episodes['r'].mean():.2f} " in outputs["benchmark"]


def train_until_ctrl_c(commands: Zoo, *options: str, read_on: bool = True) -> tuple[str, str]:
    """
    As in a terminal, where Ctrl-C goes to all processes of a command: also to those of environments, and to `tee`.

    :param commands: where
    :param options: for ``train``
    :param read_on: whether what reads the output survives
    :return: the output, if it was read, and errors
    """
    train = ["train", *CARTPOLE, "--eval-freq", "-1", "-n", "100000000", *options, *FAST]
    process = commands.start(*train)
    try:
        deadline = time.monotonic() + 90
        while len(rows_of(run_of(commands))) < 20:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if not read_on:
            assert process.stdout is not None
            process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60) if read_on else ("", process.stderr.read())  # type: ignore[union-attr]
        assert process.wait(timeout=60) == 0, errors
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
    assert "Traceback" not in errors
    return output, errors


def test_ctrl_c_saves_and_i_goes_on(fresh: Zoo) -> None:
    output, _ = train_until_ctrl_c(fresh)
    assert "Saving to logs/a3c/CartPole-v1_1" in output
    folder = run_of(fresh)
    done = A3C.load(folder / "CartPole-v1.zip").num_timesteps
    paths = list(folder.glob("*.monitor.csv"))
    assert len(paths) == N_ENVS
    assert all(path.read_bytes().endswith(b"\n") for path in paths)
    rows = rows_of(folder)
    assert all(len(row) == 3 and float(row[0]) == float(row[1]) and float(row[2]) > 0 for row in rows)
    assert sum(int(row[1]) for row in rows) <= done + N_ENVS * N_STEPS  # what each worker was in the middle of is dropped

    total = done + 1000
    output, _ = fresh.run_together(
        ["enjoy", *CARTPOLE, "-f", "logs", "--exp-id", "1", "--no-render", "-n", "600"],
        [
            *["train", *CARTPOLE, "--eval-freq", "-1", "-n", str(total)],
            *["-i", "logs/a3c/CartPole-v1_1/CartPole-v1.zip", *FAST],
        ],
    )
    assert "Mean reward" in output
    continued = run_of(fresh, 2)
    model = A3C.load(continued / "CartPole-v1.zip")
    assert total <= model.num_timesteps <= total + N_ENVS * N_STEPS
    before, lengths = (load_results(str(path))["l"].tolist() for path in (folder, continued))
    assert lengths[: len(before)] == before
    assert len(lengths) > len(before)


@pytest.mark.slow
def test_ctrl_c_that_ends_the_processes_of_environments_too(fresh: Zoo) -> None:
    output, _ = train_until_ctrl_c(fresh, "--vec-env", "subproc")
    assert "Saving to logs/a3c/CartPole-v1_1" in output
    assert A3C.load(run_of(fresh) / "CartPole-v1.zip").num_timesteps > 0


@pytest.mark.slow
def test_ctrl_c_that_ends_what_reads_the_output_too(fresh: Zoo) -> None:
    train_until_ctrl_c(fresh, read_on=False)
    assert A3C.load(run_of(fresh) / "CartPole-v1.zip").num_timesteps > 0


FRAGILE = '''
import os

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class Fragile(CartPoleEnv):
    """Of all, in all processes, the first that makes a step breaks."""

    def step(self, action):
        try:
            os.close(os.open("broken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().step(action)
        raise RuntimeError("broken on purpose")


gym.register("Fragile-v0", entry_point="fragile:Fragile", max_episode_steps=50)
'''


@pytest.mark.slow
def test_optimize_survives_a_trial_that_raises(fresh: Zoo) -> None:
    (fresh.folder / "fragile.py").write_text(FRAGILE)
    (fresh.folder / "a3c.yml").write_text("Fragile-v0: {n_envs: 2, n_workers: 1, n_timesteps: 2000, policy: MlpPolicy}")
    options = ["--gym-packages", "fragile", "--conf-file", "a3c.yml", "--eval-episodes", "1", "--no-optim-plots"]
    search = ["-optimize", "--n-trials", "2", "--n-jobs", "2", "-n", "2000"]
    result = subprocess.run(  # the short command finds modules of the working directory too
        [str(fresh.site / "bin" / "sb3-a3c"), "train", "--algo", "a3c", "--env", "Fragile-v0", *options, *search],
        **dict[str, Any](cwd=fresh.folder, env=fresh.environ, capture_output=True, text=True, timeout=120, check=False),
    )
    assert result.returncode == 0, result.stderr
    assert "RuntimeError: broken on purpose" in result.stderr  # said, not swallowed
    assert "Number of finished trials:  2" in result.stdout
    (report,) = (fresh.folder / "logs" / "a3c").glob("report_Fragile-v0_2-trials-2000-*.csv")
    with report.open(newline="") as file:
        trials = sorted(csv.DictReader(file), key=lambda trial: trial["state"])
    assert [trial["state"] for trial in trials] == ["COMPLETE", "PRUNED"]
    assert [trial["user_attrs_recurrent"] for trial in trials] == ["False", "False"]
    assert 1 <= float(trials[0]["value"]) <= 50
    assert report.with_suffix(".pkl").exists()


@pytest.mark.slow
def test_the_example_of_a_search(fresh: Zoo) -> None:
    fresh.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{fresh.environ['PATH']}"
    output = fresh.call("bash", str(CHECKOUT / "examples" / "zoo_search.sh"), "CartPole-v1", "2", "1000", "2000")
    assert "Number of finished trials:  2" in output
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
    - sb3_contrib.common.wrappers.TimeFeatureWrapper
  vec_env_wrapper:
    - stable_baselines3.common.vec_env.VecCheckNan: {raise_exception: true}
  callback:
    - stable_baselines3.common.callbacks.CheckpointCallback: {save_freq: 100, save_path: checkpoints}
"""


@pytest.mark.slow
def test_wrappers_and_callbacks_of_a_file(fresh: Zoo) -> None:
    (fresh.folder / "mine.yml").write_text(EVERYTHING)
    output = fresh.run("train", *CARTPOLE, "--conf-file", "mine.yml", "--vec-env", "subproc", "--eval-freq", "-1")
    assert "Loading hyperparameters from: mine.yml" in output
    model = A3C.load(run_of(fresh) / "CartPole-v1.zip")
    assert model.observation_space.shape == ((4 + 1) * 2,)  # the time, two frames
    assert model.num_timesteps >= 400
    checkpoints = {path.name for path in (fresh.folder / "checkpoints").iterdir()}
    assert checkpoints >= {"rl_model_200_steps.zip", "rl_model_400_steps.zip"}
    statistics: Any = pickle.loads((run_of(fresh) / "CartPole-v1" / "vecnormalize.pkl").read_bytes())
    assert statistics.obs_rms.mean.shape == (5,)
    assert statistics.obs_rms.count >= 400
    assert not statistics.norm_reward

    output = fresh.run("enjoy", *CARTPOLE, "-f", "logs", "--no-render", "-n", "100")
    assert "Mean reward" in output


def test_algorithms_of_sb3_have_their_own_file(fresh: Zoo) -> None:
    output = fresh.run("train", "--algo", "a2c", "--env", "CartPole-v1", "-n", "200", "--eval-freq", "-1")
    assert re.search(r"Loading hyperparameters from: .*/rl_zoo3/hyperparams/a2c\.yml\n", output)
    assert A2C.load(fresh.folder / "logs" / "a2c" / "CartPole-v1_1" / "CartPole-v1.zip").num_timesteps >= 200


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, what `register` does is undone."""
    for known in (ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER):
        monkeypatch.setitem(known, "a3c", None)
        del known["a3c"]
    monkeypatch.setattr(train_module, "ExperimentManager", ExperimentManager)


@pytest.mark.parametrize(
    ("program", "name"), [("/usr/bin/sb3-a3c", "sb3-a3c"), ("/site/sb3_a3c/zoo.py", "python -m sb3_a3c.zoo")]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "argument command: invalid choice: 'fly'"),
        (["--algo", "a3c"], "the following arguments are required: command"),
    ],
    ids=["none", "unknown", "forgotten"],
)
def test_wrong_commands(
    arguments: list[str],
    message: str,
    program: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        zoo.main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert f"{name}: error: {message}" in errors
    for command in ("train", "enjoy", "plot_train", "record_training", "benchmark"):
        assert command in errors


@pytest.mark.usefixtures("unregistered")
def test_options_are_rl_zoos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert type(make(None, "a2c", "CartPole-v1", str(tmp_path))) is ExperimentManager


@pytest.mark.parametrize("missing", ["rl_zoo3", "rl_zoo3.exp_manager", "rl_zoo3.train"])
def test_without_rl_zoo(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "rl_zoo3.train":
        monkeypatch.delattr("rl_zoo3.train")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'^RL Zoo can\'t be imported \(.+\)\. Install it: pip install "sb3-a3c\[zoo\]"'):
        zoo.register()


def test_folders_that_record_training_can_not_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-a3c", "record_training", "-f", "my logs"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="spaces in their names"):
        zoo.main()


def test_other_programs_are_called_as_they_are() -> None:
    before = subprocess.call
    with zoo._subprocesses_know_a3c():
        assert subprocess.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert subprocess.call is before


def test_ffmpeg_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with zoo._ffmpeg_on_path():
        found = shutil.which("ffmpeg")
        assert found is not None
        output = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, timeout=60, check=True).stdout
        assert output.startswith("ffmpeg version")
    assert os.environ["PATH"] == str(tmp_path)
    assert not Path(found).exists()


def test_an_ffmpeg_of_the_system_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ffmpeg").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with zoo._ffmpeg_on_path():
        assert os.environ["PATH"] == str(tmp_path)


def test_without_any_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit, match="pip install moviepy"), zoo._ffmpeg_on_path():
        pass
