"""The actor-learner: recurrent states, bootstrapping, chunks, cache, modes and noise."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_a3c import A3C, MlpLstmPolicy
from sb3_a3c.actor_learner.acting import Rollout
from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.actor_learner.loss import LossTerms, a3c_loss
from sb3_a3c.policies.activation_cache import cache
from sb3_a3c.policies.activation_cache.lstm import LstmCache
from tests.toy_envs import Countdown, Images


def record_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ActorLearner, Rollout]]:
    """Record every rollout of a worker in this process, before it learns from it."""
    rollouts: list[tuple[ActorLearner, Rollout]] = []
    act = ActorLearner._act

    def act_and_record(self: ActorLearner) -> Rollout | None:
        rollout = act(self)
        if rollout is not None:
            rollouts.append((self, rollout))
        return rollout

    monkeypatch.setattr(ActorLearner, "_act", act_and_record)
    return rollouts


def paying(env: gym.Env[Any, Any], reward: float = 100.0) -> gym.Env[Any, Any]:
    return gym.wrappers.TransformReward(env, lambda _: reward)


def cartpole(n_envs: int) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=n_envs)


def test_first_state_is_that_of_a_replay_from_the_start_of_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = record_rollouts(monkeypatch)
    A3C("MlpLstmPolicy", cartpole(3), learning_rate=0.0, n_steps=7, n_workers=0, seed=1).learn(3 * 7 * 40)
    policy: Any = rollouts[0][0].policy
    n_compared = 0
    for env in range(3):
        state = policy.initial_state(1)
        for _, rollout in rollouts:
            assert isinstance(rollout.obs, np.ndarray)
            if not rollout.episode_starts[0, env]:
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


def test_a_time_limit_is_bootstrapped_with_the_last_observation_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = record_rollouts(monkeypatch)
    env = DummyVecEnv([lambda: Countdown([4]), lambda: Countdown([100])])
    raw = dict(normalize_values=False)  # others change with the targets
    A3C("MlpLstmPolicy", env, learning_rate=0.0, n_steps=6, policy_kwargs=raw, n_workers=0, seed=1).learn(1)
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


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_with_normalized_values_the_loss_is_in_units_of_their_scale(
    normalize_advantage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[tuple[Any, ...]] = []

    def note(values: th.Tensor, log_prob: th.Tensor, entropy: Any, *others: Any) -> LossTerms:
        losses.append((values.detach(), *others))
        return a3c_loss(values, log_prob, entropy, *others)

    monkeypatch.setattr("sb3_a3c.actor_learner.actor_learner.a3c_loss", note)
    rollouts = record_rollouts(monkeypatch)
    env = make_vec_env(Countdown, 2, env_kwargs=dict(lengths=[100]), wrapper_class=paying)
    kwargs: dict[str, Any] = dict(n_steps=3, learning_rate=0.0, gamma=0.5, normalize_advantage=normalize_advantage)
    model = A3C("MlpLstmPolicy", env, n_workers=0, envs_per_update=1, **kwargs)
    with th.no_grad():
        for parameter in model.policy.value_net.parameters():
            parameter.fill_(0.0)
    model.learn(1)
    assert [rollout.values.tolist() for _, rollout in rollouts] == [[[0, 0]] * 3]
    # rewards of 100: returns of 175, 150 and 100, with a root mean square of 144.3, in the update of each environment
    returns, mean, scale = th.tensor([[175.0], [150.0], [100.0]]), 425 / 3, math.sqrt((175**2 + 150**2 + 100**2) / 3)
    for values, targets, advantages, ent_coef, vf_coef in losses:
        assert th.allclose(values, th.full((3, 1), mean / scale))
        assert th.allclose(targets, returns / scale)
        expected = (returns - mean) / returns.std(correction=0) if normalize_advantage else returns / scale
        assert th.allclose(advantages, expected, atol=1e-5)
        assert (ent_coef, vf_coef) == pytest.approx((0.003 if normalize_advantage else 0.003 / scale, 0.5))
    assert len(losses) == 2


def test_with_normalized_values_the_size_of_the_rewards_changes_nothing() -> None:
    learned = []
    for factor in (8.0, 8192.0):  # powers of two, so that nothing is rounded differently
        env = make_vec_env("CartPole-v1", 3, wrapper_class=functools.partial(paying, reward=factor))
        kwargs: dict[str, Any] = dict(learning_rate=1e-2, n_steps=8, ent_coef=0.0, envs_per_update=2)
        model = A3C("MlpLstmPolicy", env, n_workers=0, seed=0, **kwargs)
        with th.no_grad():  # the first values are as large as the rewards
            for parameter in model.policy.value_net.parameters():
                parameter.fill_(0.0)
        model.learn(600)
        normalizer: Any = model.policy.value_normalizer
        learned.append(th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()]))
        assert normalizer.mean_and_scale[1] > 4 * factor
    assert th.equal(*learned)


def test_workers_share_the_statistics_of_normalized_values() -> None:
    env = make_vec_env(Countdown, 4, env_kwargs=dict(lengths=[100]), wrapper_class=paying)
    model = A3C("MlpLstmPolicy", env, n_steps=3, gamma=0.0, learning_rate=0.0, n_workers=2, take_turns=True).learn(12 * 10)
    total, squares, weight = model.policy.value_normalizer.statistics.tolist()  # type: ignore[union-attr,operator]
    assert model._n_updates == 20
    assert (total / weight, squares / weight) == pytest.approx((100, 10_000))
    assert weight == pytest.approx(1 - 0.99**20)


def test_one_update_for_each_chunk_of_environments() -> None:
    for n_envs, envs_per_update, n_updates in ((4, 1, 4), (4, 3, 2), (4, 9, 1), (5, 2, 3)):
        model = A3C("MlpPolicy", cartpole(n_envs), n_steps=5, envs_per_update=envs_per_update, n_workers=0)
        model.learn(5 * n_envs * 2)
        assert model._n_updates == 2 * n_updates


@pytest.mark.parametrize(
    ("policy", "make_env", "envs_per_update", "kwargs"),
    [
        ("CnnLstmPolicy", functools.partial(make_vec_env, Images, 3, seed=0), 2, {}),
        ("MlpLstmPolicy", functools.partial(cartpole, 3), 3, {}),
        ("MlpLstmPolicy", functools.partial(make_vec_env, "Pendulum-v1", 3), 2, {"use_sde": True, "sde_sample_freq": 3}),
    ],
)
def test_the_activation_cache_changes_no_result(
    policy: str,
    make_env: Callable[[], VecEnv],
    envs_per_update: int,
    kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays = []
    replay = LstmCache.replay

    def replay_and_count(self: LstmCache, *args: Any) -> th.Tensor:
        replays.append(self)
        return replay(self, *args)

    class OtherSteps(BaseCallback):
        """Changes the shape of the rollouts."""

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


def test_a_policy_whose_act_has_no_argument_for_the_cache() -> None:
    class WithoutCache(MlpLstmPolicy):
        def act(self, obs: Any, state: Any, episode_starts: th.Tensor) -> Any:  # type: ignore[override]
            return super().act(obs, state, episode_starts)

    model = A3C(WithoutCache, cartpole(2), n_steps=5, n_workers=0)
    model.learn(20)
    assert model._n_updates == 2


def test_the_learning_rate_follows_the_timesteps_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    learn = ActorLearner._learn

    def learn_and_record(self: ActorLearner, rollout: Rollout) -> None:
        rates.append(self.replica.optimizer.param_groups[0]["lr"])
        learn(self, rollout)

    monkeypatch.setattr(ActorLearner, "_learn", learn_and_record)
    model = A3C("MlpPolicy", cartpole(2), learning_rate=lambda progress: progress, n_steps=5, n_workers=0)
    model.learn(40)
    assert rates == pytest.approx([0.75, 0.5, 0.25, 0.0])
    rates.clear()
    model.learn(40, reset_num_timesteps=False)  # continues from 40 to 80
    assert rates == pytest.approx([0.375, 0.25, 0.125, 0.0])


class Normed(BaseFeaturesExtractor):
    """Batch normalisation; records in which mode it is used."""

    modes: ClassVar[list[bool]] = []

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, features_dim=4)
        self.norm = th.nn.BatchNorm1d(4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.modes.append(self.training)
        normed: th.Tensor = self.norm(x)
        return normed


def test_batch_norm_acts_in_eval_mode_and_learns_in_train_mode() -> None:
    policy_kwargs = dict(features_extractor_class=Normed)
    model = A3C("MlpLstmPolicy", cartpole(2), n_steps=5, n_workers=0, policy_kwargs=policy_kwargs)
    Normed.modes.clear()
    model.learn(20)
    assert Normed.modes == ([False] * 6 + [True]) * 2
    extractor: Any = model.policy.features_extractor
    assert int(extractor.norm.num_batches_tracked) == 2
    assert float(extractor.norm.running_mean.abs().max()) > 0


def test_sde_draws_new_noise_after_every_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[ActorCriticPolicy, int]] = []
    reset_noise: Callable[..., None] = ActorCriticPolicy.reset_noise

    def counted(self: ActorCriticPolicy, n_envs: int = 1) -> None:
        calls.append((self, n_envs))
        reset_noise(self, n_envs)

    monkeypatch.setattr(ActorCriticPolicy, "reset_noise", counted)
    env = make_vec_env("Pendulum-v1", n_envs=2)
    kwargs: dict[str, Any] = dict(n_steps=4, envs_per_update=1, n_workers=0, use_sde=True)
    policy_kwargs = dict(squash_output=True)

    def draws_of_worker(policy: str, sde_sample_freq: int) -> list[int]:
        model = A3C(policy, env, sde_sample_freq=sde_sample_freq, policy_kwargs=policy_kwargs, **kwargs)
        calls.clear()
        model.learn(8)
        assert any(owner is model.policy for owner, _ in calls)  # the model explores with the new noise too
        return [n_envs for owner, n_envs in calls if owner is not model.policy]

    assert draws_of_worker("MlpLstmPolicy", -1) == [2]  # one pull before acting, none between the two chunks
    assert draws_of_worker("MlpPolicy", 2) == [2, 2, 2]  # and at steps 0 and 2
