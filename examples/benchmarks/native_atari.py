"""
Atari environments of ``sb3_a3c.atari`` against those of SB3's ``make_atari_env``: are they equal, and how fast are they?

    python examples/benchmarks/native_atari.py [--steps 5000] [--seconds 5]

Both get equal random actions, with no-ops off, for --steps steps of full games, then as many of games that are cut after
1,000 frames. Then both run for --seconds on one core, with 8 environments, in alternating turns (medians), and so does ALE's
own vectorised environment with one thread, whose games begin differently. Steps are the agent's: four frames.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ale_py
import cv2
import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c.atari import make_ale_vec_env

GAMES = ("Pong", "Breakout", "SpaceInvaders")
COMPARED = ("rewards", "dones", "lives", "truncation", "episodes")
N_ENVS = 8
TURN = 25  # steps before the next one's turn


def summary(rewards: Any, dones: Any, info: dict[str, Any]) -> tuple[Any, ...]:
    """What is to be equal of one environment's step, in the order of ``COMPARED``."""
    episode = info.get("episode", {"r": None, "l": None})
    return rewards[0], dones[0], info["lives"], info["TimeLimit.truncated"], (episode["r"], episode["l"])


def compare(ours: VecEnv, sb3: VecEnv, n_steps: int, is_equal: dict[str, bool], levels: Any, counts: Any) -> None:
    """
    Play two environments with equal actions.

    :param ours: one environment
    :param sb3: one environment
    :param n_steps: for how long
    :param is_equal: whether each of ``COMPARED`` was equal so far; changed in place
    :param levels: (256,), number of pixels for each difference in grey levels; changed in place
    :param counts: (2,), dones and truncations of SB3's; changed in place
    """
    pictures: list[tuple[Any, Any]] = [(ours.reset(), sb3.reset())]
    for action in np.random.default_rng(0).integers(0, gym.spaces.utils.flatdim(sb3.action_space), (n_steps, 1)):
        obs, rewards, dones, (info,) = ours.step(action)
        sb3_obs, sb3_rewards, sb3_dones, (sb3_info,) = sb3.step(action)
        one, other = summary(rewards, dones, info), summary(sb3_rewards, sb3_dones, sb3_info)
        for name, value, sb3_value in zip(COMPARED, one, other, strict=True):
            is_equal[name] &= bool(value == sb3_value)
        counts += (other[1], other[3])
        pictures.append((obs, sb3_obs))
        if one[1] and other[1]:
            pictures.append((info["terminal_observation"], sb3_info["terminal_observation"]))
    for picture, sb3_picture in pictures:
        levels += np.bincount(np.abs(picture.astype(int) - sb3_picture).ravel(), minlength=256)


def report_equality(env_id: str, n_steps: int) -> None:
    is_equal, levels, counts = dict.fromkeys(COMPARED, True), np.zeros(256, dtype=int), np.zeros(2, dtype=int)
    for max_frames in (108_000, 1_000):
        kwargs: dict[str, Any] = {"env_kwargs": {"max_num_frames_per_episode": max_frames}}
        kwargs["wrapper_kwargs"] = {"noop_max": 0}
        ours, sb3 = make_ale_vec_env(env_id, seed=0, **kwargs), make_atari_env(env_id, seed=0, **kwargs)
        compare(ours, sb3, n_steps, is_equal, levels, counts)
        ours.close()
        sb3.close()
    print(f"{env_id}: {2 * n_steps} steps, {counts[0]} dones, {counts[1]} of them truncations")
    print("  identical: " + ", ".join(f"{name} {'yes' if equal else 'NO'}" for name, equal in is_equal.items()))
    percent = 100 * levels / levels.sum()
    shares = [f"{level}: {percent[level]:.3f} %" for level in range(4)] + [f"more: {percent[4:].sum():.3f} %"]
    print("  pixels by difference in grey levels: " + ", ".join(shares), flush=True)


def report_speed(env_id: str, seconds: float) -> None:
    envs = {"ours": make_ale_vec_env(env_id, N_ENVS, seed=0), "SB3's": make_atari_env(env_id, N_ENVS, seed=0)}
    actions = np.random.default_rng(0).integers(0, gym.spaces.utils.flatdim(envs["ours"].action_space), (1000, TURN, N_ENVS))
    steps: dict[str, Callable[[Any], Any]] = {}
    for name, env in envs.items():
        env.reset()
        steps[name] = env.step
    game = gym.spec(env_id).kwargs["game"]
    batch = ale_py.AtariVectorEnv(game, N_ENVS, num_threads=1, stack_num=1, noop_max=0, autoreset_mode="SameStep")
    batch.reset(seed=0)
    steps["ALE's own batch"] = batch.step
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    for turn in actions:
        for name, step in steps.items():
            begin = time.perf_counter()
            for row in turn:
                step(row)
            times[name].append((time.perf_counter() - begin) / turn.size)
        if time.perf_counter() > end:
            break
    for env in envs.values():
        env.close()
    medians = [f"{name} {1e6 * statistics.median(spent):.0f}" for name, spent in times.items()]
    print("  µs for a step of one environment: " + ", ".join(medians), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of each comparison")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in GAMES:
        report_equality(f"{name}NoFrameskip-v4", arguments.steps)
        report_speed(f"{name}NoFrameskip-v4", arguments.seconds)
