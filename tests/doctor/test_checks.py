"""The finding of each check at each level."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest

from sb3_a3c import WorkerDiedError
from sb3_a3c.doctor import checks
from sb3_a3c.doctor.checks import Finding, Level

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
        (checks.check_shared_memory(GB, 9 * MB), "/dev/shm has 1.0 GB free, weights and optimizer state need 9.0 MB"),
        (checks.check_start(2, "spawn", 4.04), "2 processes started by spawn, first rollout after 4.0 s"),
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
        ("Xyz-v1", gym.error.NameNotFound("?"), KNOWN, "--env your_module:YourEnv-v0 for your own"),
        (ATARI, gym.error.NameNotFound("?"), KNOWN, checks.ATARI_PACKAGES),
        ("ALE/Pong-v5", gym.error.NamespaceNotFound("?"), KNOWN, checks.ATARI_PACKAGES),
        ("PnogNoFrameskip-v4", gym.error.NameNotFound("?"), [*KNOWN, ATARI], "--env your_module:YourEnv-v0 for your own"),
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
