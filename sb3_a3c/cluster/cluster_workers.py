"""The collector's workers on the hosts of a cluster: the main process's side of the broker."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.cluster.broker import run_broker
from sb3_a3c.cluster.engine import Engine, Node, deal_hosts
from sb3_a3c.cluster.host import versions
from sb3_a3c.cluster.messages import (
    Begin,
    Close,
    Closed,
    Connected,
    Deliver,
    Figures,
    Load,
    PopFigures,
    Replace,
    StopWorkers,
    Sync,
)
from sb3_a3c.cluster.ray_engine import RayEngine, environ
from sb3_a3c.errors import ClusterLostError, WorkerDiedError, warn
from sb3_a3c.policies.pickling import dump_policy
from sb3_a3c.processes.channel import dumps
from sb3_a3c.processes.receiver import Died, Event, EventReceiver
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.base import ParameterStore
from sb3_a3c.workers.assignment import Assignment, counted
from sb3_a3c.workers.worker_processes import PRELOAD

#: Seconds that the broker has to connect, and to end.
CONNECT_SECONDS, CLOSE_SECONDS = 60.0, 30.0


class ClusterWorkers(EventReceiver):
    """
    :class:`~sb3_a3c.workers.protocol.Workers` on the hosts of a cluster. It connects at once; workers start by
    :meth:`start`, after :meth:`assign`.

    :param connect: makes the engine, in the broker's process
    :param start_method: of all processes, as for ``ProcessGroup``
    :param timeout: for the workers, likewise
    :raises ValueError: if there is no such cluster, or it can't be used
    """

    stops_at_goal = False
    stop_seconds = 10.0

    def __init__(self, connect: Callable[[], Engine], start_method: str | None = None, timeout: float | None = None) -> None:
        super().__init__(0)
        self._connect, self._start_method, self._timeout = connect, start_method, timeout
        self._events: list[tuple[int, Event]] = []
        self._hint, self._has_hinted = "", False
        self._is_lost = False  # the broker has died
        self._is_stopped = False
        self.nodes: list[Node] = []
        self._plan: list[tuple[Node, tuple[int, ...]]] = []
        self._start_broker()

    def n_workers(self, n_workers: int | None, n_envs: int) -> int:
        """The number of workers; by default one for each free CPU of the cluster, at most one for each environment."""
        n = min(n_envs, sum(node.n_free for node in self.nodes)) if n_workers is None else n_workers
        self._plan = deal_hosts(self.nodes, max(n, 1))
        return max(n, 1)

    @property
    def place(self) -> str:
        """The hosts, in words."""
        return counted(len(self._plan), "host")

    @property
    def n_here(self) -> int:
        return sum(len(workers) for node, workers in self._plan if node.is_here)

    def assign(self, assignment: Assignment, store: ParameterStore) -> "ClusterWorkers":
        """
        :param assignment: of as many workers as :meth:`n_workers` has said
        :param store: the center's
        """
        self._assignment, self._store = assignment, store
        self._n_workers = assignment.n_workers
        return self

    def start(self) -> None:
        self._begin(self._plan)

    def _start_broker(self) -> None:
        self._broker = Supervisor(run_broker, [(self._connect,)], self._start_method, PRELOAD, name="broker")
        self._is_lost = False
        try:
            self._broker.start()
            received = self._broker.receive(CONNECT_SECONDS)
            if not received:
                raise ValueError(f"The cluster has not answered within {CONNECT_SECONDS:g} s. Is its head overloaded?")
        except WorkerDiedError as death:
            self._broker.stop()
            raise ValueError(f"The process that connects to the cluster ended. {death}") from death
        except BaseException:
            self._broker.stop()
            raise
        for _, message in received:
            match message:
                case Connected(nodes, warning):
                    self.nodes = nodes
                    if warning:
                        warn(warning)

    def _begin(self, plan: list[tuple[Node, tuple[int, ...]]]) -> None:
        workers = [worker for _, workers in plan for worker in workers]
        begin = Begin(
            versions(),
            bytes(ForkingPickler.dumps(self._store)),  # not its content: the broker maps the same memory
            self._assignment.configs[0].policy,
            self._n_workers,
            plan,
            self._arguments(workers),
            self._timeout,
            self._start_method,
        )
        self._broker.send(0, begin)

    def _arguments(self, workers: Iterable[int]) -> dict[int, bytes]:
        """Of each worker, what it is started with beside its host's store."""
        return {worker: dumps(self._assignment.arguments(worker)) for worker in workers}

    def poll(self, deadline: float) -> bool:
        try:
            self._broker.wait(max(0.0, deadline - time.monotonic()) if deadline != float("inf") else None)
        except WorkerDiedError as death:
            self._lose_all(death)
        except BaseException:
            if self._broker.finished:  # it has raised that, and no worker can be reached any more
                self._is_lost = True
                self._ended.update(range(self._n_workers))
            raise
        for _, message in self._broker.take():
            if isinstance(message, list):
                self._events += message
        return bool(self._events)

    def take_events(self) -> Iterable[tuple[int, Event]]:
        events, self._events = self._events, []
        return events

    def _lose_all(self, death: WorkerDiedError) -> None:
        """The broker has died, and with it all workers; their failures before are of no interest any more."""
        self._is_lost = True
        for failure in list(self._failures):
            if isinstance(failure, WorkerDiedError) and failure.can_be_replaced:
                self._failures.remove(failure)
                self._ended -= set(failure.workers)
        workers = tuple(worker for worker in range(self._n_workers) if worker not in self._ended)
        if workers:
            how = str(death).partition(". ")[0].removeprefix("Broker 0 ")
            told = f"The process that connects this one to the cluster {how}, and with it all workers are gone."
            self._events.append((workers[0], Died(workers, told)))

    def send(self, index: int, message: Any) -> None:
        self._broker.send(0, Deliver(index, dumps(message)))

    def replace_all(self, workers: Iterable[int]) -> None:
        workers = list(workers)
        if self._is_lost:
            self._broker.stop()
            try:
                self._start_broker()
                plan = deal_hosts(_all_free(self.nodes), len(workers))
                self._plan = [(node, tuple(workers[i] for i in indices)) for node, indices in plan]
            except ValueError as error:
                raise ClusterLostError(f"The cluster is lost: {error}") from error
            self._begin(self._plan)
        else:
            self._broker.send(0, Replace(self._arguments(workers)))
        self.replaced(workers)

    def load(self, policy: ActorCriticPolicy) -> None:
        if not self._ask(Load(dump_policy(policy))):
            self._store.load_policy(policy)  # there is no broker now; the next one begins from this

    def sync(self, with_optimizer: bool = False) -> None:
        self._ask(Sync(with_optimizer))

    def pop_hint(self) -> str:
        hint, self._hint = self._hint, ""
        return hint

    def pop_figures(self) -> Mapping[str, Any]:
        figures = self._ask(PopFigures())
        if not isinstance(figures, Figures) or figures.n_exchanges == 0:
            return {}
        staleness = figures.staleness / max(1, figures.n_merged)
        if staleness > self._n_workers and not self._has_hinted:
            self._has_hinted = True
            self._hint = (
                f"Hosts exchange what they learn too slowly: others make {staleness:.3g} updates meanwhile, and there are "
                f"{self._n_workers} workers. Learning may need more timesteps. Use fewer hosts, a faster network, a smaller "
                "policy, or fewer and larger updates (`envs_per_update`)."
            )
        return {
            "train/cluster_staleness": staleness,
            "time/exchange_ms": 1000 * figures.seconds / figures.n_exchanges,
            "time/hosts": figures.n_hosts,
        }

    def _ask(self, request: Any) -> Any:
        """Ask the broker; False if it is not there, which :meth:`wait` will tell."""
        if self._is_lost or self._is_stopped:
            return False
        try:
            return self._broker.ask({0: request})[0] or True
        except WorkerDiedError:
            return False

    def request_stop(self) -> None:
        self._broker.send(0, StopWorkers())

    def stop(self, hurry: threading.Event) -> None:
        """End all hosts, and let the center have everything that they have learned."""
        if self.is_forked or self._is_stopped:
            return
        self._is_stopped = True
        try:
            self._broker.send(0, Close())
            deadline = time.monotonic() + CLOSE_SECONDS
            while not self._is_lost and not hurry.is_set() and time.monotonic() < deadline:
                if any(isinstance(message, Closed) for _, message in self._broker.receive(0.1)) or self._broker.finished:
                    break
        except WorkerDiedError:
            pass
        finally:
            self._broker.stop(hurry)


def engine_of(cluster: str | dict[str, Any]) -> Callable[[], Engine]:
    """Makes the engine for A3C's argument ``cluster``."""
    arguments = {"address": cluster} if isinstance(cluster, str) else cluster
    return functools.partial(RayEngine, **arguments, environ=environ())


def _all_free(nodes: Iterable[Node]) -> list[Node]:
    """Nodes of a cluster that may not have noticed yet that our agents there have ended."""
    return [dataclasses.replace(node, n_free=node.n_cpus) for node in nodes]
