"""Lets A3C train on hosts that need no Ray."""

from collections.abc import Callable

import pytest

from tests.cluster.local_engine import set_engine


@pytest.fixture
def local_hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``local_hosts(CPUs of each host, …)``: what ``cluster="auto"`` means in this test."""
    return lambda *n_cpus, **kwargs: set_engine(monkeypatch, *n_cpus, **kwargs)
