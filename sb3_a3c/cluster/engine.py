"""
What the broker asks of whatever starts agents on hosts and carries calls to them. ``ray_engine`` implements it with Ray;
tests have one that needs no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class HostLostError(Exception):
    """An agent has ended, does not answer, or could not be started. The message is a clause without subject."""


@dataclass(frozen=True)
class Node:
    """A host, or what stands for one, on which an agent can be started."""

    key: str
    name: str  #: for people
    n_cpus: int
    n_free: int  #: CPUs that nothing else had claimed when the engine was asked
    is_here: bool  #: whether this process runs on it


class Agent(Protocol):
    """A :class:`~sb3_a3c.cluster.host.Host` in a process of its own. Several threads may call it at once."""

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        """
        Call a method.

        :raises HostLostError: if there is no answer within ``timeout`` seconds
        :raises Exception: what the method has raised
        """

    def kill(self) -> None:
        """End the process. It may have ended before."""


class Engine(Protocol):
    """Starts agents. It lives in the broker's process. Several threads may use it at once."""

    warning: str  #: for the user, or empty

    def nodes(self) -> list[Node]:
        """The hosts that are alive, in no order."""

    def start(self, node: Node, n_cpus: int, timeout: float) -> Agent:
        """
        Start an agent that claims this number of CPUs.

        :raises HostLostError: if it does not run within ``timeout`` seconds
        """

    def close(self) -> None:
        """End all agents."""


def deal_hosts(nodes: Sequence[Node], n_workers: int) -> list[tuple[Node, tuple[int, ...]]]:
    """
    Distribute workers over nodes, so that as many CPUs as possible stay free on each. This machine has the first workers, as
    environment 0 may record videos.

    :raises ValueError: if there are more workers than free CPUs
    """
    free = {node.key: node.n_free for node in nodes}
    if n_workers > sum(free.values()):
        names = ", ".join(f"{node.name} {node.n_free} of {node.n_cpus}" for node in nodes)
        raise ValueError(
            f"n_workers={n_workers}, but the cluster has {sum(free.values())} free CPUs ({names}), and each worker needs "
            "one. Use n_workers=None for all of them, or add hosts."
        )
    n_of = dict.fromkeys(free, 0)
    for _ in range(n_workers):
        key = max(free, key=lambda key: free[key])
        free[key] -= 1
        n_of[key] += 1
    plan, begin = [], 0
    for node in sorted(nodes, key=lambda node: not node.is_here):
        if n := n_of[node.key]:
            plan.append((node, tuple(range(begin, begin + n))))
            begin += n
    return plan
