"""The actor-learner: its memory, its bookkeeping."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_a3c import A3C, MlpLstmPolicy
from sb3_a3c.actor_learner.acting import Rollout
from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.policies.activation_cache import cache as cache
from sb3_a3c.policies.activation_cache.lstm import LstmCache


def remember_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ActorLearner, Rollout]]:
    """Every rollout that a worker of this process acts out, before it learns from it."""
    rollouts: list[tuple[ActorLearner, Rollout]] = []
    act = ActorLearner._act

    def act_and_remember(self: ActorLearner) -> Rollout | None:
        rollout = act(self)
        if rollout is not None:
            rollouts.append((self, rollout))
        return rollout

    monkeypatch.setattr(ActorLearner, "_act", act_and_remember)
    return rollouts


def cartpole(n_envs: int) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs)


def test_memory_at_every_rollouts_start_is_that_of_a_replay_from_the_episodes_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollouts = remember_rollouts(monkeypatch)
    A3C("MlpLstmPolicy", cartpole(3), learning_rate=0.0, n_steps=7, n_workers=0, seed=1).learn(3 * 7 * 40)
    policy: Any = rollouts[0][0].policy
    n_compared = 0
    for env in range(3):
        state = policy.initial_state(1)
        for _, rollout in rollouts:
            assert isinstance(rollout.obs, np.ndarray)
            episode_goes_on = not rollout.episode_starts[0, env]
            if episode_goes_on:
                for mine, replayed in zip(rollout.first_state, state, strict=True):
                    assert float((mine[:, env : env + 1] - replayed).abs().max()) <= 1e-6
                n_compared += 1
            for t in range(7):
                if rollout.episode_starts[t, env]:
                    state = policy.initial_state(1)
                obs = th.from_numpy(rollout.obs[t, env : env + 1])
                with th.no_grad():
                    state = policy.forward(obs, state, th.zeros(1, dtype=th.bool))[3]
    assert n_compared > 60


class Countdown(gym.Env[Any, Any]):
    """Episodes of given lengths, cut by a time limit; the observation tells the step, the reward is 1."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.n_episodes, self.t = lengths, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.length = self.lengths[self.n_episodes % len(self.lengths)]
        self.n_episodes, self.t = self.n_episodes + 1, 0
        return self.observation(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.observation(), self.reward(), False, self.t == self.length, {}

    def observation(self) -> Any:
        return np.array([self.t], dtype=np.float32)

    def reward(self) -> float:
        return 1.0


def test_a_time_limit_is_bootstrapped_with_the_last_observation_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = remember_rollouts(monkeypatch)
    env = DummyVecEnv([lambda: Countdown([4]), lambda: Countdown([100])])
    A3C("MlpLstmPolicy", env, learning_rate=0.0, n_steps=6, n_workers=0, seed=1).learn(1)
    learner, rollout = rollouts[0]
    policy: Any = learner.policy
    state, starts = policy.initial_state(1), th.tensor([False])
    with th.no_grad():
        for t in range(4):
            state = policy.forward(th.tensor([[float(t)]]), state, starts)[3]
        expected = float(policy.predict_values(th.tensor([[4.0]]), state, starts))
    assert rollout.dones[:, 0].tolist() == [False, False, False, True, False, False]
    assert rollout.terminal_values[3, 0] == pytest.approx(expected, abs=1e-6)
    assert np.count_nonzero(rollout.terminal_values) == 1


def test_updates_are_made_for_each_chunk_of_environments() -> None:
    for n_envs, envs_per_update, n_updates in ((4, 1, 4), (4, 3, 2), (4, 9, 1), (5, 2, 3)):
        model = A3C("MlpPolicy", cartpole(n_envs), n_steps=5, envs_per_update=envs_per_update, n_workers=0)
        model.learn(5 * n_envs * 2)
        assert model._n_updates == 2 * n_updates


def _images() -> VecEnv:
    env = DummyVecEnv([functools.partial(FakeImageEnv, screen_height=36, screen_width=36, n_channels=1)] * 3)
    for i, single in enumerate(env.envs):
        single.observation_space.seed(i)
    return env


@pytest.mark.parametrize(
    ("policy", "make_env", "kwargs"),
    [
        ("CnnLstmPolicy", _images, {}),
        ("MlpLstmPolicy", functools.partial(cartpole, 3), {}),
        ("MlpLstmPolicy", functools.partial(make_vec_env, "Pendulum-v1", 3), {"use_sde": True, "sde_sample_freq": 3}),
    ],
)
@pytest.mark.parametrize("envs_per_update", [3, 2])
def test_tapes_save_work_only(
    policy: str,
    make_env: Callable[[], VecEnv],
    kwargs: dict[str, Any],
    envs_per_update: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays = []
    replay = LstmCache.replay

    def replay_and_count(self: LstmCache, *args: Any) -> th.Tensor:
        replays.append(self)
        return replay(self, *args)

    class OtherSteps(BaseCallback):
        """A callback may change the shape of rollouts."""

        def _on_step(self) -> bool:
            if self.num_timesteps == 60:
                self.model.n_steps = 12  # type: ignore[attr-defined]
            return True

    monkeypatch.setattr(LstmCache, "replay", replay_and_count)
    weights = []
    for max_bytes in (10**9, 0):
        monkeypatch.setattr(cache, "MAX_CACHE_BYTES", max_bytes)
        env = make_env()
        model = A3C(policy, env, n_steps=10, envs_per_update=envs_per_update, n_workers=0, seed=0, **kwargs)
        model.learn(130, OtherSteps())
        env.close()
        assert len(replays) == (model._n_updates if max_bytes else 0)
        assert model.num_timesteps == 30 + 30 + 36 + 36
        replays.clear()
        weights.append(th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]))
    assert th.allclose(weights[0], weights[1], atol=1e-5)


