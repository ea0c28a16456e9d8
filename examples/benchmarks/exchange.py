"""
What an exchange of parameters with hosts takes when nothing is learned meanwhile, on a Ray cluster on this machine.

    python examples/benchmarks/exchange.py [--seconds 10]

Every host says that it has made an update, and exchanges the policy, as often as in training; the broker's part is done
here. With one host the policy is sent to the center only; with three, in both directions, in bfloat16. Medians; every
measurement is a process of its own. Leave the machine alone meanwhile.
"""

import argparse
import statistics
import threading
import time
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from measuring import MLP_SIZES, in_a_process_of_its_own, machine, ray_nodes

from sb3_a3c import MlpPolicy
from sb3_a3c.cluster import ray_engine
from sb3_a3c.cluster.broker import EXCHANGE_RATIO, EXCHANGE_SECONDS
from sb3_a3c.cluster.exchange import Center
from sb3_a3c.cluster.host import Host, Opening, versions
from sb3_a3c.policies.pickling import dump_policy
from sb3_a3c.store.shared_memory import SharedMemoryStore

HOSTS = (1, 3)


class CountingHost(Host):
    """A host without workers, which counts an update when it is told, so that its next exchange sends the policy."""

    def open(self, opening: Opening) -> None:
        super().open(opening)
        self._workers = opening.workers

    def update(self) -> None:
        """Count an update by the only worker."""
        self._store.set_rows(self._workers, self._store.rows(self._workers) + 1)


def exchange(n_hosts: int, size: int, seconds: float) -> tuple[int, float]:
    """The number of parameters, and the median seconds of one exchange."""
    th.set_num_threads(1)  # as the broker does
    with ray_nodes(n_hosts, n_cpus=1) as address:
        space = spaces.Box(-1, 1, (4,), np.float32)
        policy = MlpPolicy(space, spaces.Discrete(2), lambda _: 1e-4, net_arch=[size, size])
        store = SharedMemoryStore(policy, n_hosts)
        center, lock = Center(store, n_hosts), threading.Lock()
        vars(ray_engine)["Host"] = CountingHost  # of which the engine makes actors
        engine = ray_engine.RayEngine(address)
        found: list[float] = []

        def run(worker: int, agent: Any, number: int) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                agent.call("update", timeout=60)
                began = time.monotonic()
                with lock:
                    answer = center.answer(number)
                contribution = agent.call("exchange", answer, False, timeout=60)
                with lock:
                    center.merge(number, contribution)
                found.append(time.monotonic() - began)
                time.sleep(max(EXCHANGE_SECONDS, EXCHANGE_RATIO * found[-1]))

        threads = []
        for worker, each in enumerate(engine.nodes()):
            agent, number = engine.start(each, 1, 60), center.open([worker])
            opening = versions(), dump_policy(policy), n_hosts, None, None, each.name, (worker,), center.answer(number)
            agent.call("open", Opening(*opening), timeout=60)
            threads.append(threading.Thread(target=run, args=(worker, agent, number)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.n_updates == len(found)
        engine.close()
    return sum(parameter.numel() for parameter in policy.parameters()), statistics.median(found)


def main() -> None:
    """Print a table, or one result for the process that prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        n_parameters, median = exchange(args.only[0], args.only[1], args.seconds)
        print(f"| {n_parameters / 1e6:.1f}M | {args.only[0]} | {1000 * median:.1f} |")
        return
    print(machine(), "\n\n| parameters | hosts | an exchange, ms |\n|---|---|---|", sep="")
    for size in MLP_SIZES:
        for n_hosts in HOSTS:
            only = map(str, (n_hosts, size))
            print(in_a_process_of_its_own(__file__, "--seconds", str(args.seconds), "--only", *only), flush=True)


if __name__ == "__main__":  # Ray's processes import this file
    main()
