"""Lets A3C train on hosts that need no Ray."""

import functools
import importlib.util
from collections.abc import Callable

import pytest

from sb3_a3c.cluster import cluster_workers
from tests.cluster.local_engine import LocalEngine


@pytest.fixture
def local_hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``local_hosts(CPUs of each host, …)``: what ``cluster="auto"`` means in this test."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e .[cluster]")  # A3C would say so, too

    def set_engine(*n_cpus: int, in_processes: bool = False) -> None:
        engine = functools.partial(LocalEngine, n_cpus, in_processes)
        monkeypatch.setattr(cluster_workers, "engine_of", lambda cluster: engine)

    return set_engine
