"""Training on Ray: a real cluster of three nodes on this machine, with tokens. What fails is tried for real."""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_a3c import A3C
from sb3_a3c.cluster import host
from sb3_a3c.errors import ClusterLostError
from tests.toy_envs import Countdown, StepCounter

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e .[cluster]"),
]
N_STEPS, TOKEN = 5, "0123456789abcdef0123456789abcdef"


class Cluster(NamedTuple):
    address: str
    processes: list[dict[str, int]]  #: process ids of each node, by what they are; the head is the first


@contextlib.contextmanager
def running_cluster(mode: str = "token") -> Iterator[Cluster]:
    """Three nodes of 2 CPUs. Nothing of it is left behind."""
    if shutil.disk_usage("/dev/shm").free < 1e9:
        pytest.skip("/dev/shm has less than 1 GB for three object stores")
    checkout = Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", mode)
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("PYTHONPATH", str(checkout))  # on the nodes
        with subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.ray_cluster", "3"],
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                yield Cluster(**json.loads(next(line for line in process.stdout if line.startswith("{"))))
            finally:
                process.stdin.close()
                process.wait(30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """One that the test may damage."""
    with running_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 30
    while (left := ours()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def ours() -> list[str]:
    """Agents and workers that are still there: processes that were forked by a fork server, and actors."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            int(folder.name)
            if "ray::Host" in (folder / "cmdline").read_text():
                found.append(folder.name)
    return found


def countdowns(n: int = 6, seconds: float = 0.0) -> DummyVecEnv:
    return DummyVecEnv([lambda: StepCounter(Countdown(), seconds)] * n)


def make_model(cluster: Cluster, n_envs: int = 6, seconds: float = 0.0, **kwargs: Any) -> A3C:
    return A3C("MlpPolicy", countdowns(n_envs, seconds), n_steps=N_STEPS, seed=1, cluster=cluster.address, **kwargs)


class Watch(BaseCallback):
    """
    Checks what callbacks see. Ends training once it has seen transitions of ``n_pids`` workers; once there were
    ``n_workers``, it calls something.
    """

    def __init__(self, n_workers: int = 6, n_pids: int = 6, once: Callable[["Watch"], None] | None = None) -> None:
        super().__init__()
        self.n_workers, self.n_pids, self.once = n_workers, n_pids, once
        self.n_seen = 0
        self.n_steps: dict[tuple[int, int], int] = {}  # of each process and environment
        self.n_of: dict[int, int] = {}  # transitions of each process

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            key = info["pid"], info["env_index"]
            self.n_steps[key] = self.n_steps.get(key, 0) + 1
            assert info["n_steps"] == self.n_steps[key]  # none is missing, none comes twice
            self.n_of[info["pid"]] = self.n_of.get(info["pid"], 0) + 1
            self.n_seen += 1
        self.n_restarts = self.model._collector.n_restarts  # type: ignore[attr-defined]
        pids = [pid for pid, n in self.n_of.items() if n >= 20]
        if self.once is not None and len(pids) == self.n_workers:
            once, self.once = self.once, None
            once(self)
        return len(pids) < self.n_pids or self.once is not None

    def node(self, cluster: Cluster, number: int) -> list[int]:
        """The workers on a node of the cluster."""
        raylet = cluster.processes[number]["raylet"]
        return [pid for pid in self.n_of if is_alive(pid) and parent(agent(pid)) == raylet]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def agent(worker_pid: int) -> int:
    """The process of a worker's agent, whose fork server has started the worker."""
    return parent(parent(worker_pid))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def train(cluster: Cluster, watch: Watch, patience: float = 10.0, **kwargs: Any) -> A3C:
    """Until ``watch`` has seen enough; check the count, and that no worker is left."""
    model = make_model(cluster, seconds=0.01, **kwargs)
    try:
        model.learn(10**9, watch)
    finally:
        assert 0 <= model.num_timesteps - watch.n_seen <= 6 * 5 * N_STEPS  # what was reported at the end
        assert model.num_timesteps % N_STEPS == 0
        assert model._n_updates > 0
        deadline = time.monotonic() + patience
        while any(is_alive(pid) for pid in watch.n_of) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in watch.n_of if is_alive(pid)]
    return model


def test_three_nodes(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    agents: list[int] = []
    model = make_model(cluster, verbose=1)
    logger, logged = configure(None, []), dict[str, Any]()
    logger.record = lambda key, value, exclude=None: logged.update({key: value})  # type: ignore[method-assign]
    model.set_logger(logger)
    watch = Watch(n_pids=7, once=lambda watch: agents.extend(agent(pid) for pid in watch.n_of))
    model.learn(3000, watch, log_interval=10)
    assert 3000 <= model.num_timesteps <= 3000 + 6 * N_STEPS
    assert watch.n_seen == model.num_timesteps // 6 * 6
    assert model._n_updates == model.num_timesteps // N_STEPS
    assert sorted(agents.count(each) for each in set(agents)) == [2, 2, 2] and logged["time/hosts"] == 3
    assert "A3C starts 6 workers on 3 hosts, with 1 environment each" in capfd.readouterr().out


@pytest.mark.parametrize("case", ["address", "port", "wrong token", "no token", "too many", "versions", "subproc"])
def test_bad_input(case: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs: dict[str, Any] = dict(n_workers=7 if case == "too many" else 2, cluster=cluster.address)
    match case:
        case "address":
            kwargs["cluster"], match = "no-such-host:6379", "No Ray cluster can be reached at no-such-host:6379"
        case "port":
            kwargs["cluster"], match = "127.0.0.1:1", r"No Ray cluster .*refused.*`ray start --head`"
        case "wrong token":
            monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
            match = "wants another token than this machine's.*~/.ray/auth_token"
        case "no token":
            monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
            match = "wants a token, and this machine has none.*~/.ray/auth_token"
        case "too many":
            match = r"n_workers=7, but the cluster has 6 free CPUs \(.*Use n_workers=None"
        case "versions":
            monkeypatch.setattr(host, "__version__", "9.9")
            match = r"has sb3_a3c 0\.\S+ instead of 9\.9"
        case "subproc":
            match = "SubprocVecEnv run on this machine"
    began = time.monotonic()
    env = SubprocVecEnv([Countdown] * 2) if case == "subproc" else countdowns(8)
    with pytest.raises(ValueError, match=match):
        A3C("MlpPolicy", env, **kwargs).learn(100)
    env.close()
    assert time.monotonic() - began < 15


# --- faults and signals ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "match"),
    [
        pytest.param(signal.SIGKILL, r"^Host .* was lost .* They were replaced: restart 1 of at most 10\.$", id="killed"),
        pytest.param(signal.SIGSTOP, r"^Host .* did not answer for 30 s.* They were replaced", id="hangs"),
    ],
)
def test_an_agent_is_killed_or_hangs(number: signal.Signals, match: str, cluster: Cluster) -> None:
    watch = Watch(n_pids=8, once=lambda watch: os.kill(agent(next(iter(watch.n_of))), number))
    with pytest.warns(UserWarning, match=match):
        train(cluster, watch)
    assert watch.n_restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, cluster: Cluster) -> None:
    """As on one machine: Ctrl-C, and a SIGTERM for which there is a handler, end training in order."""
    times: list[float] = []

    def interrupt(_: Watch) -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            train(cluster, Watch(once=interrupt))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - times[0] < 10


@pytest.mark.slow
def test_a_worker_is_killed(cluster: Cluster) -> None:
    watch = Watch(n_pids=7, once=lambda watch: os.kill(next(iter(watch.n_of)), signal.SIGKILL))
    with pytest.warns(
        UserWarning, match=r"^Worker \d on .* was killed by SIGKILL.* It was replaced: restart 1 of at most 10"
    ):
        train(cluster, watch)
    assert watch.n_restarts == 1


@pytest.mark.slow
def test_the_broker_is_killed(cluster: Cluster) -> None:
    def kill(watch: Watch) -> None:
        (pid,) = watch.model._collector._workers._broker.pids  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)

    watch = Watch(n_pids=12, once=kill)
    with pytest.warns(UserWarning, match="^The process that connects this one .* was killed.* They were replaced"):
        train(cluster, watch)
    assert watch.n_restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("has_spare", [True, False])
