"""
A minimal loop of the first A3C programs, for comparison: one environment in each process, a batch size of 1, and one
backward pass through the graph that acting has kept. Nothing is reported, logged or saved.
"""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_a3c.policies.torch_layers import BabyCNN

N_STEPS, GAMMA, ENT_COEF, MAX_GRAD_NORM = 20, 0.99, 0.01, 40.0
Memory = tuple[th.Tensor, th.Tensor]


class Network(nn.Module):
    """That of baby-a3c: the same layers as ``CnnLstmPolicy``."""

    def __init__(self, n_actions: int) -> None:
        super().__init__()
        self.cnn = BabyCNN(gym.spaces.Box(0, 255, (1, 84, 84), np.uint8))
        self.lstm = nn.LSTMCell(self.cnn.features_dim, 256)
        self.critic, self.actor = nn.Linear(256, 1), nn.Linear(256, n_actions)

    def forward(self, obs: Any, memory: Memory) -> tuple[th.Tensor, th.Tensor, Memory]:
        """
        :param obs: (1, 84, 84, 1), uint8
        :param memory: hidden and cell state, each (1, 256)
        :return: value (1, 1), log-probabilities of the actions (1, n_actions), memory
        """
        images = th.from_numpy(obs).permute(0, 3, 1, 2).float() / 255
        memory = self.lstm(self.cnn(images), memory)
        return self.critic(memory[0]), self.actor(memory[0]).log_softmax(dim=1), memory


def classic_steps_per_second(
    env_id: str, n_processes: int, seconds: float, make_env: Callable[..., VecEnv] = make_atari_env, warm_up: float = 5.0
) -> float:
    """
    :param env_id: an Atari environment without frame skip
    :param n_processes: each with one environment
    :param seconds: to measure
    :param make_env: called with the id of the environment, their number and a seed
    :param warm_up: seconds before
    :return: steps of all processes, a second
    """
    context = multiprocessing.get_context("spawn")
    env = make_env(env_id, 1)
    assert isinstance(env.action_space, gym.spaces.Discrete)
    shared = Network(int(env.action_space.n)).share_memory()
    counts = th.zeros(n_processes, dtype=th.int64).share_memory_()  # type: ignore[no-untyped-call]
    processes = [
        context.Process(target=_work, args=(env_id, make_env, shared, counts, i), daemon=True) for i in range(n_processes)
    ]
    for process in processes:
        process.start()
    while not (counts > 0).all():
        time.sleep(0.1)
    time.sleep(warm_up)
    before, begin = int(counts.sum()), time.perf_counter()
    time.sleep(seconds)
    rate = (int(counts.sum()) - before) / (time.perf_counter() - begin)
    for process in processes:
        process.kill()
    return rate


def _work(env_id: str, make_env: Callable[..., VecEnv], shared: Network, counts: th.Tensor, index: int) -> None:
    gym.register_envs(ale_py)
    th.set_num_threads(1)
    th.manual_seed(index)
    env = make_env(env_id, 1, seed=index)
    network = Network(shared.actor.out_features)
    optimizer = th.optim.Adam(shared.parameters(), lr=1e-4)
    obs, memory = env.reset(), (th.zeros(1, 256), th.zeros(1, 256))
    while True:
        network.load_state_dict(shared.state_dict())
        memory = (memory[0].detach(), memory[1].detach())
        values, log_probs, chosen, rewards, dones = [], [], [], [], []
        for _ in range(N_STEPS):
            value, log_prob, memory = network(obs, memory)
            action = log_prob.detach().exp().multinomial(1)
            obs, reward, done, _ = env.step(action[0].numpy())
            if done[0]:
                memory = (th.zeros(1, 256), th.zeros(1, 256))
            values.append(value[0, 0])
            log_probs.append(log_prob[0])
            chosen.append(log_prob[0, action[0, 0]])
            rewards.append(float(reward[0]))
            dones.append(bool(done[0]))
        with th.no_grad():
            following = float(network(obs, memory)[0])
        returns: list[float] = []
        for step_reward, ended in zip(reversed(rewards), reversed(dones), strict=True):
            following = step_reward + GAMMA * following * (not ended)
            returns.insert(0, following)
        errors = th.tensor(returns) - th.stack(values)
        all_log_probs = th.stack(log_probs)
        entropy = -(all_log_probs * all_log_probs.exp()).sum()
        loss = -(th.stack(chosen) * errors.detach()).sum() + 0.25 * errors.square().sum() - ENT_COEF * entropy
        network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        for mine, theirs in zip(network.parameters(), shared.parameters(), strict=True):
            theirs.grad = mine.grad
        optimizer.step()
        counts[index] += N_STEPS
