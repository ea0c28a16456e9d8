"""
The broker: a process beside the main process that merges what hosts learn into the center, and passes messages between the
main process and the hosts' workers::

    main process ◄─ pipe ─► broker ◄─ engine ─► agent, one a host ◄─ pipes ─► its workers
          └──── center ──────┘                          └── the host's store ───┘
            (shared memory)                               (shared memory)

It is a process of its own because Ray, when its head is lost, ends the process that has connected to it, and takes its
signals. If the broker dies, another one goes on from the center, on which all hosts are opened anew.

For each host it has three threads, each of which calls the host again and again: to exchange, to listen, and to deliver.
"""

import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th

from sb3_a3c.cluster.engine import Agent, Engine, HostLostError, Node
from sb3_a3c.cluster.exchange import Center
from sb3_a3c.cluster.host import Opening
from sb3_a3c.cluster.messages import (
    Begin,
    Close,
    Closed,
    Connected,
    Deliver,
    Figures,
    Load,
    Order,
    PopFigures,
    Replace,
    Start,
    StopWorkers,
    Sync,
)
from sb3_a3c.errors import ClusterLostError
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.receiver import Died

#: Seconds in which a host must have started, and in which it must answer.
START_SECONDS, ANSWER_SECONDS = 60.0, 30.0
#: Seconds between two exchanges with a host, at least, and in relation to what one takes.
EXCHANGE_SECONDS, EXCHANGE_RATIO = 0.05, 3.0
#: Seconds after which hosts send their optimizer's state, so that not more is lost if the broker dies.
STATE_SECONDS = 60.0


def run_broker(channel: WorkerChannel, connect: Callable[[], Engine]) -> None:
    """Body of the broker's process."""
    th.set_num_threads(1)
    channel.works()  # from now on this process may start others
    Broker(channel, connect()).run()  # where it raises, the agents end with this process


