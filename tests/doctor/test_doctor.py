"""The doctor: each finding at each level from injected numbers, and whole runs on good, wrong and hanging environments."""

import argparse
import builtins
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C, WorkerDiedError
from sb3_a3c.doctor import checks, cli, short_run
from sb3_a3c.doctor.checks import Finding, Level
from sb3_a3c.processes import machine
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.store.replica import SharedMemoryReplica

MB, GB = 2**20, 2**30


@pytest.mark.parametrize(
    ("n_workers", "n_cores", "quota", "level", "fix"),
    [
        (2, 2, None, Level.OK, ""),
        (64, 64, 64.0, Level.OK, ""),
        (10, 8, None, Level.OK, ""),  # costs little
        (8, 2, None, Level.WARNING, "A3C(…, n_workers=2)"),
        (64, 64, 2.5, Level.WARNING, "A3C(…, n_workers=2)"),
        (1, 64, 0.5, Level.WARNING, "docker run --cpus=1 (or more), with A3C(…, n_workers=1)"),
    ],
)
def test_cores(n_workers: int, n_cores: int, quota: float | None, level: Level, fix: str) -> None:
    finding = checks.check_cores(n_workers, n_cores, quota)
    assert (finding.level, finding.fix) == (level, fix)
    assert f"{n_cores} cores, {'no CPU quota' if quota is None else f'a CPU quota of {quota:g}'}" in finding.text


@pytest.mark.parametrize(
    ("limits", "level", "fix"),
    [
        (None, Level.UNKNOWN, ""),
        ((1024, 4096), Level.OK, ""),
        ((90, 4096), Level.WARNING, "ulimit -n 114"),  # no room for a monitor file each
        ((90, 100), Level.WARNING, "docker run --ulimit nofile=114, or raise it in limits.conf"),
        ((49, 4096), Level.PROBLEM, "ulimit -n 114"),
        ((50, 4096), Level.WARNING, "ulimit -n 114"),
        ((114, 114), Level.OK, ""),
    ],
)
def test_open_files(limits: tuple[int, int] | None, level: Level, fix: str) -> None:
    finding = checks.check_open_files(limits, n_open=10, n_workers=2, n_envs=16)
    assert (finding.level, finding.fix) == (level, fix)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_workers_and_environments_open_as_many_files_as_are_counted_for_them(tmp_path: Path) -> None:
    opened: list[int] = []

    def note(local_variables: dict[str, Any], _: Any) -> bool:
        opened.append(machine.n_open_files())
        return False

    for n_workers in (1, 3):
        env = make_vec_env("CartPole-v1", n_envs=3, monitor_dir=str(tmp_path / str(n_workers)))
        before = machine.n_open_files()
        A3C("MlpPolicy", env, n_workers=n_workers).learn(10**9, callback=note)
        env.close()
    assert opened[1] - opened[0] == 2 * checks.FILES_PER_WORKER
    assert opened[1] - before <= 3 * checks.FILES_PER_WORKER + checks.SPARE_FILES


@pytest.mark.parametrize(
    ("free", "needed", "level", "size"),
    [
        (None, MB, Level.UNKNOWN, ""),
        (64 * MB, 17 * MB, Level.OK, ""),
        (64 * MB, 32 * MB, Level.OK, ""),
        (64 * MB, 40 * MB, Level.WARNING, "256m"),
        (64 * MB, 64 * MB + 1, Level.PROBLEM, "512m"),
        (0, MB, Level.PROBLEM, "64m"),
    ],
)
def test_shared_memory(free: int | None, needed: int, level: Level, size: str) -> None:
    finding = checks.check_shared_memory(free, needed)
    assert finding.level is level
    if size:
        assert finding.fix.startswith(f"docker run --shm-size={size},")
        assert f"need {needed / MB:.1f} MB" in finding.text
    else:
        assert not finding.fix


