"""The finding of each check at each level."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C, WorkerDiedError
from sb3_a3c.doctor import checks
from sb3_a3c.doctor.checks import Finding, Level
from sb3_a3c.processes import machine

MB, GB = 2**20, 2**30
OK, UNKNOWN, WARNING, PROBLEM = Level.OK, Level.UNKNOWN, Level.WARNING, Level.PROBLEM


@pytest.mark.parametrize(
    ("check", "arguments", "level", "fix"),
    [
        (checks.check_cores, (64, 64, 64.0), OK, ""),
        (checks.check_cores, (10, 8, None), OK, ""),  # costs little
        (checks.check_cores, (8, 2, None), WARNING, "A3C(…, n_workers=2)"),
        (checks.check_cores, (64, 64, 2.5), WARNING, "A3C(…, n_workers=2)"),
        (checks.check_cores, (1, 64, 0.5), WARNING, "docker run --cpus=1 (or more), with A3C(…, n_workers=1)"),
        # with 10 open files, 2 workers and 16 environments
        (checks.check_open_files, (None, 10, 2, 16), UNKNOWN, ""),
        (checks.check_open_files, ((114, 114), 10, 2, 16), OK, ""),
        (checks.check_open_files, ((113, 4096), 10, 2, 16), WARNING, "ulimit -n 114"),
        (checks.check_open_files, ((50, 100), 10, 2, 16), WARNING, "docker run --ulimit nofile=114, or raise it in"),
        (checks.check_open_files, ((49, 4096), 10, 2, 16), PROBLEM, "ulimit -n 114"),
        (checks.check_shared_memory, (None, MB), UNKNOWN, ""),
        (checks.check_shared_memory, (64 * MB, 32 * MB), OK, ""),
        (checks.check_shared_memory, (64 * MB, 40 * MB), WARNING, "docker run --shm-size=256m,"),
        (checks.check_shared_memory, (64 * MB, 64 * MB + 1), PROBLEM, "docker run --shm-size=512m,"),
        (checks.check_shared_memory, (0, MB), PROBLEM, "docker run --shm-size=64m,"),
        (checks.check_gradient, (None, "all is equal"), OK, ""),
        (checks.check_gradient, ("push 2: weight", "all is equal"), PROBLEM, "pip install -c constraints.txt"),
        (checks.check_start, (1, "spawn", 30.0), OK, ""),
        (checks.check_start, (1, "spawn", 31.0), WARNING, 'A3C(…, start_method="forkserver")'),
        (checks.check_start, (1, "forkserver", 31.0), WARNING, "put Python's packages on a local disk"),
        (checks.failed_start, (4, "forkserver", OSError("x")), PROBLEM, 'A3C(…, start_method="spawn"), or fewer workers: A'),
        (checks.failed_start, (1, "spawn", OSError("x")), PROBLEM, 'A3C(…, start_method="forkserver"), or fewer workers: A'),
        (checks.check_training, (2, 2, 960, 12, 1.5), OK, ""),
        (checks.check_training, (0, 0, 960, 12, 1.5), OK, ""),
        (checks.check_training, (2, 0, 960, 12, 1.5), WARNING, "--n-workers 2, to see why"),
        (checks.check_training, (2, 2, 960, 0, 1.5), PROBLEM, "VecCheckNan(env, raise_exception=True)"),
        (checks.failed_training, (ValueError("x"), 4), PROBLEM, "--n-workers 0, which does the same"),
        (checks.failed_training, (WorkerDiedError("x"), 4), PROBLEM, "--n-workers 2 if memory ran out"),
        (checks.failed_training, (WorkerDiedError("x"), 1), PROBLEM, "--n-workers 0, which does the same"),
        (checks.failed_training, (TimeoutError("x"), 4), PROBLEM, "--timeout 600"),
        (checks.check_threads, (1, 8, 2), OK, ""),
        (checks.check_threads, (4, 2, 8), OK, ""),
        (checks.check_threads, (4, 2, 2), WARNING, "take torch.set_num_threads out, or let it be 1"),
        (checks.check_memory, ([None, 100 * MB], GB), UNKNOWN, ""),
        (checks.check_memory, ([100 * MB], None), UNKNOWN, ""),
        (checks.check_memory, ([400 * MB, 400 * MB], 1000 * MB), OK, ""),
        (checks.check_memory, ([400 * MB, 401 * MB], 1000 * MB), WARNING, "A3C(…, n_workers=1), with fewer environments"),
        (checks.check_memory, ([200 * MB] * 6, 1000 * MB), PROBLEM, "A3C(…, n_workers=4), with fewer environments"),
        (checks.check_memory, ([2 * GB], GB), PROBLEM, "docker run --memory=…, or a larger machine"),
    ],
)
def test_level_and_fix(check: Callable[..., Finding], arguments: tuple[Any, ...], level: Level, fix: str) -> None:
    finding = check(*arguments)
    assert finding.level is level
    assert finding.fix.startswith(fix)
    assert bool(finding.fix) == (level in (WARNING, PROBLEM))


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (checks.check_cores(1, 8, 2.5), "1 worker on 8 cores, a CPU quota of 2.5"),
        (checks.check_open_files((999, 999), 10, 2, 16), "999 allowed, 2 workers and 16 environments need up to 114"),
        (checks.check_shared_memory(GB, 9 * MB), "/dev/shm has 1.0 GB free, weights and optimizer state need 9.0 MB"),
        (checks.check_start(2, "spawn", 4.04), "2 processes started by spawn and answered within 4.0 s"),
        (checks.failed_start(1, "spawn", OSError("too many")), "1 process by spawn: OSError: too many"),
        (checks.check_training(2, 2, 960, 12, 1.5), "2 workers made 960 steps and 12 updates in 1.5 s"),
        (
            checks.check_training(2, 0, 960, 12, 1.5),
            "this process made 960 steps and 12 updates in 1.5 s, instead of 2 workers",
        ),
        (checks.failed_training(TimeoutError("x"), 2), "TimeoutError: x"),
        (checks.check_memory([9 * MB, 6 * MB], GB), "up to 9.0 MB in each of 2 workers, 15.0 MB of 1.0 GB available"),
    ],
)
def test_text(finding: Finding, text: str) -> None:
    assert finding.text == text


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
        ("Ant-v5", ImportError("run `pip install a` and `pip install b`"), KNOWN, "pip install a && pip install b"),
        ("Mine-v0", RuntimeError("no license"), KNOWN, "look at the traceback of python -c"),
    ],
)
def test_unusable_environment(env_id: str, error: Exception, known: list[str], fix: str) -> None:
    finding = checks.unusable_environment(env_id, error, known)
    assert finding.level is PROBLEM
    assert finding.text == f"{env_id} can't be made: {type(error).__name__}: {error}"
    assert finding.fix.startswith(fix)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_number_of_open_files(tmp_path: Path) -> None:
    opened: list[int] = []

    def count(local_variables: dict[str, Any], _: Any) -> bool:
        opened.append(machine.n_open_files())
        return False

    for n_workers in (1, 2):
        env = make_vec_env("CartPole-v1", n_envs=2, monitor_dir=str(tmp_path / str(n_workers)))
        before = machine.n_open_files()
        A3C("MlpPolicy", env, n_workers=n_workers).learn(10**9, callback=count)
        env.close()
    assert opened[1] - opened[0] == checks.FILES_PER_WORKER
    assert opened[1] - before <= 2 * checks.FILES_PER_WORKER + checks.SPARE_FILES
