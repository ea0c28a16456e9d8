"""
A task that takes a memory: a cue is shown once, and asked for 8 steps later. Rollouts have 5 steps, so what was learned
comes from the state that the LSTM carries from one rollout to the next; no gradient flows back to the cue.

    python examples/results/recall.py [--timesteps 200000] [--seeds 1 2 3] [--delay 8] [--n-steps 5]

Trains A3C with and without an LSTM, A2C and PPO. ``examples/results/recall/right_answers.csv`` gets the share of right
answers in 200 episodes with the most probable actions. Without a memory it can't be above chance, 0.5.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_a3c import A3C

#: Gradients here are too small for the LSTM policies' own eps, 1e-3. With torch's beta2, 0.999, answers are lost again.
ADAM = dict(optimizer_kwargs=dict(betas=(0.9, 0.99), eps=1e-5))
A3C_POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "A3C, LSTM with forget_gate_bias=2": ("MlpLstmPolicy", dict(forget_gate_bias=2.0, **ADAM)),
    "A3C, LSTM": ("MlpLstmPolicy", ADAM),
    "A3C": ("MlpPolicy", ADAM),
}


class Recall(gym.Env[Any, Any]):
    """Shows a cue, then a delay, then asks for the cue. The reward is 1 for the right answer, -1 for the wrong one."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def __init__(self, delay: int) -> None:
        self.delay = delay

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue = int(self.np_random.integers(2))
        self.t = 0
        return np.array([2 * self.cue - 1, 0], dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        answered = self.t == self.delay + 2  # the previous observation asked
        reward = (1.0 if action == self.cue else -1.0) if answered else 0.0
        asked = self.t == self.delay + 1
        return np.array([0, asked], dtype=np.float32), reward, answered, False, {}


def new_model(algo: str, env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """Untrained; what is not given is the default."""
    if algo == "A2C":
        return A2C("MlpPolicy", env, n_steps=n_steps, seed=seed)
    if algo == "PPO":
        return PPO("MlpPolicy", env, seed=seed)
    policy, policy_kwargs = A3C_POLICIES[algo]
    return A3C(
        policy,
        env,
        learning_rate=annealed,
        n_steps=n_steps,
        ent_coef=0.01,
        policy_kwargs=policy_kwargs,
        seed=seed,
        n_workers=2,
    )


def annealed(progress_remaining: float) -> float:
    """A learning rate that falls linearly to 0: at a constant one, right answers are lost now and then."""
    return 1e-3 * progress_remaining


def main() -> None:
    """Train all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--delay", type=int, default=8, help="steps between the cue and the question")
    parser.add_argument("--n-steps", type=int, default=5, help="of a rollout of A3C and A2C")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "recall")
    args = parser.parse_args()
    th.set_num_threads(1)  # the networks are too small for more
    lines = []
    for algo in (*A3C_POLICIES, "A2C", "PPO"):
        for seed in args.seeds:
            env = make_vec_env(Recall, 16, env_kwargs=dict(delay=args.delay))
            model = new_model(algo, env, args.n_steps, seed).learn(args.timesteps)
            env = make_vec_env(Recall, 4, seed=1000 + seed, env_kwargs=dict(delay=args.delay))
            returns, _ = evaluate_policy(model, env, n_eval_episodes=200, return_episode_rewards=True)
            right = float(np.mean(np.array(returns) > 0))
            lines.append({"algo": algo, "seed": seed, "timesteps": model.num_timesteps, "right": right})
            print(lines[-1], flush=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(args.folder / "right_answers.csv", index=False)


if __name__ == "__main__":
    main()
