"""
Keeps the agent of a run in ``examples/trained``, to be played at once, and records a GIF of it.

    python examples/results/reproduce.py pong --seeds 1
    python examples/results/trained_agent.py pong --seed 1
    sb3-a3c enjoy --env PongNoFrameskip-v4 -f examples/trained

The model is the last of the run. The optimizer's state, two thirds of the file, is left out; training it further begins anew
with that.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from reproduce import ROWS, Run
from rl_zoo3 import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_a3c.zoo import register

TRAINED = Path(__file__).parent.parent / "trained"


def keep(run: Run, model: BaseAlgorithm, folder: Path) -> Path:
    """Copy a run's model, arguments and settings as RL Zoo lays them out, in place of an earlier agent."""
    env_id, algo = run.row.env_id, run.row.algo
    kept = folder / algo / f"{env_id}_1"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(run.newest / env_id, kept / env_id)
    (kept / env_id / "command.txt").unlink(missing_ok=True)  # it has paths of the machine
    model.policy.optimizer.state.clear()
    model.save(kept / f"{env_id}.zip")
    return kept


def record(run: Run, model: BaseAlgorithm, path: Path, n_steps: int) -> None:
    """Record the first steps of the final model's games, with sampled actions."""
    env = run.evaluation_env(n_envs=1, env_kwargs=dict(render_mode="rgb_array"))
    fps = 15 if run.row.is_atari else 50  # Atari's wrappers skip 3 of 4 frames
    obs, state, start = env.reset(), None, np.ones(1, dtype=bool)
    frames = []
    for _ in range(n_steps):
        (image,) = env.get_images()
        assert image is not None
        frames.append(Image.fromarray(image).quantize(32))
        actions, state = model.predict(obs, state=state, episode_start=start)  # type: ignore[arg-type]
        obs, _, start, _ = env.step(actions)
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0, optimize=True)


def main() -> None:
    """Keep and record one agent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[name for name, row in ROWS.items() if row.algo == "a3c"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, default=Path("logs/results"), help="of reproduce.py")
    parser.add_argument("--folder", type=Path, default=TRAINED)
    parser.add_argument("--steps", type=int, default=450, help="of the GIF")
    args = parser.parse_args()
    register()
    run = Run(ROWS[args.row], args.seed, args.logs)
    model = ALGOS[run.row.algo].load(run.newest / f"{run.row.env_id}.zip", device="cpu")
    kept = keep(run, model, args.folder)
    record(run, model, kept / f"{run.row.env_id}.gif", args.steps)
    for path in sorted(kept.glob("*.*")):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
