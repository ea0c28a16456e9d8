"""Shared by all tests: a stack dump and an end for whatever hangs, and Atari's environments."""

import faulthandler
import multiprocessing
import signal
import sys
from collections.abc import Iterator

import ale_py
import gymnasium as gym
import pytest
import torch as th

from tests.cluster.local_engine import train_on_hosts

assert sys.__stderr__ is not None
faulthandler.enable(file=sys.__stderr__)
gym.register_envs(ale_py)
# SubprocVecEnv's processes start from the fork server that all users of multiprocessing share: A3C has one of its own
multiprocessing.set_forkserver_preload(["stable_baselines3.common.vec_env"])
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in commands that they start in the background
th.set_num_threads(1)  # most tests are too small for more; those about threads set their own


@pytest.fixture(autouse=True)
def _threads_are_left_alone() -> Iterator[None]:
    """No test may change the number of torch's threads for the next one."""
    before = th.get_num_threads()
    yield
    assert th.get_num_threads() == before


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-hosts", action="store_true", help="train in workers of two hosts (without Ray), where A3C can")


@pytest.fixture(autouse=True)
def _train_on_hosts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--on-hosts``, tests of training in worker processes are tests of training on a cluster."""
    if request.config.getoption("--on-hosts"):
        train_on_hosts(monkeypatch)
