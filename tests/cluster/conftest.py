"""Lets A3C train on hosts that need no Ray."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from sb3_a3c.cluster import cluster_workers
from tests.cluster.local_engine import LocalEngine


@pytest.fixture
def local_hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``local_hosts(CPUs of each host, …)``: what ``cluster="auto"`` means in this test."""
    monkeypatch.setattr("sb3_a3c.arguments._has_ray", lambda: True)  # it is not needed

    def set_engine(*n_cpus: int, **kwargs: Any) -> None:
        engine = functools.partial(LocalEngine, n_cpus, **kwargs)
        monkeypatch.setattr(cluster_workers, "engine_of", lambda cluster: engine)

    return set_engine