def test_a_node_is_lost(has_spare: bool, own_cluster: Cluster) -> None:
    """
    Its workers move to a node that has CPUs for them; if there is none, the others go on. Its agent and its workers outlive
    the raylet, until they have not been called for a while.
    """
    n_workers = 4 if has_spare else 6
    lost: list[int] = []

    def kill(watch: Watch) -> None:
        lost.extend(watch.node(own_cluster, 2))
        os.kill(own_cluster.processes[2]["raylet"], signal.SIGKILL)

    class UntilGivenUp(Watch):
        def _on_step(self) -> bool:
            super()._on_step()
            if given_up := self.model._collector._given_up:  # type: ignore[attr-defined]
                self.n_pids = 0
                assert self.training_env.env_method("add", 1)
            return not given_up and len(self.n_of) < self.n_pids

    watch = UntilGivenUp(n_workers, 5 if has_spare else 100, kill)
    match = "They were replaced|It was replaced" if has_spare else "No host .* Training continues with 4 workers"
    with pytest.warns(UserWarning, match=f"^Host .*({match})"):
        train(own_cluster, watch, patience=host.LEASE_SECONDS + 10, n_workers=n_workers)
    assert len(lost) == (1 if has_spare else 2)


@pytest.mark.slow
def test_the_head_is_lost(own_cluster: Cluster, tmp_path: Path) -> None:
    watch = Watch(n_pids=100, once=lambda watch: os.kill(own_cluster.processes[0]["gcs_server"], signal.SIGKILL))
    model = make_model(own_cluster, seconds=0.01)
    with pytest.raises(ClusterLostError, match="No Ray cluster can be reached"):
        model.learn(10**9, watch)
    assert watch.n_seen <= model.num_timesteps <= watch.n_seen + 6 * 5 * N_STEPS
    assert model._n_updates > 100
    model.save(tmp_path / "model")
    A3C.load(tmp_path / "model")