def test_a_policy_whose_act_knows_no_tape_acts() -> None:
    class Old(MlpLstmPolicy):
        def act(self, obs: Any, state: Any, episode_starts: th.Tensor) -> Any:  # type: ignore[override]
            return super().act(obs, state, episode_starts)

    model = A3C(Old, cartpole(2), n_steps=5, n_workers=0)
    model.learn(20)
    assert model._n_updates == 2


def test_the_learning_rate_follows_the_timesteps_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    learn = ActorLearner._learn

    def learn_and_note(self: ActorLearner, rollout: Rollout) -> None:
        rates.append(self.replica.optimizer.param_groups[0]["lr"])
        learn(self, rollout)

    monkeypatch.setattr(ActorLearner, "_learn", learn_and_note)
    model = A3C("MlpPolicy", cartpole(2), learning_rate=lambda progress: progress, n_steps=5, n_workers=0)
    model.learn(40)
    assert rates == pytest.approx([0.75, 0.5, 0.25, 0.0])
    rates.clear()
    model.learn(40, reset_num_timesteps=False)  # goes on from 40 to 80
    assert rates == pytest.approx([0.375, 0.25, 0.125, 0.0])


class Normed(BaseFeaturesExtractor):
    """Batch normalisation; notes in which mode it is used."""

    modes: ClassVar[list[bool]] = []

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, features_dim=4)
        self.norm = th.nn.BatchNorm1d(4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.modes.append(self.training)
        normed: th.Tensor = self.norm(x)
        return normed


def test_batch_norm_acts_in_eval_mode_learns_in_train_mode_and_reaches_the_model() -> None:
    policy_kwargs = dict(features_extractor_class=Normed)
    model = A3C("MlpLstmPolicy", cartpole(2), n_steps=5, n_workers=0, policy_kwargs=policy_kwargs)
    Normed.modes.clear()
    model.learn(20)
    assert Normed.modes == ([False] * 6 + [True]) * 2
    extractor: Any = model.policy.features_extractor
    assert int(extractor.norm.num_batches_tracked) == 2
    assert float(extractor.norm.running_mean.abs().max()) > 0


@pytest.mark.parametrize("squash", [False, True])
def test_sde_draws_new_noise_after_every_pull(squash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[ActorCriticPolicy, int]] = []
    reset_noise: Callable[..., None] = ActorCriticPolicy.reset_noise

    def counted(self: ActorCriticPolicy, n_envs: int = 1) -> None:
        calls.append((self, n_envs))
        reset_noise(self, n_envs)

    monkeypatch.setattr(ActorCriticPolicy, "reset_noise", counted)
    env = make_vec_env("Pendulum-v1", n_envs=2)
    kwargs: dict[str, Any] = dict(n_steps=4, envs_per_update=1, n_workers=0, use_sde=True)
    policy_kwargs = dict(squash_output=squash)

    def draws_of_worker(policy: str, sde_sample_freq: int) -> list[int]:
        model = A3C(policy, env, sde_sample_freq=sde_sample_freq, policy_kwargs=policy_kwargs, **kwargs)
        calls.clear()
        model.learn(8)
        assert any(owner is model.policy for owner, _ in calls)  # the model explores with the new noise too
        return [n_envs for owner, n_envs in calls if owner is not model.policy]

    assert draws_of_worker("MlpLstmPolicy", -1) == [2]  # a pull before acting, none between the two chunks
    assert draws_of_worker("MlpPolicy", 2) == [2, 2, 2]  # and at steps 0 and 2


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2, 3)),
        spaces.Box(-2, 1, (1,)),
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
    ],
    ids=str,
)
def test_every_kind_of_action_space(space: Any, policy: str) -> None:
    class Contained(Countdown):
        action_space = space

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(np.asarray(action, dtype=space.dtype) if space.shape else int(action))
            return super().step(action)

    model = A3C(policy, DummyVecEnv([lambda: Contained([7]), lambda: Contained([5])]), n_steps=5, n_workers=0)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(20)
    assert model._n_updates == 2
    assert any(not th.equal(p, q) for p, q in zip(before, model.policy.parameters(), strict=True))