@pytest.mark.parametrize(
    ("method", "seconds", "level", "fix"),
    [
        ("spawn", 30.0, Level.OK, ""),
        ("spawn", 31.0, Level.WARNING, 'A3C(…, start_method="forkserver")'),
        ("forkserver", 31.0, Level.WARNING, "put Python's packages on a local disk"),
    ],
)
def test_start(method: str, seconds: float, level: Level, fix: str) -> None:
    finding = checks.check_start(1, method, seconds)
    assert (finding.level, finding.fix) == (level, fix)
    assert finding.text.startswith(f"1 process started by {method} and answered within {seconds} s")


@pytest.mark.parametrize(("method", "other"), [("forkserver", "spawn"), ("spawn", "forkserver")])
def test_failed_start(method: str, other: str) -> None:
    finding = checks.failed_start(4, method, OSError("too many"))
    assert finding.level is Level.PROBLEM
    assert finding.text == f"4 processes by {method}: OSError: too many"
    assert finding.fix == f'A3C(…, start_method="{other}"), or fewer workers: A3C(…, n_workers=2)'


@pytest.mark.parametrize(
    ("n_workers", "n_updates", "has_moved", "level"),
    [(2, 12, True, Level.OK), (0, 12, True, Level.WARNING), (2, 0, True, Level.PROBLEM), (2, 12, False, Level.PROBLEM)],
)
def test_training(n_workers: int, n_updates: int, has_moved: bool, level: Level) -> None:
    finding = checks.check_training(2, n_workers, 960, n_updates, 1.5, has_moved)
    assert finding.level is level
    assert bool(finding.fix) == (level is not Level.OK)
    who = "2 workers" if n_workers else "this process"
    assert finding.text.startswith(f"{who} made 960 steps and {n_updates} updates in 1.5 s")


@pytest.mark.parametrize(
    ("error", "n_workers", "fix"),
    [
        (ValueError("x"), 4, "--n-workers 0, which does the same"),
        (WorkerDiedError("x"), 4, "--n-workers 2 if memory ran out"),
        (WorkerDiedError("x"), 1, "--n-workers 0, which does the same"),
        (TimeoutError("x"), 4, "--timeout 600"),
    ],
)
def test_failed_training(error: Exception, n_workers: int, fix: str) -> None:
    finding = checks.failed_training(error, n_workers)
    assert (finding.level, finding.text) == (Level.PROBLEM, f"{type(error).__name__}: x")
    assert finding.fix.startswith(fix)


def test_threads() -> None:
    assert checks.check_threads(1, 8, 2, None).level is Level.OK
    assert "OMP_NUM_THREADS is 4, which counts in other processes only" in checks.check_threads(1, 8, 2, "4").text
    fighting = checks.check_threads(4, 2, 2, None)
    assert (fighting.level, fighting.fix) == (Level.WARNING, "take torch.set_num_threads out, or let it be 1")
    assert "4 threads in each of 2 workers" in fighting.text
    assert checks.check_threads(4, 2, 8, None).level is Level.OK


@pytest.mark.parametrize(
    ("of_workers", "available", "level", "fix"),
    [
        ([None, 100 * MB], GB, Level.UNKNOWN, ""),
        ([100 * MB], None, Level.UNKNOWN, ""),
        ([400 * MB, 400 * MB], 1000 * MB, Level.OK, ""),
        ([400 * MB, 401 * MB], 1000 * MB, Level.WARNING, "A3C(…, n_workers=1), with fewer environments"),
        ([200 * MB] * 6, 1000 * MB, Level.PROBLEM, "A3C(…, n_workers=4), with fewer environments"),
        ([2 * GB], GB, Level.PROBLEM, "docker run --memory=…, or a larger machine"),
    ],
)
def test_memory(of_workers: list[int | None], available: int | None, level: Level, fix: str) -> None:
    finding = checks.check_memory(of_workers, available)
    assert (finding.level, finding.fix) == (level, fix)


KNOWN = ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"]
ATARI = "PongNoFrameskip-v4"


