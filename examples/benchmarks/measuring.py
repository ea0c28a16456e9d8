"""Helpers of the benchmarks: a clock, separate processes, a line about the machine."""

import contextlib
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_a3c.processes.machine import n_cores

#: Of the two hidden layers of MlpPolicy: about 0.1, 1.5 and 10 million parameters.
MLP_SIZES = (220, 860, 2230)


class Clock(BaseCallback):
    """Times whole rollouts for `seconds` and ends the training. The first two seconds do not count."""

    reads_observations = False  # none need be sent to it

    def __init__(self, seconds: float, warm_up: float = 2.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.warm_up = warm_up
        self.began: float | None = None
        self.marks: list[tuple[float, int]] = []  #: when a rollout began, after how many steps

    def _on_rollout_start(self) -> None:
        now = time.perf_counter()
        self.began = self.began or now
        if now - self.began >= self.warm_up:
            self.marks.append((now, self.model.num_timesteps))

    def _on_step(self) -> bool:
        return len(self.marks) < 2 or self.marks[-1][0] - self.marks[0][0] < self.seconds

    @property
    def steps_per_second(self) -> float:
        (begin, steps_before), (end, steps) = self.marks[0], self.marks[-1]
        return (steps - steps_before) / (end - begin)


def in_a_process_of_its_own(script: str, *arguments: str) -> str:
    """
    :param script: path of a benchmark
    :param arguments: for it
    :return: the last line that it prints
    """
    process = subprocess.run([sys.executable, script, *arguments], check=False, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{process.stderr}")
    return process.stdout.splitlines()[-1]


def machine() -> str:
    """:return: what the figures depend on"""
    return f"{platform.processor() or platform.machine()}, {n_cores()} cores, torch {th.__version__}"


@contextlib.contextmanager
def ray_nodes(n_nodes: int, n_cpus: int) -> Iterator[str]:
    """A Ray cluster with a token, of nodes on this machine: its address. Ray must not have been imported yet."""
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(16)
    from ray.cluster_utils import Cluster

    node: Any = dict(num_cpus=n_cpus, object_store_memory=400_000_000)
    cluster = Cluster(initialize_head=True, head_node_args=dict(**node, include_dashboard=False))
    try:
        for _ in range(n_nodes - 1):
            cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()
