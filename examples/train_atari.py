"""
Train A3C on an Atari game, resume it, watch it, record it: baby-a3c's script on today's stack.

    python examples/train_atari.py --env PongNoFrameskip-v4 --timesteps 2000000 --seed 1
    python examples/train_atari.py --env PongNoFrameskip-v4 --timesteps 4000000 --seed 1 --resume
    python examples/train_atari.py --env PongNoFrameskip-v4 --record pong.mp4

Everything goes to logs/<env>/: checkpoints, model.zip, best_model.zip, one monitor CSV for each environment, TensorBoard.
Timesteps are decisions of the agent, each four frames of the emulator.
"""

import argparse
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env


def full_games(env_id: str, n_envs: int, seed: int, render_mode: str = "rgb_array") -> VecEnv:
    """Environments for evaluation: rewards are not clipped, and a game ends when all lives are lost."""
    kwargs = {"terminal_on_life_loss": False, "clip_reward": False}
    env = make_ale_vec_env(env_id, n_envs, seed, wrapper_kwargs=kwargs, env_kwargs={"render_mode": render_mode})
    return VecTransposeImage(env)


def newest(folder: Path) -> Path:
    models = sorted(folder.glob("**/*.zip"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise SystemExit(f"There is no model in {folder}: train one first, without --resume, --play or --record.")
    return models[-1]


def train(args: argparse.Namespace, folder: Path) -> None:
    monitor_kwargs = {"override_existing": not args.resume}
    env = make_ale_vec_env(args.env, args.n_envs, args.seed, monitor_dir=str(folder), monitor_kwargs=monitor_kwargs)
    settings = {"n_workers": args.n_workers, "verbose": 1, "tensorboard_log": str(folder), "seed": args.seed}
    model = A3C.load(newest(folder), env, **settings) if args.resume else A3C("CnnLstmPolicy", env, **settings)
    # callbacks are called once every n_envs timesteps
    checkpoints = CheckpointCallback(max(args.save_freq // args.n_envs, 1), str(folder / "checkpoints"), "a3c")
    evaluation = EvalCallback(
        full_games(args.env, 4, args.seed + 1000),
        n_eval_episodes=4,
        eval_freq=max(args.eval_freq // args.n_envs, 1),
        log_path=str(folder),
        best_model_save_path=str(folder),
        deterministic=False,
    )
    if args.resume:
        model.set_random_seed(args.seed + model.num_timesteps)  # not the episodes of the beginning again
        continue_evaluations(evaluation, folder / "evaluations.npz")
    remaining = args.timesteps - model.num_timesteps
    try:
        model.learn(remaining, [checkpoints, evaluation], reset_num_timesteps=not args.resume, progress_bar=True)
    finally:  # also after Ctrl-C: the model has all that was learned until then
        model.save(folder / "model.zip")
        print(f"Saved {folder / 'model.zip'} after {model.num_timesteps} timesteps")


def continue_evaluations(callback: EvalCallback, path: Path) -> None:
    """The best score before --resume stays the one to beat, and the old evaluations stay in the file."""
    if path.exists():
        with np.load(path) as old:
            callback.evaluations_timesteps = old["timesteps"].tolist()
            callback.evaluations_results = old["results"].tolist()
            callback.evaluations_length = old["ep_lengths"].tolist()
        callback.best_mean_reward = max(float(np.mean(returns)) for returns in callback.evaluations_results)


def record(model: A3C, env: VecEnv, path: Path) -> None:
    from moviepy import ImageSequenceClip

    frames = []
    evaluate_policy(
        model, env, n_eval_episodes=1, deterministic=False, callback=lambda *_: frames.append(env.get_images()[0])
    )
    clip = ImageSequenceClip(frames, fps=15)  # 60 frames a second, of which the agent sees every fourth
    clip.write_gif(str(path)) if path.suffix == ".gif" else clip.write_videofile(str(path), logger=None)
    print(f"Recorded a game of {len(frames)} steps in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PongNoFrameskip-v4", help="id of an Atari environment without frame skip")
    parser.add_argument("--n-envs", type=int, default=16, help="number of environments")
    parser.add_argument("--n-workers", type=int, default=None, help="worker processes (default: one for each core)")
    parser.add_argument(
        "--timesteps", type=int, default=10_000_000, help="train until so many, those before --resume included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-freq", type=int, default=100_000, help="timesteps between two checkpoints")
    parser.add_argument("--eval-freq", type=int, default=250_000, help="timesteps between two evaluations")
    parser.add_argument("--resume", action="store_true", help="go on from the newest model in logs/<env>/")
    parser.add_argument("--play", action="store_true", help="show games of the newest model in a window")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record a game of the newest model (.gif or .mp4)")
    args = parser.parse_args()
    folder = Path("logs") / args.env.replace("/", "_")
    if args.play or args.record:
        model = A3C.load(newest(folder))
        env = full_games(args.env, 1, args.seed, "human" if args.play else "rgb_array")
        if args.record:
            record(model, env, args.record)
        else:
            print("Mean and standard deviation of 5 games:", evaluate_policy(model, env, 5, deterministic=False))
    else:
        train(args, folder)


if __name__ == "__main__":
    main()
