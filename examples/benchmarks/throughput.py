"""
Environment steps per second on Atari games: A3C and its alternatives, on the same cores.

    python examples/benchmarks/throughput.py [--games Pong Breakout] [--seconds 20] [--repetitions 3] [--n-envs 16]

A step is one decision of the agent (four emulator frames). Each measurement runs in a separate process; the repetitions
alternate between the contestants, and medians are reported. Rates start after a warm-up and cover whole rollouts. "Native"
means ``sb3_a3c.atari.make_ale_vec_env``, which A2C can use as well; all others use SB3's ``make_atari_env``. Run it on an
otherwise idle machine.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from classic_a3c import classic_steps_per_second
from measuring import Clock, in_a_process_of_its_own, machine
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.policies.lstm_policies import CnnLstmPolicy
from sb3_a3c.processes.machine import n_cores
from sb3_a3c.workers.worker_main import keep_freed_memory

gym.register_envs(ale_py)

Result = dict[str, float]
MakeEnv = Callable[..., VecEnv]


class PartsClock(Clock):
    """Also asks A3C where its time went."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.microseconds: Result = {}  #: of a worker for each step

    def _on_training_end(self) -> None:
        if isinstance(self.model, A3C) and self.model._collector is not None:
            pool = self.model._collector.statistics.pool  # of the whole run, as nothing was logged
            self.microseconds = {name: 1e6 * spent / pool.n_transitions for name, spent in pool.seconds.items()}


def timed(model: BaseAlgorithm, seconds: float) -> Result:
    """Learn for some seconds: steps a second, and for A3C the microseconds that a worker spends on each step."""
    clock = PartsClock(seconds)
    model.learn(10**9, clock, log_interval=None)  # type: ignore[arg-type]
    return {"steps/s": clock.steps_per_second, **clock.microseconds}


def a3c(
    env_id: str, seconds: float, n_envs: int, make_env: MakeEnv = make_atari_env, dtype: th.dtype = th.float32
) -> Result:
    """With the settings of ``train_atari.py``, which are the defaults."""
    policy_kwargs = dict(features_extractor_kwargs=dict(dtype=dtype))
    return timed(A3C("CnnLstmPolicy", make_env(env_id, n_envs), policy_kwargs=policy_kwargs), seconds)


def a2c(
    env_id: str,
    seconds: float,
    n_envs: int,
    n_threads: int | None = None,
    make_env: MakeEnv = make_atari_env,
    **kwargs: Any,
) -> Result:
    """SB3's A2C with NatureCNN and its default settings."""
    if n_threads is not None:
        th.set_num_threads(n_threads)
    return timed(A2C("CnnPolicy", make_env(env_id, n_envs, **kwargs)), seconds)


def recurrent_ppo(env_id: str, seconds: float) -> Result:
    """sb3-contrib's RecurrentPPO with RL Zoo's settings for Atari."""
    model = RecurrentPPO(
        "CnnLstmPolicy",
        make_atari_env(env_id, 8),
        n_steps=128,
        n_epochs=4,
        batch_size=256,
        learning_rate=2.5e-4,
        clip_range=0.1,
        policy_kwargs=dict(enable_critic_lstm=False, lstm_hidden_size=128),
    )
    return timed(model, seconds)


def classic(env_id: str, seconds: float, make_env: MakeEnv = make_atari_env) -> Result:
    """The loop of the first A3C programs, with one process for each core."""
    return {"steps/s": classic_steps_per_second(env_id, n_cores(), seconds, make_env)}


def lower_bound(env_id: str, seconds: float, make_env: MakeEnv = make_atari_env) -> Result:
    """
    What one core needs for the bare environment, and for one forward and one backward pass of the network in float32, at the
    best of several batches and with the faster of two ways; in microseconds a step. Nothing is shared or reported.
    """
    th.set_num_threads(1)
    keep_freed_memory()
    env = make_env(env_id, 1)
    env.reset()
    actions = [np.array([env.action_space.sample()]) for _ in range(1000)]
    n_steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds / 4:
        env.step(actions[n_steps % len(actions)])
        n_steps += 1
    emulator = 1e6 * (time.perf_counter() - begin) / n_steps
    space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    policy = CnnLstmPolicy(space, env.action_space, lambda _: 1e-4)
    networks = {
        f"{n_envs} environments, {way}": _network_microseconds(policy, n_envs, way == "on a cache", seconds / 2 / 8)
        for n_envs in (4, 8, 16, 32)
        for way in ("all steps at once", "on a cache")
    }
    network = min(networks.values())
    steps_per_second = n_cores() * 1e6 / (emulator + network)
    return {"steps/s": steps_per_second, "emulator": emulator, "network": network, **networks}


