"""Small tasks that only a correct implementation solves. They take minutes each, so all are marked slow."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pandas as pd
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_a3c import A3C

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class HiddenVelocities(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole without velocities: observes position and angle."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        self.observation_space = spaces.Box(env.observation_space.low[::2], env.observation_space.high[::2])

    def observation(self, observation: Any) -> Any:
        return observation[::2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("env_id", "wrapper", "kwargs", "n_timesteps", "least"),
    [
        ("CartPole-v1", None, dict(learning_rate=1e-3), 100_000, 400),
        ("CartPole-v1", None, {}, 100_000, 200),
        # at a constant rate, the last policy may happen to be a bad one
        ("CartPole-v1", HiddenVelocities, dict(learning_rate=1e-3, anneal=True), 200_000, 400),
        ("Acrobot-v1", None, dict(learning_rate=1e-3), 300_000, -120),
        ("Acrobot-v1", None, {}, 300_000, -120),
    ],
)
def test_a_port_learns(env_id: str, wrapper: Any, kwargs: dict[str, Any], n_timesteps: int, least: float, seed: int) -> None:
    """With defaults except for the learning rate, and rewards as they are."""
    env = make_vec_env(env_id, n_envs=8, wrapper_class=wrapper)
    model = A3C("MlpLstmPolicy", env, n_workers=2, seed=seed, **kwargs).learn(n_timesteps)
    assert final_return(model, env_id, seed, wrapper) >= least


@pytest.mark.parametrize("seed", range(3))
def test_cartpole_with_hidden_velocities(seed: int) -> None:
    """With an annealed rate, as docs/recurrent.md recommends."""
    env = make_vec_env("CartPole-v1", n_envs=8, wrapper_class=HiddenVelocities)
    kwargs: dict[str, Any] = dict(n_steps=32, gae_lambda=0.95, ent_coef=0.0, n_workers=2, seed=seed)
    model = A3C("MlpLstmPolicy", env, learning_rate=lambda progress: 3e-3 * progress, **kwargs).learn(300_000)
    assert final_return(model, "CartPole-v1", seed, HiddenVelocities) >= 450


def final_return(model: A3C, env_id: str, seed: int, wrapper: type[gym.Wrapper[Any, Any, Any, Any]] | None = None) -> float:
    env = make_vec_env(env_id, n_envs=4, seed=1000 + seed, wrapper_class=wrapper)
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"{env_id}, seed {seed}: {mean} +- {std}")
    assert isinstance(mean, float)
    return mean


def test_only_a_policy_with_memory_recalls_a_cue(tmp_path: Path) -> None:
    """The cue is further back than a rollout is long."""
    script = Path(__file__).parents[2] / "examples" / "results" / "recall.py"
    subprocess.run([sys.executable, str(script), "--seeds", "1", "--folder", str(tmp_path)], check=True, timeout=2400)
    right = pd.read_csv(tmp_path / "right_answers.csv").set_index("algo")["right"]
    assert right.pop("A3C, LSTM with forget_gate_bias=2") >= 0.98
    right.pop("A3C, LSTM")  # may learn it or not
    assert (right <= 0.6).all()
