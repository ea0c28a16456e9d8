"""The command line ``sb3-a3c doctor --env PongNoFrameskip-v4 --n-envs 16``, or ``python -m sb3_a3c.doctor …``."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import __version__
from sb3_a3c.a3c import A3C
from sb3_a3c.doctor import checks
from sb3_a3c.doctor.checks import Finding, Level, unknown
from sb3_a3c.doctor.short_run import N_PUSHES, default_policy, gradient_mismatch, make_env, train
from sb3_a3c.processes.machine import affinity, available_memory, cpu_quota, free_shared_memory, n_cores
from sb3_a3c.processes.start import process_context
from sb3_a3c.store.shared_memory import SharedMemoryStore

#: Exit status after Ctrl-C, as a shell's.
INTERRUPTED = 130
_PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numpy", "ale-py")


def main(argv: Sequence[str] | None = None, prog: str = "python -m sb3_a3c.doctor") -> int:
    """Print each finding as soon as it is made. Exit status: 1 if something would stop a run."""
    args = _parse(argv, prog)
    has_problem = False
    try:
        for finding in findings(args):
            print(f"{finding.level:<8} {finding.name:<14} {finding.text}", flush=True)
            if finding.fix:
                print(f"         fix: {finding.fix}", flush=True)
            has_problem |= finding.level is Level.PROBLEM
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return int(has_problem)


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog,
        description="Check this machine before a long run of A3C, and say how to fix what is wrong.",
        epilog="Exit status: 0 if nothing would stop a run, 1 if something would.",
    )
    parser.add_argument(
        "--env",
        metavar="ID",
        default=_default_env(),
        help="what you are going to train on, because memory depends on it; your own as module:Id-v0. Default: %(default)s "
        "(Pong if Atari is installed, else CartPole)",
    )
    parser.add_argument("--n-envs", type=int, default=16, help="number of environments (default: %(default)s)")
    parser.add_argument("--n-workers", type=int, help="as A3C's; default: one per usable core, at most one per environment")
    parser.add_argument("--policy", choices=sorted(A3C.policy_aliases), help="default: the LSTM policy for the observations")
    parser.add_argument("--start-method", choices=("forkserver", "spawn"), help="as A3C's; default: the platform's best")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a rollout (default: 120)")
    args = parser.parse_args(argv)
    if args.n_envs < 1:
        parser.error("--n-envs must be at least 1")
    if args.n_workers is not None and not 0 <= args.n_workers <= args.n_envs:
        parser.error(f"--n-workers must be between 0 and --n-envs ({args.n_envs}), as each worker needs an environment")
    return args


def _default_env() -> str:
    has_atari = all(importlib.util.find_spec(name) for name in ("ale_py", "cv2"))
    return "PongNoFrameskip-v4" if has_atari else "CartPole-v1"


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """What each check finds, one after another. What needs something that does not work is not checked."""
    n_workers = min(n_cores(), args.n_envs) if args.n_workers is None else args.n_workers
    yield versions()
    yield checks.check_cores(max(1, n_workers), affinity(), cpu_quota())
    try:
        env = make_env(args.env, args.n_envs)
    except Exception as error:
        yield checks.unusable_environment(args.env, error, gym.registry)
        yield unknown("others", "they need the environment")
        return
    try:
        yield from _findings_in(env, n_workers, args)
    finally:
        env.close()


def versions() -> Finding:
    """What a bug report should begin with."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    python = f"Python {platform.python_version()}"
    return Finding("versions", Level.OK, ", ".join([f"sb3_a3c {__version__}", python, *found, platform.platform()]))


def _findings_in(env: VecEnv, n_workers: int, args: argparse.Namespace) -> Iterator[Finding]:
    """What depends on the environment: first what would end this process, then what would end workers."""
    policy = args.policy or default_policy(env.observation_space)
    try:
        model = A3C(policy, env, n_workers=args.n_workers, start_method=args.start_method)
        assert model.env is not None
        obs: Any = model.env.reset()  # never a tuple: A3C has checked the spaces
    except Exception as error:
        fix = f"--policy {default_policy(env.observation_space)}, or change the environment as the message says"
        yield Finding("environment", Level.PROBLEM, f"{args.env} with {policy}: {type(error).__name__}: {error}", fix)
        return
    yield Finding("environment", Level.OK, f"{args.n_envs} x {args.env}, {policy}")

    needed = SharedMemoryStore(model.policy, max(1, n_workers), share_memory=False).n_bytes
    shared_memory = checks.check_shared_memory(free_shared_memory(), needed)
    yield shared_memory
    if shared_memory.level is Level.PROBLEM:
        yield unknown("others", "they need shared memory")
        return
    n_weights = sum(parameter.numel() for parameter in model.policy.parameters())
    optimizer = type(model.policy.optimizer).__name__
    compared = f"{N_PUSHES} pushes moved {n_weights:,} shared weights exactly as torch's {optimizer}"
    yield checks.check_gradient(gradient_mismatch(model.policy, obs), compared)
    available = available_memory()
    try:
        short = train(model, args.timeout)
    except Exception as error:
        yield checks.failed_training(error, n_workers)
        return
    if short.n_workers > 0:
        method = process_context(args.start_method).get_start_method()
        yield checks.check_start(short.n_workers, method, short.start_seconds)
    yield checks.check_training(n_workers, short.n_workers, short.n_steps, short.n_updates, short.seconds)
    yield checks.check_threads(short.n_threads, max(1, short.n_workers), n_cores())
    yield checks.check_memory(short.memory, available)
