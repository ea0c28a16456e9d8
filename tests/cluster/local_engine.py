"""An engine without Ray: agents are processes of this machine, or live in the broker's own process, which starts sooner."""

import functools
import itertools
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_a3c import A3C
from sb3_a3c.cluster import cluster_workers
from sb3_a3c.cluster.engine import Agent, HostLostError, Node
from sb3_a3c.cluster.host import Host
from sb3_a3c.errors import WorkerDiedError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.machine import n_cores
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.workers.worker_processes import PRELOAD


class LocalEngine:
    """
    :param n_cpus: of each host
    :param in_processes: whether each agent is a process
    :param folder: a host is lost, and its node with it, once there is a file of its name; for agents without a process
    """

    warning = ""

    def __init__(self, n_cpus: Sequence[int] = (2, 2), in_processes: bool = False, folder: Path | None = None) -> None:
        self._folder = folder
        self._nodes = [Node(f"key {i}", f"host-{i}", n, n, i == 0) for i, n in enumerate(n_cpus)]
        self._in_processes = in_processes
        self._agents: list[Any] = []

    def nodes(self) -> list[Node]:
        return [node for node in self._nodes if self._folder is None or not (self._folder / node.name).exists()]

    def start(self, node: Node, n_cpus: int, timeout: float) -> Agent:
        self._agents.append(ProcessAgent() if self._in_processes else ThreadAgent(self._folder and self._folder / node.name))
        return self._agents[-1]  # type: ignore[no-any-return]

    def close(self) -> None:
        for agent in self._agents:
            agent.kill()


class ThreadAgent:
    """Calls are made in the caller's thread; arguments and results are copied, as on their way to another host."""

    def __init__(self, file: Path | None) -> None:
        self._file = file  # once it is there, the host is lost
        self._host: Host | None = Host(lease=None)

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        if self._file is not None and self._file.exists():
            self.kill()
        if self._host is None:
            raise HostLostError("was lost")
        return _copied(getattr(self._host, method)(*_copied(args)))

    def kill(self) -> None:
        host, self._host = self._host, None
        if host is not None and hasattr(host, "_group"):
            with host._lock:
                host._group.stop()


def _copied(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message, protocol=5))


def run_agent(channel: WorkerChannel) -> None:
    channel.works()  # from now on this process may start others
    host, sending = Host(), threading.Lock()

    def call(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            result = True, getattr(host, method)(*args)
        except Exception as error:
            result = False, error
        with sending:
            channel.send((number, *result))

    while not channel.stopped():
        channel.serve(lambda message: threading.Thread(target=call, args=message, daemon=True).start(), block=True)


class ProcessAgent:
    def __init__(self) -> None:
        self._supervisor = Supervisor(run_agent, [()], preload=PRELOAD, name="agent")
        self._supervisor.start()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._fault = ""
        threading.Thread(target=self._receive, daemon=True).start()

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        number, future = next(self._numbers), Future[Any]()
        with self._lock:
            if self._fault:
                raise HostLostError(self._fault)
            self._waiting[number] = future
            self._supervisor.send(0, (number, method, args))
        try:
            return future.result(timeout)
        except TimeoutError:
            raise HostLostError(f"did not answer for {timeout:g} s") from None

    def kill(self) -> None:
        for process in self._supervisor._processes.values():
            process.kill()

    def _receive(self) -> None:
        try:
            while True:
                for _, (number, is_result, value) in self._supervisor.receive():
                    future = self._waiting.pop(number)
                    future.set_result(value) if is_result else future.set_exception(value)
        except (WorkerDiedError, ValueError) as death:
            with self._lock:
                self._fault = f"was lost ({death})"
                for future in self._waiting.values():
                    future.set_exception(HostLostError(self._fault))


def set_engine(monkeypatch: pytest.MonkeyPatch, *n_cpus: int, **kwargs: Any) -> None:
    """``cluster="auto"`` means hosts with these numbers of CPUs."""
    monkeypatch.setattr("sb3_a3c.arguments._has_ray", lambda: True)  # it is not needed
    monkeypatch.setattr(cluster_workers, "engine_of", lambda cluster: functools.partial(LocalEngine, n_cpus, **kwargs))


def train_on_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """``learn`` trains on two hosts, where it would start processes for an environment that can be sent to others."""
    set_engine(monkeypatch, 8, 8)
    learn = A3C.learn

    def learn_on_hosts(model: A3C, *args: Any, **kwargs: Any) -> A3C:
        is_here = model.n_workers == 0 or model.take_turns or isinstance(model.env.unwrapped, SubprocVecEnv)  # type: ignore[union-attr]
        with pytest.MonkeyPatch.context() as patch:
            if not is_here:
                patch.setattr(model, "cluster", "auto")
                patch.setattr(model, "n_workers", model.n_workers or min(model.n_envs, n_cores()))
            return learn(model, *args, **kwargs)

    monkeypatch.setattr(A3C, "learn", learn_on_hosts)
