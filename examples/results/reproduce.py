"""
The rows of the table of results: one command trains, evaluates and draws a row.

    python examples/results/reproduce.py pong                           # seeds 1 to 5, 3M timesteps each: hours
    python examples/results/reproduce.py pong --seeds 2 --minutes 100   # stops then; the same command goes on
    python examples/results/reproduce.py pong --speed                   # one minute, on a machine that does nothing else
    python examples/results/reproduce.py all --quick                    # every row for a moment, into logs/quick/

RL Zoo trains (``sb3-a3c train``) with the settings of ``sb3_a3c/zoo/hyperparams/a3c.yml``, or with its own for A2C, PPO and
RecurrentPPO; runs are in ``logs/results/``. ``examples/results/<environment>/`` gets the curve of each run (CSV), a picture
of all curves, and two lines in ``evaluations.csv``: for sampled and for most probable actions (Atari: full games, unclipped
rewards, no-op starts). Timesteps are decisions of the agent. Minutes in pictures are timesteps at the speed that
``--speed`` has measured. Runs that are interrupted are resumed from the newest checkpoint. A2C, PPO and RecurrentPPO would
train for 10M timesteps; they are also evaluated if ``--minutes`` stops them.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rl_zoo3 import ALGOS
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_a3c.resume import newest_model
from sb3_a3c.zoo import register

RESULTS = Path(__file__).parent
#: RL Zoo's wrapper for evaluation, in place of that of training.
FULL_GAMES = {"terminal_on_life_loss": False, "clip_reward": False}
#: Timesteps of ``--quick``.
QUICK = 2_000
#: A pause between two lines of the log that is longer than this is one between two stages of a run.
LONGEST_INTERVAL = 300.0


@dataclass(frozen=True)
class Row:
    """A row of the table: an algorithm in an environment."""

    env_id: str
    algo: str = "a3c"
    seeds: tuple[int, ...] = (1, 2, 3)
    n_timesteps: int | None = None  #: None: as in the file of hyperparameters

    @property
    def is_atari(self) -> bool:
        return "NoFrameskip" in self.env_id

    @property
    def folder(self) -> Path:
        """Where results are left; rows of one environment share it, and a picture."""
        return RESULTS / self.env_id.removesuffix("NoFrameskip-v4").lower()


PONG, BREAKOUT, INVADERS = (f"{game}NoFrameskip-v4" for game in ("Pong", "Breakout", "SpaceInvaders"))
ROWS = {
    "pong": Row(PONG, seeds=(1, 2, 3, 4, 5), n_timesteps=3_000_000),
    "pong-a2c": Row(PONG, "a2c", seeds=(1,)),
    "pong-ppo": Row(PONG, "ppo", seeds=(1,)),
    "pong-recurrent-ppo": Row(PONG, "ppo_lstm", seeds=(1,)),
    "breakout": Row(BREAKOUT, seeds=(1, 2), n_timesteps=10_000_000),
    "space-invaders": Row(INVADERS, seeds=(1, 2), n_timesteps=10_000_000),
    "cartpole": Row("CartPole-v1"),
    "cartpole-no-velocities": Row("CartPoleNoVel-v1"),
    "acrobot": Row("Acrobot-v1"),
    "mountain-car": Row("MountainCar-v0"),
    "mountain-car-continuous": Row("MountainCarContinuous-v0"),
    "lunar-lander": Row("LunarLander-v3"),
    "bipedal-walker": Row("BipedalWalker-v3"),
    "pendulum-no-velocities": Row("PendulumNoVel-v1"),
}


class Run:
    """One seed of a row, and its files in a folder of logs."""

    def __init__(self, row: Row, seed: int, logs: Path) -> None:
        self.row, self.seed = row, seed
        self.folder = logs / f"{row.env_id}_{row.algo}_seed{seed}"

    @property
    def newest(self) -> Path:
        """RL Zoo's folder of the latest stage."""
        return max(
            (self.folder / self.row.algo).glob(f"{self.row.env_id}_*"), key=lambda path: int(path.name.rpartition("_")[2])
        )

    @property
    def is_trained(self) -> bool:
        return (self.folder / "trained").exists()

    def train(self, n_timesteps: int | None, minutes: float | None) -> None:
        """Train from where the run was interrupted, at most for so long. Ctrl-C, too, leaves a model to resume from."""
        command = [sys.executable, "-m", "sb3_a3c.zoo", "train", "--algo", self.row.algo, "--env", self.row.env_id]
        command += ["--seed", str(self.seed), "--log-folder", str(self.folder), "--tensorboard-log", str(self.folder / "tb")]
        log_often = n_timesteps == QUICK or "ppo" in self.row.algo  # whose rollouts are 1,024 timesteps
        command += ["--save-freq", "250000", "--eval-freq", "-1", "--log-interval", "1" if log_often else "10"]
        if n_timesteps is not None:
            command += ["--n-timesteps", str(n_timesteps)]
        if (checkpoint := newest_model(self.folder, model_class=ALGOS[self.row.algo])) is not None:
            command += ["--trained-agent", str(checkpoint)]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "commit").write_text(_commit())
        process = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C reaches this process only
        try:
            code = process.wait(None if minutes is None else 60 * minutes)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            process.send_signal(signal.SIGINT)  # RL Zoo saves the model
            process.wait()
            if isinstance(reason, KeyboardInterrupt):
                raise SystemExit(130) from None
            return
        if code != 0:
            raise SystemExit(f"Training failed (exit status {code}): {' '.join(command)}")
        (self.folder / "trained").touch()

    def curve(self) -> pd.DataFrame:
        """``timesteps``, ``seconds`` of training, without pauses between stages, and ``return`` of the last 100 episodes."""
        events: list[Any] = []
        for path in sorted((self.folder / "tb").rglob("events.out.tfevents.*")):
            accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            if "rollout/ep_rew_mean" in accumulator.Tags()["scalars"]:
                events += accumulator.Scalars("rollout/ep_rew_mean")
        curve = pd.DataFrame({"timesteps": [e.step for e in events], "time": [e.wall_time for e in events]})
        curve["return"] = [e.value for e in events]
        # a stage that was killed has logged more than its checkpoint knew: the stage after it counts
        curve = curve.sort_values("time")
        last = curve["timesteps"][::-1].cummin()[::-1]
        curve = curve[curve["timesteps"] <= last].drop_duplicates("timesteps", keep="last")
        passed = curve["time"].diff().fillna(0.0)
        curve["seconds"] = passed.where(passed < LONGEST_INTERVAL, 0.0).cumsum()
        return curve[["timesteps", "seconds", "return"]].reset_index(drop=True)

    def evaluate(self, n_games: int, seconds: float) -> list[dict[str, Any]]:
        """
        Play with the final model: the run's lines of ``evaluations.csv``.

        :param seconds: that the training took
        """
        env = self.evaluation_env()
        model = ALGOS[self.row.algo].load(self.newest / f"{self.row.env_id}.zip", device="cpu")
        lines = []
        for actions in ("sampled", "most probable"):
            deterministic = actions == "most probable"
            returns, _ = evaluate_policy(model, env, n_games, deterministic=deterministic, return_episode_rewards=True)
            result = {"games": n_games, "mean": round(float(np.mean(returns)), 2), "std": round(float(np.std(returns)), 2)}
            lines.append({"algo": self.row.algo, "seed": self.seed, "actions": actions, **result})
        env.close()
        about_run = {
            "timesteps": model.num_timesteps,
            "hours": round(seconds / 3600, 2),
            "commit": (self.folder / "commit").read_text(),
            "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "stable-baselines3", "ale-py")),
        }
        return [line | about_run for line in lines]

    def evaluation_env(self, n_envs: int = 4, env_kwargs: dict[str, Any] | None = None) -> VecEnv:
        """As for training, but in Atari full games with unclipped rewards."""
        hyperparams, stats_path = get_saved_hyperparams(str(self.newest / self.row.env_id), test_mode=True)
        if self.row.is_atari:
            hyperparams["env_wrapper"] = [{"stable_baselines3.common.atari_wrappers.AtariWrapper": FULL_GAMES}]
        settings: dict[str, Any] = dict(
            seed=1000 + self.seed, should_render=False, vec_env_cls=DummyVecEnv, env_kwargs=env_kwargs
        )
        return create_test_env(self.row.env_id, n_envs, stats_path, hyperparams=hyperparams, **settings)


