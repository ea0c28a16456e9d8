"""Whole runs of the doctor: on a healthy machine, with something wrong, and interrupted."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_a3c import WorkerDiedError, __version__
from sb3_a3c.doctor import cli
from sb3_a3c.processes import machine


def levels(output: str) -> dict[str, str]:
    """Level of each finding, by its name."""
    return {line[9:23].strip(): line[:8].strip() for line in output.splitlines() if not line.startswith(" ")}


def test_healthy_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "PongNoFrameskip-v4", "--n-envs", "2", "--n-workers", "1"]) == 0
    output = capsys.readouterr().out
    found = levels(output)
    names = ["versions", "cores", "environment", "shared memory", "gradient", "start", "training", "threads"]
    assert list(found) == [*names, "memory"]
    assert found["environment"] == found["gradient"] == found["start"] == found["training"] == found["threads"] == "ok"
    assert f"sb3_a3c {__version__}, Python " in output
    assert f"torch {th.__version__}" in output
    assert "2 x PongNoFrameskip-v4, CnnLstmPolicy" in output
    assert "3 pushes moved 1,473,703 shared weights exactly as torch's Adam" in output


def test_run_without_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "0", "--policy", "MlpPolicy"]) == 0
    found = levels(capsys.readouterr().out)
    assert "start" not in found
    assert found["training"] == "ok"


def test_quota_decides_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "affinity", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda root=None: 1.9)
    monkeypatch.setattr(cli, "affinity", machine.affinity)
    monkeypatch.setattr(cli, "cpu_quota", machine.cpu_quota)
    _, cores = itertools.islice(cli.findings(cli._parse(["--env", "CartPole-v1", "--n-envs", "2"])), 2)
    assert (cores.level, cores.text) == ("ok", "1 worker on 8 cores, a CPU quota of 1.9")


def test_unknown_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPol-v1", "--n-envs", "1"]) == 1
    output = capsys.readouterr().out
    assert "problem  environment    CartPol-v1 can't be made: NameNotFound: " in output
    assert "Did you mean: `CartPole`?" in output  # gymnasium's own words
    assert "         fix: --env your_module:YourEnv-v0 for your own" in output
    assert output.splitlines()[-1] == "unknown  others         not checked here: they need the environment"


def test_policy_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "1", "--policy", "CnnPolicy"]) == 1
    output = capsys.readouterr().out
    assert "problem  environment    CartPole-v1 with CnnPolicy: " in output
    assert "fix: --policy MlpLstmPolicy" in output


def raise_died(*_: Any) -> None:
    raise WorkerDiedError("Worker 1 was killed by SIGKILL.")


@pytest.mark.parametrize(
    ("function", "replacement", "problem", "last"),
    [
        ("free_shared_memory", lambda: 2**10, "shared memory", "others"),
        ("train", raise_died, "training", "training"),
    ],
)
def test_checks_end_at_a_problem(
    function: str,
    replacement: Any,
    problem: str,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "train", None)  # called in one case only
    monkeypatch.setattr(cli, function, replacement)
    assert cli.main(["--env", "CartPole-v1", "--n-envs", "2", "--n-workers", "2"]) == 1
    output = capsys.readouterr().out
    found = levels(output)
    assert found[problem] == "problem"
    assert list(found)[-1] == last
    if problem == "training":
        assert "problem  training       WorkerDiedError: Worker 1 was killed by SIGKILL." in output
        assert "fix: --n-workers 1 if memory ran out" in output


@pytest.mark.parametrize(
    "options",
    [["--n-envs", "0"], ["--n-envs", "2", "--n-workers", "3"], ["--n-workers", "-1"], ["--policy", "Nonsense"]],
)
def test_wrong_command_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(options)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("found", "default"), [(True, "PongNoFrameskip-v4"), (False, "CartPole-v1")])
def test_default_environment(found: bool, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found or None)
    assert cli._parse([]).env == default


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="/proc")
def test_ctrl_c_leaves_no_process() -> None:
    command = [sys.executable, "-m", "sb3_a3c.doctor", "--env", "CartPole-v1", "--n-envs", "64", "--n-workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "gradient" not in process.stdout.readline():  # then workers start
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
