"""The benchmarks still run: too shortly for their figures to mean anything."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_a3c.processes.machine import n_cores

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def last_line(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_throughput_of_a3c_and_what_bounds_it() -> None:
    arguments = ("--games", "Pong", "--seconds", "0.4", "--only")
    a3c = json.loads(last_line("throughput.py", *arguments, "A3C, native"))
    assert list(a3c) == ["steps/s", "acting", "stepping", "learning", "sharing"]
    assert min(a3c.values()) > 0
    bound = json.loads(last_line("throughput.py", *arguments, "lower bound, native"))
    assert bound["network"] == min(list(bound.values())[3:])
    assert bound["steps/s"] == pytest.approx(n_cores() * 1e6 / (bound["emulator"] + bound["network"]))


def test_scaling() -> None:
    assert float(last_line("scaling.py", "--only", "1", "--seconds", "0.4")) > 0


def test_pong_settings() -> None:
    line = last_line("pong_settings.py", "--n-envs", "4", "--seconds", "0.4")
    assert line.startswith("n_envs=4: ")
    assert line.endswith(" steps/s")


def test_guard() -> None:
    assert re.fullmatch(r"guard and heartbeat: [\d.]+ ms, [\d.]+% of it", last_line("guard.py", "--rollouts", "2"))


def test_soak() -> None:
    arguments = ("--minutes", "0.4", "--kill-every", "4", "--n-envs", "4")
    assert last_line("soak.py", *arguments) == "left: 0 segments of shared memory, 0 workers"


def test_cluster() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e .[cluster]")
    found = json.loads(last_line("cluster.py", "--only", "2", "0.01", "2", "0", "2"))
    assert found["steps/s"] > 100
    assert found["exchange, ms"] > 0
    assert found["main process, cores"] < 0.5
