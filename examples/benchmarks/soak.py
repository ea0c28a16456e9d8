"""
Train A3C on Pong and kill its workers: what is lost, and what leaks?

    python examples/benchmarks/soak.py [--minutes 20] [--kill-every 10] [--n-envs 16] [--n-workers 2]

A first call of ``learn`` measures the speed without kills. A second call trains for as many timesteps as take --minutes at
that speed, and every few seconds a random worker, but never the first, gets SIGKILL and is replaced. The last lines show the
number of steps and restarts, whether all steps that workers reported were counted, how much slower the run was, how memory
and open files of the main process and memory of worker 0 have grown since the second minute (or the first tenth of a shorter
run), and whether shared memory or processes are left. Linux only.
"""

import argparse
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.workers.collector import HogwildCollector


class Timer(BaseCallback):
    """Ends the training after some time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def _on_step(self) -> bool:
        if self.n_calls == 1:  # the workers run
            self.begin, self.first_steps = time.monotonic(), self.num_timesteps
        elapsed = time.monotonic() - self.begin
        self.speed = (self.num_timesteps - self.first_steps) / max(elapsed, 1e-9)
        return elapsed < self.seconds


class Killer(BaseCallback):
    """Kills workers, and looks at what is left of the others."""

    def __init__(self, kill_every: float) -> None:
        super().__init__()
        self.kill_every = kill_every
        self.n_kills = 0
        self.samples: list[tuple[float, int, float, float, int]] = []  # seconds, steps, MB of main, MB of worker 0, files

    def _on_step(self) -> bool:
        if self.n_calls == 1:
            self.begin = time.monotonic()
            self.collector: HogwildCollector = self.model._collector  # type: ignore[attr-defined]
        if time.monotonic() - self.begin >= self.kill_every * len(self.samples):
            self._note()
            if len(self.samples) > 1:
                victim = random.choice(self.pids[1:])
                self.n_kills += 1
                print(f"{self.samples[-1][0]:6.0f} s  {self.num_timesteps:>9} steps  killing {victim}", flush=True)
                os.kill(victim, signal.SIGKILL)
        return True

    @property
    def pids(self) -> list[int]:
        pids: list[int] = self.collector._workers.pids  # type: ignore[attr-defined]
        return pids

    def _note(self) -> None:
        n_files = len(os.listdir("/proc/self/fd"))
        seconds = time.monotonic() - self.begin
        self.samples.append((seconds, self.num_timesteps, _megabytes(os.getpid()), _megabytes(self.pids[0]), n_files))


def _megabytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}


def main() -> None:
    parser = argparse.ArgumentParser(description="A3C on Pong while its workers are killed.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--n-workers", type=int, default=2)
    args = parser.parse_args()
    if args.n_workers < 2:
        parser.error("--n-workers must be at least 2: the first is never killed")

    warnings.filterwarnings("ignore", message="Worker . was killed by SIGKILL")
    before = _segments()
    env = make_ale_vec_env("PongNoFrameskip-v4", args.n_envs, seed=0)
    model = A3C("CnnLstmPolicy", env, n_workers=args.n_workers, max_worker_restarts=10**6, seed=0)
    timer, killer = Timer(3 * args.kill_every), Killer(args.kill_every)
    model.learn(10**9, callback=timer)
    total = int(timer.speed * 60 * args.minutes)
    model.learn(total, callback=killer)
    env.close()

    seconds, steps, of_main, of_worker, files = np.array(killer.samples).T
    collector = killer.collector
    print(f"{model.num_timesteps} steps of {total} wanted; reported by workers: {sum(collector._tickets.n_reported)}")
    print(f"{collector.n_restarts} restarts after {killer.n_kills} kills")
    print(f"skipped updates: {collector.statistics.skipped_updates}")
    speed = (steps[-1] - steps[0]) / (seconds[-1] - seconds[0])
    print(f"{speed:.0f} steps/s, {timer.speed:.0f} without kills: {1 - speed / timer.speed:.1%} lost")
    settled = seconds >= min(120.0, 0.1 * seconds[-1])
    if settled.sum() > 2:
        for name, sizes in (("main process", of_main), ("worker 0", of_worker)):
            slope = np.polyfit(seconds[settled] / 60, sizes[settled], 1)[0]
            print(f"{name}: {sizes[-1]:.0f} MB, {slope:+.2f} MB/min")
    print(f"open files: {files[0]:.0f} at first, {files[-1]:.0f} at last")
    workers = [child.name for child in multiprocessing.active_children() if child.name.startswith("a3c-worker")]
    print(f"left: {len(_segments() - before)} segments of shared memory, {len(workers)} workers")


if __name__ == "__main__":
    main()
