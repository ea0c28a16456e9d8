"""
Train on a cluster of three nodes on this machine, and count what each node does:

    pip install -c constraints.txt -e ".[cluster]"
    python examples/cluster.py [timesteps]

On several machines, start the cluster with `ray start` (docs/several_hosts.md). Then a script only needs
A3C(…, cluster="auto").
"""

import os
import secrets
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_a3c import A3C

timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(16)  # read when Ray is imported

from ray.cluster_utils import Cluster  # noqa: E402


class TellProcess(gym.Wrapper[Any, Any, Any, Any]):
    """Adds the process id of the worker to each info."""

    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {**info, "pid": os.getpid()}


class CountByHost(BaseCallback):
    """Counts the timesteps of each host's workers. A host is identified by the process id of its agent."""

    reads_observations = False  # so that they need not be sent

    def _on_training_start(self) -> None:
        self.agents: dict[int, int] = {}  # of each worker
        self.counts: Counter[int] = Counter()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            worker = info["pid"]
            if worker not in self.agents:
                self.agents[worker] = parent(parent(worker))  # its parent is a fork server, which the agent has started
            self.counts[worker] += 1
        return True


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


node: Any = dict(num_cpus=2, object_store_memory=100_000_000)
cluster = Cluster(initialize_head=True, head_node_args=dict(**node, include_dashboard=False))
try:
    for _ in range(2):
        cluster.add_node(**node)
    env = make_vec_env("CartPole-v1", n_envs=12, wrapper_class=TellProcess)
    count = CountByHost()
    model = A3C("MlpPolicy", env, learning_rate=1e-3, cluster=cluster.address, verbose=1)
    model.learn(timesteps, count, log_interval=100)
finally:
    cluster.shutdown()

for agent in dict.fromkeys(count.agents.values()):
    workers = [worker for worker in count.agents if count.agents[worker] == agent]
    print(f"Host with agent {agent}: {sum(count.counts[w] for w in workers)} timesteps by {len(workers)} workers")
print(f"All: {model.num_timesteps} timesteps, {model._n_updates} updates of the shared parameters")
mean, std = evaluate_policy(model, make_vec_env("CartPole-v1", n_envs=1), n_eval_episodes=20)
print(f"Return of 20 episodes: {mean:.1f} ± {std:.1f}")
