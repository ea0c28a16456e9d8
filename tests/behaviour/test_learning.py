"""Small tasks that only a correct implementation solves. They take minutes each, so all are marked slow."""

from typing import Any

import gymnasium as gym
import numpy as np
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
    ("task", "learning_rate", "n_timesteps", "least"),
    [
        ("CartPole-v1", 1e-3, 100_000, 400),
        ("CartPole-v1", 2e-4, 100_000, 200),
        ("Acrobot-v1", 1e-3, 300_000, -120),
        ("CartPole-v1 with hidden velocities", 1e-3, 200_000, 400),
    ],
)
def test_a_port_learns(task: str, learning_rate: float, n_timesteps: int, least: float, seed: int) -> None:
    """With defaults except for the learning rate, and rewards as they are."""
    env_id, _, hidden = task.partition(" with ")
    wrapper = HiddenVelocities if hidden else None
    env = make_vec_env(env_id, n_envs=8, wrapper_class=wrapper)
    model = A3C("MlpLstmPolicy", env, learning_rate=learning_rate, n_workers=2, seed=seed).learn(n_timesteps)
    mean, _ = evaluate_policy(model, make_vec_env(env_id, n_envs=4, seed=1000 + seed, wrapper_class=wrapper), 20)
    print(f"{task}, learning rate {learning_rate}, seed {seed}: {mean}")
    assert mean >= least  # type: ignore[operator]


class Recall(gym.Env[Any, Any]):
    """Shows a cue, then a delay, then asks for the cue. The reward is 1 for the right answer, -1 for the wrong one."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None
    delay = 12

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.cue = int(self.np_random.integers(2))
        self.t = 0
        return np.array([2 * self.cue - 1, 0], dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        answered = self.t == self.delay + 2  # the previous observation asked
        reward = (1.0 if action == self.cue else -1.0) if answered else 0.0
        asked = self.t == self.delay + 1
        return np.array([0, asked], dtype=np.float32), reward, answered, False, {}


@pytest.mark.parametrize(("policy", "solves"), [("MlpLstmPolicy", True), ("MlpPolicy", False)])
def test_only_a_policy_with_memory_recalls_a_cue(policy: str, solves: bool) -> None:
    env = make_vec_env(Recall, n_envs=8)
    kwargs: dict[str, Any] = dict(learning_rate=5e-3, n_steps=16, ent_coef=0.0, envs_per_update=4, n_workers=2, seed=0)
    if solves:
        kwargs["policy_kwargs"] = dict(lstm_hidden_size=64)
    model = A3C(policy, env, **kwargs)
    model.learn(400_000)
    returns, _ = evaluate_policy(model, make_vec_env(Recall, n_envs=4, seed=7), 200, return_episode_rewards=True)
    right = float(np.mean(np.array(returns) > 0))
    print(f"{policy}: {right:.1%} of 200 episodes")
    assert right >= 0.95 if solves else right <= 0.60
