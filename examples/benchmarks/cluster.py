"""
What more hosts bring, on a Ray cluster whose nodes are all on this machine: steps per second with 1, 2 and 3 of them where
steps of the environments wait 10 and 100 ms, what an exchange takes, and the staleness to expect with 1 and 10 Gbit/s.

    python examples/benchmarks/cluster.py [--seconds 20] [--repetitions 3]

Latency is slept, so it needs no cores. Environments of 10 ms: 2 workers of one environment on each node; of 100 ms: 6, and
for comparison 18 workers without a cluster. Exchange times: an update after two steps of 100 ms, 2 workers on each node, so
that hosts do little else; policies with about 0.1, 1.5 and 10 million parameters. Every measurement is a process of its own;
repetitions alternate, and medians are reported. There is no network between the nodes: staleness with one is computed. Leave
the machine alone meanwhile.
"""

import argparse
import contextlib
import json
import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from measuring import MLP_SIZES, Clock, in_a_process_of_its_own, machine, ray_nodes
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_a3c import A3C
from sb3_a3c.cluster.broker import EXCHANGE_RATIO, EXCHANGE_SECONDS

HOSTS = (1, 2, 3)
RATES = ((0.01, 2), (0.1, 6))  #: seconds of a step, workers on each node
BANDWIDTHS = (float("inf"), 1e9, 1e10)  #: bits a second


class Waiting(gym.Env[Any, Any]):
    """Nothing to learn; each step waits."""

    observation_space = spaces.Box(-1, 1, (4,))
    action_space = spaces.Discrete(2)
    render_mode = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(4, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        return np.zeros(4, dtype=np.float32), 0.0, False, False, {}


class Begin(BaseCallback):
    """Lets a clock begin only once all hosts have started."""

    reads_observations = False

    def __init__(self, clock: Clock, n_envs: int) -> None:
        super().__init__()
        self.clock, self.missing = clock, set(range(n_envs))
        self.cpu_seconds = 0.0

    def _on_step(self) -> bool:
        if self.missing:
            self.missing -= {info["env_index"] for info in self.locals["infos"]}
            self.clock.began = time.perf_counter()
            self.cpu_seconds = time.process_time()
        return True


def train(n_hosts: int, step_seconds: float, workers_per_host: int, size: int, seconds: float) -> dict[str, float]:
    """Train on a cluster of this many nodes; without a cluster with ``n_hosts=0``, as many workers as on three nodes."""
    n_workers, n_steps = workers_per_host * (n_hosts or max(HOSTS)), 2 if size else 20
    with ray_nodes(n_hosts, workers_per_host) if n_hosts else contextlib.nullcontext() as cluster:
        model = A3C(
            "MlpPolicy",
            DummyVecEnv([lambda: Waiting(step_seconds)] * n_workers),
            n_steps=n_steps,
            n_workers=n_workers,
            cluster=cluster,
            policy_kwargs=dict(net_arch=[size, size] if size else [64, 64]),
        )
        logger, logged = configure(None, []), dict[str, Any]()
        logger.record = lambda key, value, exclude=None: logged.update({key: value})  # type: ignore[method-assign]
        model.set_logger(logger)
        clock = Clock(seconds)
        log_interval = max(1, int(seconds / 2 / (step_seconds * n_steps)))  # the last log is of half the time
        begin = Begin(clock, n_workers)
        model.learn(10**9, CallbackList([begin, clock]), log_interval=log_interval)
        spent, elapsed = time.process_time() - begin.cpu_seconds, time.perf_counter() - (clock.began or 0.0)
    return {
        "steps/s": clock.steps_per_second,
        "main process, cores": spent / elapsed,
        "parameters": sum(parameter.numel() for parameter in model.policy.parameters()),
        "updates/s": clock.steps_per_second / model.n_steps,
        "exchange, ms": logged.get("time/exchange_ms", 0.0),
        "staleness": logged.get("train/cluster_staleness", 0.0),
    }


def measure(*arguments: float) -> dict[str, float]:
    """:func:`train` in a process of its own."""
    result: dict[str, float] = json.loads(in_a_process_of_its_own(__file__, "--only", *map(str, arguments)))
    return result


def report_rates(seconds: float, repetitions: int) -> None:
    """Measure and print a table of steps per second."""
    print("\n| a step, ms | workers | hosts | steps/s | ÷ 1 host | main process, cores |\n|---|---|---|---|---|---|")
    for step_seconds, workers in RATES:
        found: dict[int, list[dict[str, float]]] = {n: [] for n in ((0, *HOSTS) if workers == 6 else HOSTS)}
        for _ in range(repetitions):
            for n_hosts, results in found.items():
                results.append(measure(n_hosts, step_seconds, workers, 0, seconds))
        medians = {n: statistics.median(each["steps/s"] for each in results) for n, results in found.items()}
        for n, results in found.items():
            cores = statistics.median(each["main process, cores"] for each in results)
            where = str(n) if n else "no cluster"
            print(
                f"| {1000 * step_seconds:g} | {workers * (n or max(HOSTS))} | {where} | {medians[n]:.0f} "
                f"| {medians[n] / medians[1]:.2f} | {cores:.3f} |",
                flush=True,
            )


def report_exchanges(seconds: float) -> None:
    """Measure and print a table of exchanges, with the staleness that :func:`expected_staleness` says for it."""
    print("\n| parameters | hosts | exchange, ms | staleness | computed | with 1 Gbit/s | with 10 Gbit/s |")
    print("|---|---|---|---|---|---|---|")
    for size in MLP_SIZES:
        for n_hosts in (1, 3):
            result = measure(n_hosts, 0.1, 2, size, seconds)
            computed = [expected_staleness(n_hosts, result, bandwidth) for bandwidth in BANDWIDTHS]
            figures = [result["exchange, ms"], result["staleness"], *computed]
            told = " | ".join(f"{figure:.1f}" for figure in figures)
            print(f"| {result['parameters'] / 1e6:.1f}M | {n_hosts} | {told} |", flush=True)


def expected_staleness(n_hosts: int, measured: dict[str, float], bandwidth: float) -> float:
    """
    Updates by the other hosts from the answer with which a host begins to make steps, until the end of the next exchange.

    :param measured: by :func:`measure`, without a network
    :param bandwidth: in bits per second, of a network over which the policy is sent there and back, in bfloat16
    """
    exchange = measured["exchange, ms"] / 1000 + 2 * 16 * measured["parameters"] / bandwidth
    pause = max(EXCHANGE_SECONDS, EXCHANGE_RATIO * exchange)
    return (n_hosts - 1) * measured["updates/s"] / n_hosts * (exchange + pause + exchange)


def main() -> None:
    """Measure all, or print one result for the process that measures all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each training run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", type=float, nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        n_hosts, step_seconds, workers, size, seconds = arguments.only
        print(json.dumps(train(int(n_hosts), step_seconds, int(workers), int(size), seconds)))
        return
    print(machine())
    report_rates(arguments.seconds, arguments.repetitions)
    report_exchanges(arguments.seconds)


if __name__ == "__main__":  # processes import this file
    main()
