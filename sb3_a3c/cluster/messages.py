"""The messages between main process, broker and hosts. What is for workers, or from them, is passed on as it is."""

from typing import NamedTuple, TypeAlias

from sb3_a3c.cluster.engine import Node


class Start(NamedTuple):
    """To a host: start a worker's process, also in the place of a dead one."""

    worker: int
    arguments: bytes  #: its share and its configuration


class Deliver(NamedTuple):
    """To the broker, and on to a host: for a worker's inbox."""

    worker: int
    message: bytes


class StopWorkers(NamedTuple):
    """To the broker, and on to all hosts: ask the workers to end soon."""


#: What a host is to carry out, in order.
Order: TypeAlias = Start | Deliver | StopWorkers


class Connected(NamedTuple):
    """To the main process: the cluster is there."""

    nodes: list[Node]
    warning: str  #: for the user, or empty


class Closed(NamedTuple):
    """To the main process: the center has everything, and no host runs any more."""


class Begin(NamedTuple):
    """To the broker: open the hosts of a plan."""

    versions: dict[str, str]  #: that hosts must have
    store: bytes  #: the center's, pickled by multiprocessing, so that its memory stays shared
    policy: bytes
    n_workers: int
    plan: list[tuple[Node, tuple[int, ...]]]
    arguments: dict[int, bytes]  #: by worker
    timeout: float | None
    start_method: str | None


class Replace(NamedTuple):
    """To the broker: let new workers run in the place of dead ones."""

    arguments: dict[int, bytes]


class Load(NamedTuple):
    """To the broker, to be answered: let all hosts continue from this policy."""

    policy: bytes


class Sync(NamedTuple):
    """To the broker, to be answered: exchange with all hosts now."""

    with_optimizer: bool


class PopFigures(NamedTuple):
    """To the broker, to be answered with :class:`Figures`."""


class Close(NamedTuple):
    """To the broker: end all hosts, and this process."""


class Figures(NamedTuple):
    """Sums over exchanges."""

    n_hosts: int = 0
    n_exchanges: int = 0
    seconds: float = 0.0
    n_merged: int = 0
    staleness: int = 0