@pytest.mark.parametrize(
    ("env_id", "error", "known", "fix"),
    [
        ("CartPol-v1", gym.error.NameNotFound("?"), KNOWN, "--env CartPole-v1"),
        ("Xyz-v1", gym.error.NameNotFound("?"), KNOWN, "--env your_module:YourEnv-v0 for your own"),
        (ATARI, gym.error.NameNotFound("?"), KNOWN, checks.ATARI_PACKAGES),
        ("ALE/Pong-v5", gym.error.NamespaceNotFound("?"), KNOWN, checks.ATARI_PACKAGES),
        ("PnogNoFrameskip-v4", gym.error.NameNotFound("?"), [*KNOWN, ATARI], f"--env {ATARI}"),
        (ATARI, gym.error.Error("no ROM"), [*KNOWN, ATARI], checks.ATARI_PACKAGES),
        ("Pong-v4", ImportError("install ale-py"), [*KNOWN, ATARI], checks.ATARI_PACKAGES),
        (
            "Ant-v5",
            gym.error.DependencyNotInstalled("run `pip install a` and `pip install b`"),
            KNOWN,
            "pip install a && pip",
        ),
        ("Mine-v0", RuntimeError("no license"), KNOWN, "look at the traceback of python -c"),
    ],
)
def test_unusable_environment(env_id: str, error: Exception, known: list[str], fix: str) -> None:
    finding = checks.unusable_environment(env_id, error, known)
    assert finding.level is Level.PROBLEM
    assert finding.text == f"{env_id} can't be made: {type(error).__name__}: {error}"
    assert finding.fix.startswith(fix)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    assert machine.cpu_quota(tmp_path) is None
    assert machine.available_memory(tmp_path) == 8000 * 1024
    write(group / "a/b/cpu.max", "max 100000\n")
    write(group / "a/b/memory.max", "max\n")
    write(group / "a/b/memory.current", "4096\n")
    assert machine.cpu_quota(tmp_path) is None
    assert machine.available_memory(tmp_path) == 8000 * 1024
    write(group / "a/cpu.max", "50000 100000\n")  # of the group above
    write(group / "a/memory.max", "100000\n")
    write(group / "a/memory.current", "90000\n")
    assert machine.available_memory(tmp_path) == 10_000
    write(group / "a/memory.stat", "anon 1\ninactive_file 5000\n")
    assert machine.cpu_quota(tmp_path) == 0.5
    assert machine.available_memory(tmp_path) == 15_000


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "3:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n1:cpuset:/\n")
    group = tmp_path / "sys/fs/cgroup"  # a container sees its own group as the root
    write(group / "cpu/cpu.cfs_quota_us", "-1\n")
    write(group / "cpu/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path) is None
    write(group / "cpu/cpu.cfs_quota_us", "250000\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    assert machine.available_memory(tmp_path) is None
    write(group / "memory/memory.limit_in_bytes", "1000\n")
    write(group / "memory/memory.usage_in_bytes", "1300\n")
    assert machine.available_memory(tmp_path) == 0
    write(group / "memory/memory.stat", "inactive_file 1\ntotal_inactive_file 400\n")
    assert machine.available_memory(tmp_path) == 100


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cpu_quota(tmp_path) is None
    assert machine.available_memory(tmp_path) is None
    assert machine.process_memory(os.getpid(), tmp_path) is None
    assert machine.free_shared_memory(tmp_path / "shm") is None
    assert machine.n_open_files(tmp_path) == 0
    real_import = builtins.__import__

    def without_resource(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "resource":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert machine.file_limits() is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_this_machine() -> None:
    import resource

    before = machine.process_memory(os.getpid())
    ballast = mmap.mmap(-1, 50 * MB)  # not from malloc, which may have freed memory at hand
    ballast.write(b"x" * len(ballast))
    after = machine.process_memory(os.getpid())
    ballast.close()
    assert before is not None and after is not None
    assert 45 * MB < after - before < 60 * MB
    assert machine.free_shared_memory() == pytest.approx(shutil.disk_usage("/dev/shm").free, abs=64 * MB)
    assert machine.file_limits() == resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = machine.n_open_files()
    with open(os.devnull):
        assert machine.n_open_files() == n_open + 1


@pytest.mark.parametrize(
    ("space", "policy"),
    [
        (spaces.Box(0, 255, (84, 84, 1), np.uint8), "CnnLstmPolicy"),
        (spaces.Box(-1, 1, (4,)), "MlpLstmPolicy"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "MultiInputLstmPolicy"),
    ],
)
def test_default_policy(space: gym.Space[Any], policy: str) -> None:
    assert short_run.default_policy(space) == policy


def keeps_the_first_gradient(replica: SharedMemoryReplica) -> int:
    """What many implementations do with torch 2: `if shared.grad is None: shared.grad = local.grad`."""
    for parameter, shared in replica._shared_of.items():
        if shared.grad is None:
            shared.grad = parameter.grad
        parameter.grad = None
    replica.optimizer.step()
    return 0


def forgets_to_step(replica: SharedMemoryReplica) -> int:
    replica._policy.zero_grad()
    return 0


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.RMSprop])
def test_gradients_flow(policy: str, env_id: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {} if optimizer is th.optim.Adam else dict(optimizer_class=optimizer, optimizer_kwargs=dict(momentum=0.9))
    model = A3C(policy, make_vec_env(env_id, n_envs=3), policy_kwargs=kwargs, seed=0)
    assert model.env is not None
    obs: Any = model.env.reset()
    assert short_run.gradient_mismatch(model.policy, obs) is None
    with monkeypatch.context() as patch:
        patch.setattr(SharedMemoryReplica, "push", keeps_the_first_gradient)
        assert str(short_run.gradient_mismatch(model.policy, obs)).startswith("push 2: ")
        patch.setattr(SharedMemoryReplica, "push", forgets_to_step)
        assert str(short_run.gradient_mismatch(model.policy, obs)).startswith("push 1: ")
        patch.undo()
        patch.setattr(SharedMemoryReplica, "pull", lambda replica: None)
        assert str(short_run.gradient_mismatch(model.policy, obs)).startswith("push 1: ")
    with th.no_grad():
        next(model.policy.parameters()).fill_(np.nan)
    with pytest.raises(ValueError, match="is NaN or infinite"):
        short_run.gradient_mismatch(model.policy, obs)


def test_gradient_finding() -> None:
    assert checks.check_gradient(None, "all is equal") == Finding("gradient", Level.OK, "all is equal")
    finding = checks.check_gradient("push 2: weight", "all is equal")
    assert (finding.level, finding.text) == (Level.PROBLEM, "push 2: weight")
    assert finding.fix


def test_a_worker_that_hangs_is_ended() -> None:
    main = os.getpid()

    class HangsThere(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **kwargs: Any) -> Any:
            if os.getpid() != main:
                time.sleep(1000)
            return super().reset(**kwargs)

    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2, wrapper_class=HangsThere), n_workers=1)
    with pytest.raises(TimeoutError, match=r"environment 0 made no rollout within 0.5 s"):
        short_run.train(model, timeout=0.5)