def _commit() -> str:
    """The commit, with "-dirty" if files other than results have changed since."""
    git = ["git", "-C", str(RESULTS)]
    commands = [*git, "describe", "--always"], [*git, "diff", "--name-only", "HEAD", "--", ":/", ":(exclude)*/*"]
    commit, changed = (subprocess.run(c, capture_output=True, text=True, check=False).stdout.strip() for c in commands)
    return f"{commit}-dirty" if changed else commit


def update_csv(path: Path, new: list[dict[str, Any]], keys: list[str]) -> None:
    """Add lines to a CSV file; they replace those with the same values of ``keys``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a commit such as 18347e6 is no number
    old = [pd.read_csv(path, dtype={"commit": str})] if path.exists() else []
    table = pd.concat([*old, pd.DataFrame(new)])
    table.drop_duplicates(keys, keep="last").sort_values(keys).to_csv(path, index=False)


def draw(folder: Path) -> None:
    """
    Draw the curves of an environment against timesteps, and against minutes if the speeds are known. What baby-a3c's
    author logged, on another machine, is in ``baby-a3c.csv``.
    """
    import matplotlib.pyplot as plt

    path = folder / "speeds.csv"
    speeds = pd.read_csv(path).set_index("algo")["steps/s"].to_dict() if path.exists() else {}
    curves: dict[str, list[pd.DataFrame]] = {}
    for path in sorted(folder.glob("*_seed*.csv")):
        if len(curve := pd.read_csv(path)) > 1:  # --quick ends before the first game
            curves.setdefault(path.stem.rpartition("_seed")[0], []).append(curve)
    units = {"million timesteps": dict.fromkeys(curves, 1e6)}
    if speeds:
        units["minutes on two cores"] = {algo: 60 * speed for algo, speed in speeds.items()}
    figure, panels = plt.subplots(1, len(units), figsize=(5.5 * len(units), 4), sharey=True, squeeze=False)
    axes = panels[0]
    for axis, (label, unit_of) in zip(axes, units.items(), strict=True):
        for algo, seeds in curves.items():
            if (unit := unit_of.get(algo)) is None:
                continue
            # at the same timesteps for all seeds, as far as the shortest run goes
            grid = pd.Index(np.linspace(0, min(seed["timesteps"].max() for seed in seeds), 300))
            returns = pd.concat([_at(seed, grid) for seed in seeds], axis=1)
            name = f"{ALGOS[algo].__name__}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
            (line,) = axis.plot(grid / unit, returns.mean(axis=1), label=name)
            axis.fill_between(grid / unit, returns.min(axis=1), returns.max(axis=1), color=line.get_color(), alpha=0.2)
        axis.set_xlabel(label)
    if (path := folder / "baby-a3c.csv").exists():
        right = axes[0].get_xlim()[1]
        curve = pd.read_csv(path)
        axes[0].plot(curve["timesteps"] / 1e6, curve["return"], "k--", linewidth=1, label="baby-a3c, its own log")
        axes[0].set_xlim(right=right)
    axes[0].set_ylabel("return, mean of 100 episodes")
    if curves:
        axes[0].legend()
    figure.suptitle(f"{folder.name}: mean, least and greatest of the seeds")
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)


def _at(curve: pd.DataFrame, timesteps: pd.Index) -> pd.Series:
    returns = curve.set_index("timesteps")["return"]
    return returns.reindex(returns.index.union(timesteps)).interpolate("index", limit_area="inside").reindex(timesteps)


def reproduce(name: str, args: argparse.Namespace) -> None:
    """Train, evaluate and draw a row, as far as the time allows."""
    row = ROWS[name]
    logs, folder, n_timesteps = Path("logs/results"), row.folder, row.n_timesteps
    if args.quick:
        logs, folder, n_timesteps = Path("logs/quick"), Path("logs/quick") / row.folder.name, QUICK
    for seed in args.seeds or (row.seeds[:1] if args.quick else row.seeds):
        run = Run(row, seed, logs)
        if not run.is_trained:
            run.train(n_timesteps, args.minutes)
        folder.mkdir(parents=True, exist_ok=True)
        curve = run.curve()
        curve.to_csv(folder / f"{row.algo}_seed{seed}.csv", index=False, float_format="%.6g")
        draw(folder)
        if not run.is_trained:
            print(f"{name}, seed {seed}: not yet trained to the end. The same command goes on.")
            if row.algo == "a3c":
                continue
        lines = run.evaluate(1 if args.quick else 20, curve["seconds"].max())
        update_csv(folder / "evaluations.csv", lines, ["algo", "seed", "actions"])
        print(pd.DataFrame(lines).to_string(index=False))


def measure_speed(name: str) -> None:
    """Train for a minute, and note the timesteps per second: the median over the log."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as logs:  # an earlier run's log does not count
        run = Run(row, 1, Path(logs))
        run.train(None, minutes=1)
        steps = run.curve()[["timesteps", "seconds"]].diff().iloc[1:]
    speed = round((steps["timesteps"] / steps["seconds"]).median())
    print(f"{name}: {speed} steps/s")
    update_csv(row.folder / "speeds.csv", [{"algo": row.algo, "steps/s": speed}], ["algo"])


def main() -> None:
    """Reproduce one row, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[*ROWS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all of the row")
    parser.add_argument("--minutes", type=float, help="for each seed; then stop, to go on later")
    parser.add_argument("--speed", action="store_true", help="only measure timesteps per second")
    parser.add_argument("--quick", action="store_true", help="a moment of one seed, to see that all works")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background; --minutes needs it
    register()
    for name in ROWS if args.row == "all" else [args.row]:
        measure_speed(name) if args.speed else reproduce(name, args)


if __name__ == "__main__":
    main()