@pytest.mark.slow
def test_the_users_process_is_killed(cluster: Cluster) -> None:
    script = f"""
from tests.cluster.test_ray import *
def tell(watch):
    print("pids", *watch.n_of, flush=True)
make_model(Cluster({cluster.address!r}, []), seconds=0.01).learn(10**9, Watch(n_pids=100, once=tell))
"""
    folder = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = next(line for line in process.stdout if line.startswith("pids")).split()[1:]
        agents = {agent(int(pid)) for pid in pids}
        process.kill()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in (*agents, *map(int, pids)) if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(agents) == 3 and not left


@pytest.mark.slow
def test_rl_zoo(cluster: Cluster, tmp_path: Path) -> None:
    command = f"""train --env CartPole-v1 -n 3000 --eval-freq -1 -params cluster:'"{cluster.address}"'"""
    zoo = [sys.executable, "-m", "sb3_a3c.zoo", *shlex.split(command)]
    result = subprocess.run(zoo, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "A3C starts 2 workers on 2 hosts" in result.stdout
    assert list(tmp_path.glob("logs/a3c/CartPole-v1_1/CartPole-v1.zip"))
    monitor = load_results(str(tmp_path / "logs/a3c/CartPole-v1_1"))
    assert 2000 < monitor["l"].sum() <= 3500


@pytest.mark.slow
def test_a_cluster_without_tokens() -> None:
    with running_cluster("disabled") as cluster:
        model = make_model(cluster, n_workers=2)
        with pytest.warns(UserWarning, match="^The Ray cluster has no authentication.*RAY_AUTH_MODE=token"):
            model.learn(500)