def test_workers_that_do_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def say_nothing(channel: WorkerChannel) -> None:
        while not channel.stopped():
            time.sleep(0.01)

    monkeypatch.setattr(short_run, "_say_hello", say_nothing)
    with pytest.raises(TimeoutError, match=r"2 of 2 have not answered within 0.2 s"):
        short_run.start_workers(2, None, timeout=0.2)


class Threads(gym.Wrapper[Any, Any, Any, Any]):
    """Interferes."""

    def reset(self, **kwargs: Any) -> Any:
        th.set_num_threads(3)
        return super().reset(**kwargs)


def test_a_short_training_is_measured() -> None:
    before = th.get_num_threads()
    try:
        model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=4, wrapper_class=Threads), n_workers=2)
        short = short_run.train(model, timeout=60.0)
    finally:
        th.set_num_threads(before)
    assert short.n_workers == len(short.memory) == 2
    assert short.n_threads == 3
    assert short.n_steps >= short_run.N_ROLLOUTS * model.n_steps * 4
    assert short.n_updates > 0 and short.has_moved and 0 < short.seconds < 60
    assert all(size is None or 10 * MB < size < GB for size in short.memory)


def run(*options: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "sb3_a3c.doctor", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def test_a_run_where_all_is_well() -> None:
    result = run("--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    names = [line.split()[1] for line in result.stdout.splitlines() if not line.strip().startswith("fix:")]
    assert " ".join(names) == "versions cores open environment shared gradient start training threads memory"
    assert f"torch {th.__version__}" in result.stdout
    assert "3 pushes moved 269,059 shared weights exactly as torch's Adam" in result.stdout
    assert result.stderr == ""


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Of each finding the level, by its name."""
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    return {line[9:23].strip(): line[:8].strip() for line in lines}


def test_a_run_on_pong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", ATARI, "--n-envs", "2", "--n-workers", "1"]) == 0
    levels = lines_of(capsys)
    assert levels["environment"] == levels["gradient"] == levels["start"] == levels["training"] == "ok"


def test_a_run_without_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "0", "--policy", "MlpPolicy"]) == 0
    levels = lines_of(capsys)
    assert (levels["start"], levels["training"]) == ("unknown", "ok")


def test_a_run_on_an_environment_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPol-v1", "--n-envs", "1"]) == 1
    output = capsys.readouterr().out
    assert "problem  environment    CartPol-v1 can't be made: NameNotFound: " in output
    assert "         fix: --env CartPole-v1" in output
    assert output.splitlines()[-1] == "unknown  others         not checked here: they need the environment"


def test_a_policy_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "1", "--policy", "CnnPolicy"]) == 1
    output = capsys.readouterr().out
    assert "problem  environment    CartPole-v1 with CnnPolicy: " in output
    assert "fix: --policy MlpLstmPolicy" in output


def test_nothing_is_started_without_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "free_shared_memory", lambda: MB)
    monkeypatch.setattr(cli, "start_workers", None)
    monkeypatch.setattr(cli, "train", None)
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "1"]) == 1
    levels = lines_of(capsys)
    assert (levels["shared memory"], levels["others"]) == ("problem", "unknown")
    assert "training" not in levels


def test_nothing_is_trained_where_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> float:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(cli, "start_workers", refuse)
    monkeypatch.setattr(cli, "train", None)
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "1"]) == 1
    levels = lines_of(capsys)
    assert (levels["start"], levels["others"]) == ("problem", "unknown")
    assert "training" not in levels


def test_a_training_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def out_of_memory(*_: Any) -> short_run.ShortRun:
        raise WorkerDiedError("Worker 1 was killed by SIGKILL.")

    monkeypatch.setattr(cli, "train", out_of_memory)
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "2"]) == 1
    output = capsys.readouterr().out
    assert "problem  training       WorkerDiedError: Worker 1 was killed by SIGKILL." in output
    assert "fix: --n-workers 1 if memory ran out" in output


@pytest.mark.parametrize(
    "options",
    [["--n-envs", "0"], ["--n-envs", "2", "--n-workers", "3"], ["--n-workers", "-1"], ["--policy", "Nonsense"]],
)
def test_a_wrong_command_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(options)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("found", "default"), [(True, ATARI), (False, "CartPole-v1")])
def test_the_default_environment(found: bool, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: argparse if found else None)
    assert cli._parsed([]).env == default


@pytest.mark.skipif(not Path("/proc").exists(), reason="/proc")
@pytest.mark.parametrize("line", ["gradient", "start"])  # while workers start, while they train
def test_ctrl_c_leaves_no_process(line: str) -> None:
    command = [sys.executable, "-m", "sb3_a3c.doctor", "--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while line not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, errors
    deadline = time.monotonic() + 10
    while (left := session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def session(leader: int) -> list[str]:
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(path.parent.name)
    return found
