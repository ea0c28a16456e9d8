"""
Train A3C on an Atari game, resume a run, and watch or record the agent:

    python examples/train_atari.py --env PongNoFrameskip-v4 --timesteps 2000000 --seed 1
    python examples/train_atari.py --env PongNoFrameskip-v4 --timesteps 4000000 --seed 1 --resume
    python examples/train_atari.py --env PongNoFrameskip-v4 --record pong.mp4

Everything is saved to logs/<env>/: checkpoints, model.zip, best_model.zip, a monitor CSV for each environment, TensorBoard
curves. A timestep is one decision of the agent, which is four frames of the emulator.
"""

import argparse
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.resume import (
    carry_over_monitor_files,
    continue_evaluations,
    has_statistics,
    load_statistics,
    newest_model,
)


def full_games(env_id: str, n_envs: int, seed: int, render_mode: str = "rgb_array", normalize: bool = False) -> VecEnv:
    """Environments for evaluation: unclipped rewards, and a game ends when all lives are lost."""
    kwargs = {"terminal_on_life_loss": False, "clip_reward": False}
    env = make_ale_vec_env(env_id, n_envs, seed, wrapper_kwargs=kwargs, env_kwargs={"render_mode": render_mode})
    if normalize:  # EvalCallback requires the same wrappers as in training
        env = VecNormalize(env, training=False, norm_obs=False, norm_reward=False)
    return VecTransposeImage(env)


def newest(folder: Path) -> Path:
    path = newest_model(folder)
    if path is None:
        raise SystemExit(
            f"There is no model in {folder} that can be loaded: train one first, without --resume, --play or --record."
        )
    return path


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run: --resume must find the files of a single run."""
    number = 1
    while (older := folder.with_name(f"{folder.name}_{number}")).exists():
        number += 1
    folder.rename(older)
    print(f"Moved the earlier run to {older}")


def find_start(args: argparse.Namespace, folder: Path) -> Path:
    """The model to resume from. --normalize-reward is as it was in the earlier run."""
    start = newest(folder)
    normalized = has_statistics(start)
    if args.normalize_reward and not normalized:
        raise SystemExit(
            f"The run in {folder} was trained without --normalize-reward: resume without it, or start a new run."
        )
    args.normalize_reward = normalized
    print(f"Resuming from {start}")
    return start


def training_env(args: argparse.Namespace, folder: Path, start: Path | None) -> VecEnv:
    kwargs = {"clip_reward": not args.normalize_reward}
    env = make_ale_vec_env(args.env, args.n_envs, args.seed, monitor_dir=str(folder), wrapper_kwargs=kwargs)
    if not args.normalize_reward:
        return env
    return load_statistics(start, env) if start else VecNormalize(env, norm_obs=False)


def train(args: argparse.Namespace, folder: Path) -> None:
    start = find_start(args, folder) if args.resume else None
    if start:
        carry_over_monitor_files(folder, folder)
    elif folder.exists():
        move_aside(folder)
    env = training_env(args, folder, start)
    settings = {"n_workers": args.n_workers, "verbose": 1, "tensorboard_log": str(folder), "seed": args.seed}
    if start:
        model = A3C.load(start, env, **settings)
    else:
        policy_kwargs = {"features_extractor_kwargs": {"dtype": th.bfloat16}} if args.bfloat16 else None
        model = A3C("CnnLstmPolicy", env, anneal=True, policy_kwargs=policy_kwargs, **settings)
    # callbacks are called once every n_envs timesteps
    save_freq = max(args.save_freq // args.n_envs, 1)
    checkpoints = CheckpointCallback(save_freq, str(folder / "checkpoints"), "a3c")
    evaluation = EvalCallback(
        full_games(args.env, 4, args.seed + 1000, normalize=args.normalize_reward),
        n_eval_episodes=4,
        eval_freq=max(args.eval_freq // args.n_envs, 1),
        log_path=str(folder),
        best_model_save_path=str(folder),
        deterministic=False,
    )
    if start:
        model.set_random_seed(args.seed + model.num_timesteps)  # or it would see the first episodes again
        continue_evaluations(evaluation, folder / "evaluations.npz")
    remaining = args.timesteps - model.num_timesteps
    progress = ProgressBarCallback()
    interrupted = False
    try:
        model.learn(remaining, [checkpoints, evaluation, progress], reset_num_timesteps=start is None)
    except KeyboardInterrupt:
        interrupted = True
        if hasattr(progress, "pbar"):  # training has started
            progress.pbar.close()
    finally:  # also after an error
        model.save(folder / "model.zip")
        saved = f"Saved {folder / 'model.zip'} after {model.num_timesteps} timesteps"
        print(f"{saved}. Continue with --resume" if interrupted else saved)
        env.close()
    if interrupted:
        raise SystemExit(130)  # as after Ctrl-C in a shell


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
        "--timesteps",
        type=int,
        default=10_000_000,
        help="in total, including those before --resume; the learning rate falls to 0 over the last quarter",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of environments, weights and actions")
    parser.add_argument("--save-freq", type=int, default=100_000, help="timesteps between two checkpoints")
    parser.add_argument("--eval-freq", type=int, default=250_000, help="timesteps between two evaluations")
    parser.add_argument(
        "--normalize-reward", action="store_true", help="scale rewards (VecNormalize) instead of clipping them"
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="faster convolutions, if the processor has instructions for it"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the newest undamaged model in logs/<env>/")
    parser.add_argument("--play", action="store_true", help="show five games of the newest model in a window")
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
