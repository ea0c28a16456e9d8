"""
What heartbeats and the check for NaN and infinity cost, on Pong.

    python examples/benchmarks/guard.py [--rollouts 100] [--n-envs 8]

One actor-learner makes rollouts in this process, with the heartbeat of a worker process. The CPU time of every call for the
check or the heartbeat is added up, and compared with the time of the rollout. The gradient's norm does not count, because
clipping needs it anyway.
"""

import argparse
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import torch as th

from sb3_a3c import A3C
from sb3_a3c.actor_learner import acting, actor_learner
from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.actor_learner.config import WorkerConfig
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.envs import non_finite
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.store import replica
from sb3_a3c.store.shared_memory import SharedMemoryStore

WATCHED = [
    (acting, "zero_non_finite"),
    (non_finite, "zero_non_finite"),
    (actor_learner, "check_rollout"),
    (actor_learner, "check_gradient"),
    (replica, "all_finite"),
    (WorkerChannel, "works"),
    (WorkerChannel, "rests"),
]

spent: defaultdict[str, float] = defaultdict(float)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begin = time.thread_time()
        result = function(*args)
        spent[function.__name__] += time.thread_time() - begin
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description="What guard and heartbeat cost on Pong.")
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--n-envs", type=int, default=8, help="of one worker")
    args = parser.parse_args()

    th.set_num_threads(1)
    for place, name in WATCHED:
        setattr(place, name, timed(getattr(place, name)))
    env = make_ale_vec_env("PongNoFrameskip-v4", args.n_envs, seed=0)
    model = A3C("CnnLstmPolicy", env, n_workers=0, seed=0)
    config = WorkerConfig(0, 0, tuple(range(args.n_envs)), cloudpickle.dumps(model.policy), model._hyperparams(), False)
    channel = WorkerChannel(None, queue.SimpleQueue(), th.zeros(2, 2, dtype=th.int64), 0)  # type: ignore[arg-type]
    learner = ActorLearner(config, model.env, SharedMemoryStore(model.policy, 1), channel.works)  # type: ignore[arg-type]
    for _ in range(5):  # torch warms up
        learner.rollout(model.lr_schedule(1.0))
        channel.rests()
    spent.clear()
    seconds = []
    for _ in range(args.rollouts):
        begin = time.perf_counter()
        learner.rollout(model.lr_schedule(1.0))
        channel.rests()
        seconds.append(time.perf_counter() - begin)
    env.close()

    rollout = float(np.median(seconds))
    print(f"a rollout of {model.n_steps} steps of {args.n_envs} environments: {1e3 * rollout:.1f} ms")
    for name, total in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:20} {1e3 * total / args.rollouts:7.3f} ms  {total / args.rollouts / rollout:7.3%}")
    total = sum(spent.values()) / args.rollouts
    print(f"guard and heartbeat: {1e3 * total:.3f} ms, {total / rollout:.2%} of it")


if __name__ == "__main__":
    main()
