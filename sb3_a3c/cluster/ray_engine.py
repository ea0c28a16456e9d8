"""The engine on Ray: the only code that imports it. See https://docs.ray.io."""

import contextlib
import importlib
import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_a3c.cluster.engine import Agent, HostLostError, Node
from sb3_a3c.cluster.host import Host
from sb3_a3c.errors import ClusterLostError, RemoteTraceback

#: Seconds in which a cluster's head must accept a connection; `ray.init` would try for minutes.
PROBE_SECONDS = 10.0


class RayEngine:
    """
    Agents are Ray actors.

    :param address: "auto" or "host:port" of the head
    :param runtime_env: as for ``ray.init``
    :param environ: the environment variables that Ray reads, as they are in the user's process
    :raises ValueError: if there is no such cluster, or it refuses the connection
    """

    def __init__(
        self, address: str, runtime_env: dict[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        os.environ.update(environ or {})  # this process has those with which the fork server was started
        has_token = _use_token()
        import ray

        self._ray = ray
        self._address = _resolved(address)
        _probe(self._address)
        _check_token(self._address)
        try:
            ray.init(self._address, runtime_env=runtime_env, logging_level="ERROR")
        except Exception as error:  # of many classes
            raise ValueError(
                f"The Ray cluster at {self._address} can't be used: {type(error).__name__}: {error}. This machine must be a "
                f"node of it (`ray start --address={self._address}`), with the cluster's versions of Ray and Python."
            ) from error
        self._here = ray.get_runtime_context().get_node_id()
        self.warning = ""
        if not has_token and len(self.nodes()) > 1:
            self.warning = (
                "The Ray cluster has no authentication: whoever reaches its ports can run programs on its hosts. Start it "
                "with RAY_AUTH_MODE=token."
            )

    def nodes(self) -> list[Node]:
        try:
            alive = [node for node in self._ray.nodes() if node["Alive"]]
            from ray._private.state import available_resources_per_node  # there is no public one

            free = available_resources_per_node()
        except Exception as error:
            raise ClusterLostError(f"The Ray cluster at {self._address} does not answer: {error}") from error
        n_same = Counter(node["NodeManagerAddress"] for node in alive)
        nodes = []
        for node in alive:
            key, name = node["NodeID"], node["NodeManagerAddress"]
            if n_same[name] > 1:  # for tests, a machine may have several
                name += f" (node {key[:6]})"
            n_free = int(free.get(key, {}).get("CPU", 0))
            nodes.append(Node(key, name, int(node["Resources"].get("CPU", 0)), n_free, key == self._here))
        return nodes

    def start(self, node: Node, n_cpus: int, timeout: float) -> Agent:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # never restarted or asked again by Ray: what a host has learned would be merged twice
        actor = (
            self._ray.remote(Host)
            .options(
                num_cpus=n_cpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False),
            )
            .remote()
        )
        agent = RayAgent(self._ray, actor)
        try:
            agent.call("__ray_ready__", timeout=timeout)
        except HostLostError as error:
            agent.kill()
            if "creation task" in str(error) or "runtime_env" in str(error):  # it would fail again
                raise ValueError(f"A3C can't be started on host {node.name}, which {error}") from error
            raise
        return agent

    def close(self) -> None:
        self._ray.shutdown()


class RayAgent:
    """An actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(getattr(self._actor, method).remote(*args), timeout=timeout)
        except exceptions.RayTaskError as error:  # the method has raised
            raise error.cause from RemoteTraceback(str(error))
        except exceptions.GetTimeoutError:
            raise HostLostError(f"did not answer for {timeout:g} s") from None
        except exceptions.RayError as error:
            raise HostLostError(f"was lost ({' '.join(str(error).split())})") from None

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.kill(self._actor)


def environ() -> dict[str, str]:
    """The environment variables that Ray reads."""
    return {key: value for key, value in os.environ.items() if key.startswith("RAY_")}


def _use_token() -> bool:
    """Use a token wherever there is one: an open cluster accepts it too. Return whether there is one."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and (os.environ.get("RAY_AUTH_TOKEN") or path.exists()):
        os.environ["RAY_AUTH_MODE"] = "token"
    return os.environ.get("RAY_AUTH_MODE") == "token"


def _resolved(address: str) -> str:
    """The address of the head as host:port."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    with contextlib.suppress(ConnectionError):
        if found := canonicalize_bootstrap_address("auto"):
            return str(found)
    raise ValueError(
        "cluster='auto', but no Ray cluster runs on this machine. Start one (`ray start --head`), make this machine a node "
        "of one (`ray start --address=HEAD:6379`), or leave out `cluster` to train on this machine alone."
    )


def _probe(address: str) -> None:
    """Raise a ValueError if no one listens there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"No Ray cluster can be reached at {address}: {error}. Is `ray start --head` running there, is it its port (by "
            "default 6379), and does no firewall close it?"
        ) from error


def _check_token(address: str) -> None:
    """Raise a ValueError if the cluster refuses our token; `ray.init` would try for 20 s and not say why it fails."""
    from ray.exceptions import AuthenticationError

    raylet: Any = importlib.import_module("ray._raylet")
    try:
        raylet.GcsClient(address=address)
    except AuthenticationError:
        is_set = os.environ.get("RAY_AUTH_MODE") == "token"
        problem = "another token than this machine's" if is_set else "a token, and this machine has none"
        raise ValueError(
            f"The Ray cluster at {address} wants {problem}. Copy the file ~/.ray/auth_token of its head here, or set "
            "RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token."
        ) from None
