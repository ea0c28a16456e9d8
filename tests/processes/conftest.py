"""Starts workers for the tests of this folder."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.worker_processes import PRELOAD


@pytest.fixture
def start() -> Iterator[Callable[..., Supervisor]]:
    """``start(target, arguments of each worker or how many workers without any, …)``. All are stopped after the test."""
    supervisors: list[Supervisor] = []

    def started(target: Callable[..., None], arguments: int | Sequence[tuple[Any, ...]] = 1, **kwargs: Any) -> Supervisor:
        if isinstance(arguments, int):
            arguments = [()] * arguments
        supervisors.append(Supervisor(target, arguments, preload=PRELOAD, **kwargs))
        supervisors[-1].start()
        return supervisors[-1]

    yield started
    for supervisor in supervisors:
        supervisor.stop()
