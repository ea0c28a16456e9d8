"""
A3C on Pong while its workers are killed: what is lost, and what leaks.

    python examples/benchmarks/soak.py [--minutes 20] [--kill-every 10] [--n-envs 16] [--n-workers 2]

Every few seconds a random worker, but never the first, is sent SIGKILL, and is replaced. The last lines say how many steps
and restarts there were, how many steps/s were lost to them (compared with the second --kill-every seconds, before the first
kill), how memory and open files of the main process and memory of worker 0 have grown since the first tenth of the time,
and what is left in shared memory. Linux only.
"""

import argparse
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


class Killer(BaseCallback):
    """Ends the training after some time, and workers before."""

    def __init__(self, minutes: float, kill_every: float) -> None:
        super().__init__()
        self.seconds = 60 * minutes
        self.kill_every = kill_every
        self.n_kills = self.n_restarts = 0
        self.n_shown = 0
        self.samples: list[tuple[float, int, float, float, int]] = []  # seconds, steps, MB of main, MB of worker 0, files

    def _on_rollout_start(self) -> None:
        if not self.samples:  # the workers run
            self.begin = time.monotonic()
            self._note()

    def _on_step(self) -> bool:
        self.n_shown += len(self.locals["infos"])
        if time.monotonic() - self.begin >= self.kill_every * len(self.samples):
            self._note()
            now = self.samples[-1][0]
            if len(self.samples) > 2 and now < self.seconds - 0.5 * self.kill_every:  # and not at the very end
                victim = random.choice(self.pids[1:])
                self.n_kills += 1
                print(f"{now:6.0f} s  {self.num_timesteps:>9} steps  killing {victim}", flush=True)
                os.kill(victim, signal.SIGKILL)
        self.n_restarts = self.model._collector.n_restarts  # type: ignore[attr-defined]
        return time.monotonic() - self.begin < self.seconds

    @property
    def pids(self) -> list[int]:
        pids: list[int] = self.model._collector._workers.pids  # type: ignore[attr-defined]
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
    killer = Killer(args.minutes, args.kill_every)
    model.learn(10**9, callback=killer)
    env.close()

    seconds, steps, of_main, of_worker, files = np.array(killer.samples).T
    settled = seconds >= 0.1 * seconds[-1]
    print(f"{model.num_timesteps} steps, of which callbacks saw {killer.n_shown}; {model._n_updates} updates")
    print(f"{killer.n_restarts} restarts after {killer.n_kills} kills")
    if len(steps) > 3 and settled.sum() > 2:
        speeds = np.diff(steps) / np.diff(seconds)  # the first has the start of the workers in it
        undisturbed, disturbed = speeds[1], (steps[-1] - steps[2]) / (seconds[-1] - seconds[2])
        print(f"{disturbed:.0f} steps/s, {undisturbed:.0f} before the first kill: {1 - disturbed / undisturbed:.1%} lost")
        for name, sizes in (("main process", of_main), ("worker 0", of_worker)):
            slope = np.polyfit(seconds[settled] / 60, sizes[settled], 1)[0]
            print(f"{name}: {sizes[-1]:.0f} MB, {slope:+.2f} MB/min")
    print(f"open files: {files[0]:.0f} at first, {files[-1]:.0f} at last")
    print(f"left in shared memory: {len(_segments() - before)} segments")


if __name__ == "__main__":
    main()
