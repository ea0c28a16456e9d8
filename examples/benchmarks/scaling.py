"""
How speed grows with workers: steps per second of 1, 2, 4 ... workers, and the time of ``pull`` and ``push`` when all workers
do it at once.

    python examples/benchmarks/scaling.py [--seconds 10] [--repetitions 3] [--n-workers 1 2 4 8 16]

First, Pong with A3C's defaults and 8 environments for each worker; a single worker is a process, too. Each measurement runs
in a separate process, the repetitions alternate between the numbers of workers, and medians are reported. Then, processes
that only ``pull`` and ``push``, without a pause. (Workers also act and learn in between.) Run it on an otherwise idle
machine.
"""

import argparse
import multiprocessing
import pickle
import statistics
import sys
import time
from typing import Any

import ale_py
import cloudpickle
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from measuring import Clock, in_a_process_of_its_own, machine
from stable_baselines3.common.env_util import make_atari_env

from sb3_a3c import A3C
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.workers.worker_main import keep_freed_memory

gym.register_envs(ale_py)

ENV = "PongNoFrameskip-v4"
ENVS_PER_WORKER = 8
LSTM_SIZES = (18, 256, 1100)  #: of CnnLstmPolicy: about 0.1, 1.5 and 10 million parameters


def train(n_workers: int, seconds: float) -> float:
    """Steps a second of one training run."""
    clock = Clock(seconds)
    A3C("CnnLstmPolicy", make_atari_env(ENV, ENVS_PER_WORKER * n_workers), n_workers=n_workers).learn(10**9, clock)
    return clock.steps_per_second


def pull_and_push(
    store: SharedMemoryStore, policy: bytes, worker: int, seconds: float, everybody: Any, answers: Any
) -> None:
    """Body of a process: answers with rows of (when it began, seconds of the pull, seconds of the push)."""
    th.set_num_threads(1)  # as workers do
    keep_freed_memory()
    replica_policy = pickle.loads(policy)
    replica = store.replica(replica_policy, worker)
    parameters = list(replica_policy.parameters())
    gradients = [1e-3 * th.randn_like(parameter) for parameter in parameters]
    rows: list[tuple[float, float, float]] = []
    end = float("inf")
    while (begin := time.perf_counter()) < end:
        replica.pull()
        pulled = time.perf_counter()
        for parameter, gradient in zip(parameters, gradients, strict=True):  # a push uses its gradients up
            parameter.grad = gradient.clone()
        filled = time.perf_counter()
        replica.push()
        rows.append((begin, pulled - begin, time.perf_counter() - filled))
        if len(rows) == 1:  # torch imports much at the first step
            everybody.wait()
            end = time.perf_counter() + seconds
    answers.put(np.array(rows[1:]))


def time_replicas(lstm_size: int, n_processes: int, seconds: float) -> tuple[int, npt.NDArray[np.float64]]:
    """
    :param lstm_size: of the policy
    :param n_processes: how many pull and push at once
    :param seconds: for so long
    :return: number of parameters; seconds of each pull and each push (n, 2), of all processes
    """
    env = make_atari_env(ENV, 1)
    policy = A3C("CnnLstmPolicy", env, policy_kwargs=dict(lstm_hidden_size=lstm_size)).policy
    env.close()
    store = SharedMemoryStore(policy, n_processes)
    context = multiprocessing.get_context("spawn")
    everybody, answers = context.Barrier(n_processes), context.Queue()
    processes = [
        context.Process(target=pull_and_push, args=(store, cloudpickle.dumps(policy), worker, seconds, everybody, answers))
        for worker in range(n_processes)
    ]
    for process in processes:
        process.start()
    found: list[npt.NDArray[np.float64]] = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    begin, end = max(rows[0, 0] for rows in found), min(rows[-1, 0] for rows in found)  # while all of them were at it
    times = np.concatenate([rows[(rows[:, 0] >= begin) & (rows[:, 0] < end), 1:] for rows in found])
    return sum(parameter.numel() for parameter in policy.parameters()), times


def measure(n_workers: int, seconds: float) -> float:
    """Steps a second of one training run in a process of its own."""
    return float(in_a_process_of_its_own(__file__, "--only", str(n_workers), "--seconds", str(seconds)))


def report_rates(numbers: list[int], seconds: float, repetitions: int) -> None:
    """Measure and print a table of steps per second."""
    rates: dict[int, list[float]] = {n_workers: [] for n_workers in numbers}
    for _ in range(repetitions):
        for n_workers, found in rates.items():
            found.append(measure(n_workers, seconds))
            print(f"{n_workers} worker(s): {found[-1]:.0f} steps/s", file=sys.stderr)
    fewest = min(numbers)
    first = statistics.median(rates[fewest])
    print(f"\n| workers, {ENVS_PER_WORKER} environments each | steps/s | of {repetitions} runs | ÷ {fewest} worker(s) |")
    print("|---|---|---|---|")
    for n_workers, found in rates.items():
        median, single = statistics.median(found), ", ".join(f"{rate:.0f}" for rate in found)
        print(f"| {n_workers} | {median:.0f} | {single} | {median / first:.2f} |", flush=True)


def report_verbs(numbers: list[int], seconds: float) -> None:
    """Measure and print a table of the times of ``pull`` and ``push``."""
    print("\n| parameters | at once | pull, ms | push, ms | pull + push, ms | of |\n|---|---|---|---|---|---|")
    for lstm_size in LSTM_SIZES:
        for n_processes in numbers:
            n_parameters, times = time_replicas(lstm_size, n_processes, seconds)
            pull, push = 1e3 * np.median(times, axis=0)
            both = 1e3 * np.median(times.sum(axis=1))
            print(
                f"| {n_parameters / 1e6:.1f}M | {n_processes} | {pull:.2f} | {push:.2f} | {both:.2f} | {len(times)} |",
                flush=True,
            )


def main() -> None:
    """Measure all, or print one result for the process that measures all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each training run; pull and push: a quarter")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--n-workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", type=int, help="print the steps per second of one training run with this many workers")
    arguments = parser.parse_args()
    if arguments.only:
        print(train(arguments.only, arguments.seconds))
        return
    print(machine())
    report_rates(arguments.n_workers, arguments.seconds, arguments.repetitions)
    report_verbs(arguments.n_workers, arguments.seconds / 4)


if __name__ == "__main__":  # processes import this file
    main()