def _network_microseconds(policy: CnnLstmPolicy, n_envs: int, cached: bool, seconds: float, n_steps: int = 20) -> float:
    """
    One forward and one backward pass over rollouts of ``n_envs`` environments, for each of their steps: a whole rollout at
    once with PyTorch's gradient, or step by step into a cache.
    """
    obs = th.randint(0, 256, (n_steps * n_envs, 1, 84, 84), dtype=th.uint8)
    actions = th.zeros(n_steps * n_envs, dtype=th.int64)
    starts = th.zeros(n_steps, n_envs, dtype=th.bool)
    first_state = policy.initial_state(n_envs)
    cache = policy.new_activation_cache(n_steps, [slice(0, n_envs)]) if cached else None
    n_passes, begin = -1, 0.0
    while n_passes < 1 or time.perf_counter() - begin < seconds:
        policy.set_training_mode(cache is None)
        if cache is not None:
            cache.clear()
            state = first_state
            for images, now in zip(th.split(obs, n_envs), starts, strict=True):
                with th.no_grad():
                    _, _, state = policy.act(images, state, now, cache)
        chunk_cache = None if cache is None else cache.chunk_caches()[0]
        values, log_prob, entropy = policy.evaluate_actions(obs, actions, first_state, starts, chunk_cache)
        assert entropy is not None
        (values.sum() + log_prob.sum() + entropy.sum()).backward()  # type: ignore[no-untyped-call]
        policy.zero_grad()
        n_passes += 1
        if n_passes == 0:  # the first is slower
            begin = time.perf_counter()
    return 1e6 * (time.perf_counter() - begin) / (n_passes * n_steps * n_envs)


def contestants(n_envs: int) -> dict[str, Callable[[str, float], Result]]:
    """Of an environment id and seconds; A3C and A2C have ``n_envs`` environments."""
    a3cs, a2cs = functools.partial(a3c, n_envs=n_envs), functools.partial(a2c, n_envs=n_envs)
    return {
        "A3C": a3cs,
        "A3C, native": functools.partial(a3cs, make_env=make_ale_vec_env),
        "A3C, native, bfloat16": functools.partial(a3cs, make_env=make_ale_vec_env, dtype=th.bfloat16),
        "A2C Dummy": a2cs,
        "A2C Dummy, 1 thread": functools.partial(a2cs, n_threads=1),
        "A2C Dummy, native": functools.partial(a2cs, make_env=make_ale_vec_env),
        "A2C Subproc": functools.partial(a2cs, vec_env_cls=SubprocVecEnv),
        "A2C Subproc, 1 thread": functools.partial(a2cs, n_threads=1, vec_env_cls=SubprocVecEnv),
        "RecurrentPPO": recurrent_ppo,
        "classic A3C": classic,
        "classic A3C, native": functools.partial(classic, make_env=make_ale_vec_env),
        "lower bound": lower_bound,
        "lower bound, native": functools.partial(lower_bound, make_env=make_ale_vec_env),
    }


def measure(name: str, game: str, seconds: float, n_envs: int) -> Result:
    """In a process of its own."""
    arguments = ("--only", name, "--games", game, "--seconds", str(seconds), "--n-envs", str(n_envs))
    result: Result = json.loads(in_a_process_of_its_own(__file__, *arguments))
    return result


def report(game: str, results: dict[str, list[Result]]) -> None:
    """Print a table of medians, and of their ratios to the faster A2C on a ``DummyVecEnv``."""
    medians = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in results.items()}
    rates = {name: values["steps/s"] for name, values in medians.items()}
    reference = max(rates["A2C Dummy"], rates["A2C Dummy, 1 thread"])
    print(f"\n{game}\n| | steps/s | of {len(next(iter(results.values())))} runs | ÷ A2C Dummy |\n|---|---|---|---|")
    for name, runs in results.items():
        single = ", ".join(f"{one['steps/s']:.0f}" for one in runs)
        print(f"| {name} | {rates[name]:.0f} | {single} | {rates[name] / reference:.2f} |")
    print("\n| µs of a worker for each step | A3C | A3C, native | A3C, native, bfloat16 |\n|---|---|---|---|")
    columns = []
    for name in ("A3C", "A3C, native", "A3C, native, bfloat16"):
        parts = {key: value for key, value in medians[name].items() if key != "steps/s"}
        # the parts are of the whole run, the rate is without the warm-up: so this can come out below 0
        columns.append({**parts, "reporting and waiting": 1e6 * n_cores() / rates[name] - sum(parts.values())})
    for key in columns[0]:
        print(f"| {key} | " + " | ".join(f"{column[key]:.0f}" for column in columns) + " |")
    for suffix in ("", ", native"):
        bound, a3c_rate = medians[f"lower bound{suffix}"], rates[f"A3C{suffix}"]
        print(
            f"\nLower bound{suffix}: emulator {bound['emulator']:.0f}, network {bound['network']:.0f} µs. "
            f"A3C{suffix} ÷ it: {a3c_rate / bound['steps/s']:.2f}; ÷ classic A3C: {a3c_rate / rates['classic A3C']:.2f}; "
            f"÷ classic A3C, native: {a3c_rate / rates['classic A3C, native']:.2f}"
        )
    print("\n| network alone, forward and backward | µs of a core for each step |\n|---|---|")
    for way, microseconds in list(medians["lower bound"].items())[3:]:  # after the rate, the emulator and the best
        print(f"| {way} | {microseconds:.0f} |")


def main() -> None:
    """Measure all, or print one result for the process that measures all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=["Pong", "Breakout"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--n-envs", type=int, default=16, help="of A3C and A2C")
    parser.add_argument("--only", choices=contestants(1), help="print the result of one contestant, as JSON")
    arguments = parser.parse_args()
    everyone = contestants(arguments.n_envs)
    if arguments.only:
        result = everyone[arguments.only](f"{arguments.games[0]}NoFrameskip-v4", arguments.seconds)
        print(json.dumps(result))
        return
    print(machine())
    for game in arguments.games:
        results: dict[str, list[Result]] = {name: [] for name in everyone}
        for _ in range(arguments.repetitions):
            for name in everyone:
                results[name].append(measure(name, game, arguments.seconds, arguments.n_envs))
        report(game, results)


if __name__ == "__main__":  # SubprocVecEnv needs it
    main()