class Broker:
    """Serves the main process, in this thread; :class:`HostLink` does the rest."""

    def __init__(self, channel: WorkerChannel, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.Lock()  #: of the center, the links and the figures
        self.figures = Figures()
        self.links: dict[int, HostLink] = {}  #: by worker, while its host is alive or to be opened
        self._channel = channel
        self._sending = threading.Lock()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._last_node: dict[int, Node] = {}  # by worker

    def run(self) -> None:
        self.send(Connected(self.engine.nodes(), self.engine.warning))
        while not self._is_closed and not self._channel.stopped():
            self._channel.serve(self._handle, block=True)
            if self._failure is not None:
                raise self._failure

    def send(self, message: Any) -> None:
        """Send to the main process. May block while it does not read; exchanges go on meanwhile."""
        with self._sending:
            self._channel.send(message)

    def fail(self, error: BaseException) -> None:
        """Let the main process raise what a thread of this one, or an agent, has raised."""
        self._failure = error
        self._channel.wake()

    def lost(self, link: "HostLink", reason: str) -> None:
        """A host has been lost."""
        with self.lock:
            for worker in link.workers:
                if self.links.get(worker) is link:
                    del self.links[worker]
            self.center.leave(link.number)
        told = f"Host {link.node.name} {reason}. Its workers {', '.join(map(str, link.workers))} are gone."
        try:
            can_be_replaced = bool(self._candidates(link.workers))
        except ClusterLostError as error:
            self.fail(error)
            return
        if not can_be_replaced:
            told += f" No host of the cluster has CPUs for {len(link.workers)} others."
        self.send([(link.workers[0], Died(link.workers, told, can_be_replaced))])

    def _candidates(self, workers: Sequence[int]) -> list[Node]:
        """The nodes on which these workers may run: where they ran before, or where there are CPUs for them."""
        nodes = self.engine.nodes()
        with self.lock:
            used = [link.node.key for link in self.links.values()]
        last = self._last_node[workers[0]].key
        free = [node for node in nodes if node.key != last and node.n_cpus - used.count(node.key) >= len(workers)]
        return [node for node in nodes if node.key == last] + sorted(free, key=lambda node: -node.n_free)

    def _handle(self, message: Any) -> Any:
        match message:
            case Deliver(worker):
                if (link := self.links.get(worker)) is not None:
                    link.outbox.put(message)
            case Begin():
                self._begin = message
                self.center = Center(pickle.loads(message.store), message.n_workers)
                for node, workers in message.plan:
                    self._open(workers, [node], message.arguments)
            case Replace(arguments):
                self._replace(arguments)
            case StopWorkers():
                for link in self._all_links():
                    link.outbox.put(message)
            case Load(policy):
                with self.lock:
                    self.center.load(pickle.loads(policy))
            case Sync(with_optimizer):
                self._for_all(lambda link: link.exchange(with_optimizer))
                if with_optimizer:
                    self.merge_states()
            case PopFigures():
                with self.lock:
                    figures, self.figures = self.figures, Figures()
                return figures._replace(n_hosts=sum(link.is_open for link in self._all_links()))
            case Close():
                links = self._all_links()
                for link in links:
                    link.abandon()
                self._for_all(HostLink.close)
                if links:
                    self.merge_states()
                self.engine.close()
                self._is_closed = True
                self.send(Closed())
        return None

    def _all_links(self) -> "set[HostLink]":
        with self.lock:  # other threads remove some
            return set(self.links.values())

    def merge_states(self) -> None:
        """Bring the center's optimizer state up to date with what hosts have sent last."""
        with self.lock:
            self.center.merge_states()

    def _replace(self, arguments: Mapping[int, bytes]) -> None:
        """Start workers on their host if it is alive; the others on another, together with those that they were with."""
        by_last_node: dict[str, list[int]] = {}
        for worker, content in arguments.items():
            if (link := self.links.get(worker)) is not None:
                link.outbox.put(Start(worker, content))
            else:
                by_last_node.setdefault(self._last_node[worker].key, []).append(worker)
        for workers in by_last_node.values():
            self._open(tuple(workers), self._candidates(workers) or [self._last_node[workers[0]]], arguments)

    def _open(self, workers: tuple[int, ...], nodes: Sequence[Node], arguments: Mapping[int, bytes]) -> None:
        with self.lock:
            link = HostLink(self, workers, nodes, {worker: arguments[worker] for worker in workers})
            for worker in workers:
                self.links[worker], self._last_node[worker] = link, link.node
        link.begin()

    def opening(self, link: "HostLink") -> Opening:
        """What a host is opened with, which begins from the center as it is now."""
        begin = self._begin
        with self.lock:
            self.center.leave(link.number)
            link.number = self.center.open(link.workers)
            for worker in link.workers:
                self._last_node[worker] = link.node
            answer = self.center.answer(link.number)
        of_all = begin.versions, begin.policy, begin.n_workers, begin.timeout, begin.start_method
        return Opening(*of_all, link.node.name, link.workers, answer)

    def _for_all(self, call: "Callable[[HostLink], None]") -> None:
        """Call something for all open hosts at the same time, and wait. One that is lost meanwhile is left out."""

        def checked(link: HostLink) -> None:
            try:
                call(link)
            except HostLostError as error:
                link.give_up(str(error))

        open_links = [link for link in self._all_links() if link.is_open]
        threads = [threading.Thread(target=checked, args=(link,), daemon=True) for link in open_links]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class HostLink:
    """
    The broker's end of one host, from its start until it is lost.

    :param workers: that run on it
    :param nodes: where it may start; the first that works counts
    :param arguments: pickled, of each worker
    """

    def __init__(
        self, broker: Broker, workers: tuple[int, ...], nodes: Sequence[Node], arguments: Mapping[int, bytes]
    ) -> None:
        self.broker, self.workers, self.node = broker, workers, nodes[0]
        self.number = -1  # the center's, of the present attempt to open it
        self.outbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()  #: to be carried out; None after the last
        self.is_open = False
        self._nodes, self._orders = nodes, [Start(worker, each) for worker, each in arguments.items()]
        self._agent: Agent
        self._exchanging = threading.Lock()
        self._is_over = threading.Event()  # the host is closed or lost
        self._is_closed = False
        self._reason = ""  # why it was lost, where another thread than the one that listens has found that
        self._state_time = time.monotonic()  # when the optimizer's state was last asked for

    def begin(self) -> None:
        """Start the host, and all that follows, in threads."""
        threading.Thread(target=self._run, daemon=True).start()

    def exchange(self, with_state: bool = False) -> None:
        """One exchange. Does nothing once the host is closed."""
        with self._exchanging:
            if not self._is_over.is_set():
                self._exchange("exchange", with_state)

    def close(self) -> None:
        """Let the host end after a last exchange."""
        with self._exchanging:
            self._is_closed = True
            self._is_over.set()
            self._exchange("close")
        self._agent.kill()

    def abandon(self) -> None:
        """Do not open the host, if it is not open yet."""
        if not self.is_open:
            self._is_closed = True
            self._is_over.set()

    def give_up(self, reason: str) -> None:
        """End an agent that was lost or does not answer; the thread that listens then tells of it."""
        self._reason = self._reason or reason
        self._is_over.set()
        self._agent.kill()

    def _exchange(self, method: str, *args: Any) -> None:
        began, broker = time.monotonic(), self.broker
        with broker.lock:
            if self.broker.links.get(self.workers[0]) is not self:
                raise HostLostError("was lost")
            answer = broker.center.answer(self.number)
        contribution = self._agent.call(method, answer, *args, timeout=ANSWER_SECONDS)
        with broker.lock:
            staleness = broker.center.merge(self.number, contribution)
            sums = broker.figures
            broker.figures = sums._replace(
                n_exchanges=sums.n_exchanges + 1,
                seconds=sums.seconds + time.monotonic() - began,
                n_merged=sums.n_merged + (staleness is not None),
                staleness=sums.staleness + (staleness or 0),
            )

    def _run(self) -> None:
        """Start the host; then listen to its workers until it is closed or lost."""
        try:
            self._start()
            for loop in (self._exchange_often, self._deliver):
                threading.Thread(target=self._checked, args=(loop,), daemon=True).start()
            while not self._is_over.is_set():
                if events := self._agent.call("listen", timeout=ANSWER_SECONDS):
                    self.broker.send(events)
        except HostLostError as error:
            self._reason = self._reason or str(error)
        except Exception as error:
            if not self._is_closed:
                self._is_closed = True
                self.broker.fail(error)
        self.is_open = False
        self._is_over.set()
        self.outbox.put(None)
        if not self._is_closed:
            self.broker.lost(self, self._reason)

    def _start(self) -> None:
        error = HostLostError("could not be started")
        for node in self._nodes:
            self.node = node
            try:
                self._agent = self.broker.engine.start(self.node, len(self.workers), START_SECONDS)
                self._agent.call("open", self.broker.opening(self), timeout=START_SECONDS)
                self._agent.call("carry_out", self._orders, timeout=START_SECONDS)
            except HostLostError as lost:
                error = lost
            else:
                self.is_open = True
                return
        raise error

    def _checked(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except HostLostError as error:
            self.give_up(str(error))
        except Exception as error:
            if not self._is_over.is_set():
                self.broker.fail(error)

    def _exchange_often(self) -> None:
        pause = EXCHANGE_SECONDS
        while not self._is_over.wait(pause):
            began = time.monotonic()
            with_state = began - self._state_time > STATE_SECONDS
            self.exchange(with_state)
            if with_state:
                self._state_time = began
                self.broker.merge_states()
            pause = max(EXCHANGE_SECONDS, EXCHANGE_RATIO * (time.monotonic() - began))

    def _deliver(self) -> None:
        """Send what is in the outbox, in order, as much as there is in one call."""
        while not self._is_over.is_set():
            orders = [self.outbox.get()]
            while not self.outbox.empty():
                orders.append(self.outbox.get())
            if orders[-1] is None:
                return
            self._agent.call("carry_out", orders, timeout=START_SECONDS)
