"""LSTM policies: acting step by step and evaluating whole rollouts agree; SB3's and sb3-contrib's conventions hold."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent import MlpLstmPolicy as ContribMlpLstmPolicy
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import obs_as_tensor

from sb3_a3c import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.policies.sampling import to_env_actions
from sb3_a3c.policies.torch_layers import BabyCNN, EmbeddingExtractor, LstmState

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
DICT = spaces.Dict({"image": spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8), "vector": VECTOR})
CHOICE = spaces.Discrete(4)
MOVE = spaces.Box(np.array([-1, -2], dtype=np.float32), np.array([1, 4], dtype=np.float32))

KINDS: dict[str, tuple[type[LstmActorCriticPolicy], spaces.Space[Any], spaces.Space[Any], int]] = {
    "mlp": (MlpLstmPolicy, VECTOR, CHOICE, 1),
    "mlp-box": (MlpLstmPolicy, VECTOR, MOVE, 2),
    "cnn": (CnnLstmPolicy, IMAGE, CHOICE, 1),
    "multi": (MultiInputLstmPolicy, DICT, MOVE, 1),
}
#: The LSTM policies with a critic without memory, and with other layers before the LSTM.
VARIANTS = {
    "mlp, flat": ("mlp", dict(features_extractor_class=FlattenExtractor)),
    "mlp, flat, memoryless critic": ("mlp", dict(features_extractor_class=FlattenExtractor, enable_critic_lstm=False)),
    "mlp, memoryless critic": ("mlp", dict(enable_critic_lstm=False)),
    "cnn, memoryless critic": ("cnn", dict(enable_critic_lstm=False)),
    "cnn, features_dim": ("cnn", dict(features_extractor_kwargs=dict(features_dim=20))),
}
N_STEPS, N_ENVS, HIDDEN = 6, 3, 16

#: Environment 1 starts an episode at step 2, environments 0 and 2 at step 4.
STARTS = th.zeros(N_STEPS, N_ENVS, dtype=th.bool)
STARTS[2, 1] = STARTS[4, 0] = STARTS[4, 2] = True


def make(kind: str, **kwargs: Any) -> LstmActorCriticPolicy:
    """A policy whose outputs depend on observations and state as strongly as after training."""
    cls, obs_space, action_space, n_lstm_layers = KINDS[kind]
    th.manual_seed(0)
    policy = cls(
        obs_space, action_space, lambda _: 1e-4, **{"lstm_hidden_size": HIDDEN, "n_lstm_layers": n_lstm_layers, **kwargs}
    )
    with th.no_grad():  # SB3 begins with an almost uniform distribution
        linear(policy.action_net).weight.mul_(100)
    if policy.value_normalizer is not None:
        policy.value_normalizer.update(np.array([-3.0, 50.0]))
    return policy


def linear(module: th.nn.Module) -> th.nn.Linear:
    assert isinstance(module, th.nn.Linear)
    return module


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest) -> LstmActorCriticPolicy:
    """One of each kind, in double precision, so that rounding is far below any effect."""
    return make(request.param).double()


@pytest.fixture(params=[*KINDS, *VARIANTS])
def variant(request: pytest.FixtureRequest) -> LstmActorCriticPolicy:
    kind, kwargs = VARIANTS.get(request.param, (request.param, {}))
    return make(kind, **kwargs).double()


def sample_obs(space: spaces.Space[Any], *batch: int, seed: int = 0) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: sample_obs(part, *batch, seed=seed) for key, part in space.spaces.items()}
    rng = np.random.default_rng(seed)
    assert space.shape is not None
    shape = (*batch, *space.shape)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(np.float32)


def part_of(obs: Any, index: Any) -> Any:
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]


def as_tensor(obs: Any) -> Any:
    return obs_as_tensor(obs, th.device("cpu"))


def flat(obs: Any) -> Any:
    """(T, N, …) -> (T * N, …), time-major"""
    if isinstance(obs, dict):
        return {key: flat(value) for key, value in obs.items()}
    return obs.reshape(-1, *obs.shape[2:])


def random_state(policy: LstmActorCriticPolicy, n_envs: int = N_ENVS) -> LstmState:
    generator = th.Generator().manual_seed(1)
    return tuple(th.randn(part.shape, generator=generator, dtype=part.dtype) for part in policy.initial_state(n_envs))


def step_by_step(
    policy: LstmActorCriticPolicy, obs: Any, state: LstmState, starts: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor, LstmState]:
    """Actions, values and log-probabilities (T, N, …) of single steps, and the state after the last one."""
    steps = []
    with th.no_grad():
        for t in range(len(starts)):
            *step, state = policy.forward(as_tensor(part_of(obs, t)), state, starts[t])
            steps.append(step)
    actions, values, log_probs = (th.stack(column) for column in zip(*steps, strict=True))
    return actions, values, log_probs, state


def assert_close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def test_whole_rollout_equals_single_steps(policy: LstmActorCriticPolicy) -> None:
    obs, state, starts = sample_obs(policy.observation_space, N_STEPS, N_ENVS), random_state(policy), STARTS.clone()
    starts[0, 1] = True
    actions, values, log_probs, after = step_by_step(policy, obs, state, starts)
    assert [part.shape for part in after] == [part.shape for part in state]
    batch = as_tensor(flat(obs)), actions.flatten(0, 1)
    with th.no_grad():
        all_values, all_log_probs, entropies = policy.evaluate_actions(*batch, state, starts)
        other_starts, _, _ = policy.evaluate_actions(*batch, state, th.zeros_like(starts))
        other_state, _, _ = policy.evaluate_actions(*batch, policy.initial_state(N_ENVS), starts)
    assert all_values.shape == (N_STEPS * N_ENVS, 1)
    assert all_log_probs.shape == (N_STEPS * N_ENVS,)
    assert entropies is not None
    assert entropies.shape == (N_STEPS * N_ENVS,)
    assert_close(all_values.reshape(N_STEPS, N_ENVS, 1), values)
    assert_close(all_log_probs.reshape(N_STEPS, N_ENVS), log_probs)
    # episode starts matter from the first one on, the state before the rollout only until then
    for others, expected in ((other_starts, starts.cumsum(dim=0) > 0), (other_state, starts.cumsum(dim=0) == 0)):
        assert th.equal((others - all_values).abs().reshape(N_STEPS, N_ENVS) > 1e-9, expected)


def test_gradients_of_both_heads_reach_lstm_and_extractor(policy: LstmActorCriticPolicy) -> None:
    obs, state = sample_obs(policy.observation_space, N_STEPS, N_ENVS), random_state(policy)
    actions = step_by_step(policy, obs, state, STARTS)[0].flatten(0, 1)
    values, log_prob, _ = policy.evaluate_actions(as_tensor(flat(obs)), actions, state, STARTS)
    reached = [*policy.lstm.parameters(), *policy.features_extractor.parameters()]
    assert len(reached) >= 4
    for output in (values, log_prob):
        for gradient in th.autograd.grad(output.sum(), reached, retain_graph=True):
            assert gradient.abs().max() > 0


def test_gradients_flow_through_time_within_an_episode() -> None:
    policy = make("mlp").double()
    state = tuple(part.requires_grad_() for part in random_state(policy))
    obs = as_tensor(flat(sample_obs(VECTOR, N_STEPS, N_ENVS)))
    values, _, _ = policy.evaluate_actions(obs, th.zeros(N_STEPS * N_ENVS), state, STARTS)
    gradients = th.autograd.grad(values.reshape(N_STEPS, N_ENVS)[3].sum(), state)
    for gradient in gradients:  # of the values at step 3, over the states before step 0: environment 1 started at 2
        reached = gradient[0].abs().amax(dim=1) > 0
        assert reached.tolist() == [True, False, True]


def test_forward_get_distribution_and_predict_values_agree(variant: LstmActorCriticPolicy) -> None:
    policy = variant
    obs, state = as_tensor(sample_obs(policy.observation_space, N_ENVS)), random_state(policy)
    starts = th.tensor([False, True, False])
    with th.no_grad():
        actions, values, log_prob, after = policy.forward(obs, state, starts, deterministic=True)
        distribution, other_after = policy.get_distribution(obs, state, starts)
        assert th.equal(policy.predict_values(obs, state, starts), values)
        assert th.equal(distribution.mode(), actions)
        assert th.equal(distribution.log_prob(actions), log_prob)
    assert actions.shape == (N_ENVS, *policy.action_space.shape)  # type: ignore[misc]
    assert values.shape == (N_ENVS, 1)
    assert log_prob.shape == (N_ENVS,)
    assert all(th.equal(a, b) for a, b in zip(after, other_after, strict=True))
    assert [part.shape for part in after] == [part.shape for part in state]


# --- predict ---


def predicted_state(policy: LstmActorCriticPolicy, obs: Any, state: Any = None, starts: Any = None) -> Any:
    return policy.predict(obs, state, starts, deterministic=True)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_returns_arrays_in_sb3_contribs_shapes(kind: str) -> None:
    policy = make(kind)
    for n_envs in (1, N_ENVS):
        actions, state = policy.predict(sample_obs(policy.observation_space, n_envs))
        assert isinstance(actions, np.ndarray)
        assert actions.shape == (n_envs, *policy.action_space.shape)  # type: ignore[misc]
        assert isinstance(state, tuple)
        assert [type(part) for part in state] == [np.ndarray, np.ndarray]
        assert [part.shape for part in state] == [(policy.n_lstm_layers, n_envs, HIDDEN)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_predict_for_one_observation_equals_batch_of_one(kind: str) -> None:
    policy = make(kind)
    obs, starts = sample_obs(policy.observation_space, 1), np.array([False])
    before = predicted_state(policy, sample_obs(policy.observation_space, 1, seed=1))
    actions, state = policy.predict(obs, before, starts, deterministic=True)
    action, other_state = policy.predict(part_of(obs, 0), before, starts, deterministic=True)
    assert policy.action_space.contains(action if np.shape(action) else np.int64(action))
    np.testing.assert_array_equal(action, actions[0])
    np.testing.assert_array_equal(np.array(state), np.array(other_state))


@pytest.mark.parametrize("kind", ["mlp", "multi"])
def test_predict_zeroes_the_state_where_an_episode_starts(kind: str) -> None:
    policy = make(kind)
    obs, none, every = sample_obs(policy.observation_space, N_ENVS), np.zeros(N_ENVS, bool), np.ones(N_ENVS, bool)
    before = predicted_state(policy, sample_obs(policy.observation_space, N_ENVS, seed=1))
    copies, zeros = [part.copy() for part in before], tuple(np.zeros_like(part) for part in before)
    fresh = predicted_state(policy, obs)
    for state, starts in ((None, every), (zeros, None), (zeros, none), (before, every)):
        np.testing.assert_array_equal(predicted_state(policy, obs, state, starts), fresh)
    carried = predicted_state(policy, obs, before)
    np.testing.assert_array_equal(predicted_state(policy, obs, before, none), carried)
    mixed = predicted_state(policy, obs, before, np.array([False, True, False]))
    for part, one, other in zip(mixed, carried, fresh, strict=True):
        assert np.abs(one - other).max(axis=(0, 2)).min() > 1e-3
        np.testing.assert_array_equal(part[:, [0, 2]], one[:, [0, 2]])
        np.testing.assert_array_equal(part[:, 1], other[:, 1])
    np.testing.assert_array_equal(before, copies)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_takes_the_same_steps_as_forward(kind: str) -> None:
    policy = make(kind)
    obs = sample_obs(policy.observation_space, N_STEPS, N_ENVS)
    state, reference = None, policy.initial_state(N_ENVS)
    for t in range(N_STEPS):
        actions, state = policy.predict(part_of(obs, t), state, STARTS[t].numpy(), deterministic=True)
        with th.no_grad():
            expected, _, _, reference = policy.forward(as_tensor(part_of(obs, t)), reference, STARTS[t], deterministic=True)
        np.testing.assert_array_equal(actions, to_env_actions(policy, expected.numpy()))
    np.testing.assert_array_equal(state, [part.numpy() for part in reference])


@pytest.mark.parametrize("kind", ["mlp", "mlp-box"])
def test_deterministic_predictions_repeat_and_others_are_sampled(kind: str) -> None:
    policy = make(kind)
    with th.no_grad():
        linear(policy.action_net).weight.div_(1000)  # so that all four actions are sampled
    obs = sample_obs(policy.observation_space, 20)
    first, second = (policy.predict(obs, deterministic=True) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    th.manual_seed(0)
    sampled, others = policy.predict(obs)[0], policy.predict(obs)[0]
    assert not np.array_equal(sampled, others)
    th.manual_seed(0)
    np.testing.assert_array_equal(policy.predict(obs)[0], sampled)


@pytest.mark.parametrize("kind", ["mlp-box", "multi"])
def test_predicted_actions_are_clipped_to_the_space(kind: str) -> None:
    policy = make(kind)
    with th.no_grad():
        linear(policy.action_net).bias.copy_(th.tensor([100.0, -100.0]))
    actions, _ = policy.predict(sample_obs(policy.observation_space, N_ENVS))
    assert actions.tolist() == [[1, -2]] * N_ENVS
    action, _ = policy.predict(sample_obs(policy.observation_space))
    assert action.tolist() == [1, -2]


def test_predict_turns_dropout_off() -> None:
    policy = make("mlp", n_lstm_layers=2, lstm_kwargs={"dropout": 0.5})
    policy.set_training_mode(True)
    obs = sample_obs(VECTOR, N_ENVS)
    np.testing.assert_array_equal(predicted_state(policy, obs), predicted_state(policy, obs))
    assert not policy.training


# --- act ---


@pytest.mark.parametrize("kind", ["mlp", "mlp-box"])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_act_samples_from_the_distribution(kind: str, feed_forward: bool) -> None:
    _, obs_space, action_space, _ = KINDS[kind]
    n = 20_000
    policy: Any = ActorCriticPolicy(obs_space, action_space, lambda _: 1.0) if feed_forward else make(kind)
    obs = as_tensor(sample_obs(obs_space, 1)).repeat(n, 1)
    th.manual_seed(0)
    with th.no_grad():
        policy.action_net.bias.copy_(th.linspace(-1, 1, len(policy.action_net.bias)))
        actor = as_recurrent(policy)
        actions, _, _ = actor.act(obs, actor.initial_state(n), th.zeros(n, dtype=th.bool))
        if feed_forward:
            distribution = policy.get_distribution(obs[:1]).distribution
        else:
            starts = th.zeros(1, dtype=th.bool)
            distribution = policy.get_distribution(obs[:1], policy.initial_state(1), starts)[0].distribution
    if isinstance(distribution, th.distributions.Categorical):
        frequencies = th.bincount(actions, minlength=4) / n
        assert th.allclose(frequencies, distribution.probs[0], atol=0.015)  # four standard deviations
        assert float(distribution.probs.max() - distribution.probs.min()) > 0.1
    else:
        assert th.allclose(actions.mean(dim=0), distribution.mean[0], atol=0.03)
        assert th.allclose(actions.std(dim=0), distribution.stddev[0], atol=0.03)


class Constant(ActorCriticPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return th.full((len(obs),), 3), th.zeros(len(obs), 1), th.zeros(len(obs))


class LstmConstant(CnnLstmPolicy):
    def forward(self, obs: Any, state: Any, episode_starts: th.Tensor, deterministic: bool = False) -> Any:  # type: ignore[override]
        return th.full((len(obs),), 3), th.zeros(len(obs), 1), th.zeros(len(obs)), state


@pytest.mark.parametrize(("cls", "space"), [(Constant, VECTOR), (LstmConstant, IMAGE)])
def test_act_uses_an_overridden_forward(cls: type[ActorCriticPolicy], space: spaces.Space[Any]) -> None:
    actor = as_recurrent(cls(space, CHOICE, lambda _: 1.0))
    assert actor.new_activation_cache(1, [slice(0, 5)]) is None
    obs = as_tensor(sample_obs(space, 5))
    assert actor.act(obs, actor.initial_state(5), th.zeros(5, dtype=th.bool))[0].tolist() == [3] * 5


def test_act_and_evaluate_agree_with_a_custom_lstm() -> None:
    class Doubled(th.nn.LSTM):
        def forward(self, *args: Any) -> Any:
            output, state = super().forward(*args)
            return 2 * output, state

    class DoubledPolicy(MlpLstmPolicy):
        def _build_mlp_extractor(self) -> None:
            super()._build_mlp_extractor()
            self.lstm = Doubled(self.features_dim, self.lstm_hidden_size)

    policy = DoubledPolicy(VECTOR, CHOICE, lambda _: 1.0)
    obs, state, starts = as_tensor(sample_obs(VECTOR, 5)), policy.initial_state(5), th.zeros(5, dtype=th.bool)
    policy.set_training_mode(False)
    with th.no_grad():
        acted = policy.act(obs, state, starts)[1]
    assert th.allclose(acted, policy.evaluate_actions(obs, th.zeros(5), state, starts[None])[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "feed-forward"])
def test_non_finite_logits_raise(kind: str) -> None:
    policy: Any = make("mlp") if kind == "mlp" else ActorCriticPolicy(VECTOR, CHOICE, lambda _: 1.0)
    actor = as_recurrent(policy)
    with pytest.raises(ValueError, match="nan"):
        actor.act(th.full((1, 3), float("nan")), actor.initial_state(1), th.zeros(1, dtype=th.bool))


def test_cached_evaluation_equals_evaluation(variant: LstmActorCriticPolicy) -> None:
    policy = variant
    obs = sample_obs(policy.observation_space, N_STEPS, N_ENVS)
    state = policy.initial_state(N_ENVS)
    cache = policy.new_activation_cache(N_STEPS, [slice(0, N_ENVS)])
    assert (cache is None) == isinstance(policy, MultiInputLstmPolicy)
    acted, actions = state, []
    policy.set_training_mode(False)
    for t in range(N_STEPS):
        now = as_tensor(part_of(obs, t))
        with th.no_grad():
            _, expected_values, _, state = policy.forward(now, state, STARTS[t])
            action, values, acted = policy.act(now, acted, STARTS[t], cache)
        assert th.allclose(values, expected_values, rtol=1e-5, atol=1e-6)
        actions.append(action)
    policy.set_training_mode(True)
    evaluations = []
    for part in (*(cache.chunk_caches() if cache else []), None):
        values, log_prob, _ = policy.evaluate_actions(
            as_tensor(flat(obs)), th.cat(actions), policy.initial_state(N_ENVS), STARTS, part
        )
        gradients = th.autograd.grad(values.sum() + log_prob.sum(), list(policy.parameters()))
        evaluations.append([values, log_prob, *gradients])
    for one, other in zip(evaluations[0], evaluations[-1], strict=True):
        assert th.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["extract_features", "forward", "act", "evaluate_actions"])
def test_no_cache_for_policy_with_overridden_method(method: str) -> None:
    policy = make("mlp")
    assert policy.new_activation_cache(2, [slice(0, 8)]) is not None
    original = getattr(policy, method)

    def own(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    setattr(policy, method, own)
    assert policy.new_activation_cache(2, [slice(0, 8)]) is None
    subclass = type("Own", (MlpLstmPolicy,), {method: own})(VECTOR, CHOICE, lambda _: 1e-4)
    assert subclass.new_activation_cache(2, [slice(0, 8)]) is None


# --- networks ---


def test_default_network_is_that_of_baby_a3c() -> None:
    policy = CnnLstmPolicy(spaces.Box(0, 255, (1, 84, 84), dtype=np.uint8), CHOICE, lambda _: 1e-4)
    assert isinstance(policy.features_extractor, BabyCNN)
    assert (policy.lstm.input_size, policy.lstm.hidden_size, policy.lstm.num_layers) == (1152, 256, 1)
    heads = linear(policy.action_net), linear(policy.value_net)
    assert [(head.in_features, head.out_features) for head in heads] == [(256, 4), (256, 1)]
    # convolutions, LSTM with its two biases, heads
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert n_parameters == (9 * 32 + 32) + 3 * (9 * 32 * 32 + 32) + 4 * 256 * (1152 + 256 + 2) + 257 * 4 + 257
    optimized = [p for group in policy.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, policy.parameters()))


@pytest.mark.parametrize("n_channels", [1, 4])
def test_a_uniform_background_has_no_effect_at_first(n_channels: int) -> None:
    """But for the edges, where the convolutions see zeros beside it."""
    space = spaces.Box(0, 255, (n_channels, 84, 84), dtype=np.uint8)
    grey = th.full((1, n_channels, 84, 84), 0.4)
    for ortho_init in (True, False):
        policy = CnnLstmPolicy(space, CHOICE, lambda _: 1e-4, ortho_init=ortho_init)
        assert isinstance(policy.features_extractor, BabyCNN)
        first: Any = policy.features_extractor.cnn[0]
        assert first.bias.any() != ortho_init
        effect = (first(grey) - first.bias[:, None, None])[..., 1:, 1:].abs().max().item()
        assert effect < 1e-6 if ortho_init else effect > 0.01
        if ortho_init:  # of gain sqrt(2); the norm that all filters had together stays
            assert first.weight.norm().item() == pytest.approx((2 * min(32, 9 * n_channels)) ** 0.5)


@pytest.mark.parametrize("cls", [MlpLstmPolicy, MultiInputLstmPolicy])
def test_default_network_of_other_observations(cls: type[MlpLstmPolicy]) -> None:
    policy = cls(spaces.Dict({"v": VECTOR}) if cls is MultiInputLstmPolicy else VECTOR, CHOICE, lambda _: 1e-4)
    assert (policy.lstm.hidden_size, policy.net_arch) == (64, [64])
    assert policy.value_normalizer is not None
    # embedding, LSTM with its two biases, a layer for each head, heads; layer normalization has two parameters a unit
    n_parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert n_parameters == (4 + 2) * 64 + 4 * 64 * (64 + 64 + 2) + 2 * 65 * 64 + 65 * 4 + 65
    assert isinstance(policy.features_extractor, EmbeddingExtractor)


@pytest.mark.parametrize("kind", ["cnn", "multi"])
def test_channels_last_changes_only_the_memory_order(kind: str) -> None:
    policies = make(kind), make(kind, channels_last=False)  # the first by default
    for policy, channels_last in zip(policies, (True, False), strict=True):
        weights = [p for p in policy.features_extractor.parameters() if p.dim() == 4]
        assert len(weights) == (4 if kind == "cnn" else 3)
        optimized = {id(p) for p in policy.optimizer.param_groups[0]["params"]}
        for weight in weights:
            _, n_in, height, width = weight.shape
            last, first = (n_in * height * width, 1, n_in * width, n_in), (n_in * height * width, height * width, width, 1)
            assert weight.stride() == (last if channels_last else first)
            assert id(weight) in optimized
    for parameter, other in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert th.equal(parameter, other)
    obs = as_tensor(sample_obs(policies[0].observation_space, N_ENVS))
    with th.no_grad():
        values, others = (policy.predict_values(obs, random_state(policy), STARTS[2]) for policy in policies)
    assert_close(values, others, tolerance=1e-5)


def test_features_extractor_class() -> None:
    policy = make("cnn", features_extractor_class=NatureCNN, features_extractor_kwargs={"features_dim": 40})
    assert isinstance(policy.features_extractor, NatureCNN)
    assert policy.lstm.input_size == 40


@pytest.mark.parametrize("net_arch", [None, [], [32], {"pi": [24, 12], "vf": [8]}, {"vf": [8]}])
def test_net_arch_adds_layers_between_lstm_and_heads(net_arch: Any) -> None:
    policy = make("mlp", net_arch=net_arch)
    if isinstance(net_arch, dict):
        widths = tuple((net_arch.get(head) or [HIDDEN])[-1] for head in ("pi", "vf"))
    else:
        widths = (64 if net_arch is None else (net_arch or [HIDDEN])[-1],) * 2
    assert (linear(policy.action_net).in_features, linear(policy.value_net).in_features) == widths
    assert (policy.mlp_extractor.latent_dim_pi, policy.mlp_extractor.latent_dim_vf) == widths
    obs, state = as_tensor(flat(sample_obs(VECTOR, N_STEPS, N_ENVS))), random_state(policy)
    assert policy.evaluate_actions(obs, th.zeros(N_STEPS * N_ENVS), state, STARTS)[0].shape == (N_STEPS * N_ENVS, 1)


def test_features_dim_is_the_number_of_units_behind_the_convolutions() -> None:
    policy = make("cnn", features_extractor_kwargs={"features_dim": 20})
    assert isinstance(policy.features_extractor, BabyCNN)
    assert policy.features_extractor.features_dim == policy.lstm.input_size == 20
    layer, elu = policy.features_extractor.linear
    assert (linear(layer).in_features, linear(layer).out_features) == (32 * 3 * 3, 20)
    images = as_tensor(sample_obs(IMAGE, N_ENVS)).float() / 255
    with th.no_grad():
        assert th.equal(policy.features_extractor(images), elu(layer(policy.features_extractor.cnn(images))))


# --- sb3-contrib's arguments ---


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_arguments_of_a_shared_lstm_change_nothing(kind: str) -> None:
    arguments = (
        dict(shared_lstm=True),
        dict(shared_lstm=True, enable_critic_lstm=False),
        dict(share_features_extractor=True),
    )
    default = make(kind).state_dict()
    for kwargs in arguments:
        same = make(kind, **kwargs).state_dict()
        assert same.keys() == default.keys()
        assert all(th.equal(value, default[name]) for name, value in same.items())


@pytest.mark.parametrize("kwargs", [dict(enable_critic_lstm=False), dict(enable_critic_lstm=False, shared_lstm=False)])
def test_critic_without_memory_is_sb3_contribs(kwargs: dict[str, Any]) -> None:
    policy = make("mlp", net_arch=[8], normalize_values=False, features_extractor_class=FlattenExtractor, **kwargs)
    theirs = ContribMlpLstmPolicy(VECTOR, CHOICE, lambda _: 1e-4, net_arch=[8], lstm_hidden_size=HIDDEN, **kwargs)
    theirs.load_state_dict({re.sub(r"^lstm\.", "lstm_actor.", name): value for name, value in policy.state_dict().items()})
    state, starts = random_state(policy), STARTS.float()
    obs = sample_obs(VECTOR, N_STEPS, N_ENVS)
    actions = step_by_step(policy, obs, state, STARTS)[0]
    found = policy.evaluate_actions(as_tensor(flat(obs)), actions.flatten(0, 1), state, STARTS)
    # sb3-contrib has the environments, not the steps, in the first dimension: (T, N, …) -> (N * T, …)
    by_env: Any = [part.swapaxes(0, 1).flatten(0, 1) for part in (as_tensor(obs), actions, starts)]
    expected = theirs.evaluate_actions(by_env[0], by_env[1], RNNStates(state, state), by_env[2])
    gradients = []
    for net, (values, log_prob, entropy) in ((policy, found), (theirs, expected)):
        assert entropy is not None
        parameters = {re.sub(r"^lstm\.", "lstm_actor.", name): value for name, value in net.named_parameters()}
        of_all = th.autograd.grad(values.sum() + log_prob.sum() + entropy.sum(), list(parameters.values()))
        gradients.append(dict(zip(parameters, of_all, strict=True)))
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert th.allclose(one.reshape(N_STEPS, N_ENVS), other.reshape(N_ENVS, N_STEPS).t(), atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert th.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(enable_critic_lstm=True), "`enable_critic_lstm=True`.*Leave both out, or use `shared_lstm=True` alone"),
        (dict(shared_lstm=False), "RecurrentPPO's default.*or `enable_critic_lstm=False` alone for a critic without memory"),
        (dict(shared_lstm=True, enable_critic_lstm=True), "Leave both out"),
        (dict(share_features_extractor=False), r"share what comes before it\. Leave it out, and use e\.g\. `net_arch="),
    ],
)
def test_networks_of_the_critics_own_raise(kwargs: dict[str, Any], message: str) -> None:
    for kind in ("mlp", "cnn", "multi"):
        with pytest.raises(ValueError, match=message):
            make(kind, **kwargs)


@pytest.mark.parametrize("argument", [{"bidirectional": True}, {"batch_first": True}, {"proj_size": 4}])
def test_lstm_kwargs_that_can_not_act_step_by_step_raise(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        make("mlp", lstm_kwargs=argument)


def test_lstm_kwargs_reach_the_lstm() -> None:
    assert not make("mlp", lstm_kwargs={"bias": False, "bidirectional": False}).lstm.bias


def test_forget_gate_bias_changes_nothing_but_the_biases_of_forget_gates() -> None:
    without, with_bias = make("mlp", n_lstm_layers=2), make("mlp", n_lstm_layers=2, forget_gate_bias=1.5)
    for (name, before), (_, after) in zip(without.named_parameters(), with_bias.named_parameters(), strict=True):
        expected = before.detach().clone()
        if name in ("lstm.bias_hh_l0", "lstm.bias_hh_l1"):
            expected[HIDDEN : 2 * HIDDEN] += 1.5  # torch's order: input, forget, cell, output
        assert th.equal(after, expected)


def test_an_lstm_without_biases_has_no_forget_gate_bias() -> None:
    with pytest.raises(ValueError, match="`forget_gate_bias` is not possible in an LSTM without biases"):
        make("mlp", forget_gate_bias=1.0, lstm_kwargs={"bias": False})


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_initial_state_is_zero_in_the_precision_of_the_parameters(dtype: th.dtype) -> None:
    state = make("mlp").to(dtype).initial_state(2)
    assert [(part.shape, part.dtype) for part in state] == [((1, 2, HIDDEN), dtype)] * 2
    assert not any(part.any() for part in state)


# --- as_recurrent ---


@pytest.mark.parametrize(
    ("cls", "obs_space", "action_space"),
    [(ActorCriticPolicy, VECTOR, CHOICE), (ActorCriticPolicy, VECTOR, MOVE), (ActorCriticCnnPolicy, IMAGE, CHOICE)],
)
def test_adapter_computes_what_a_feed_forward_policy_does(
    cls: type[ActorCriticPolicy], obs_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> None:
    policy = cls(obs_space, action_space, lambda _: 1e-4)
    actor = as_recurrent(policy)
    obs = as_tensor(sample_obs(obs_space, N_ENVS))
    starts = th.zeros(N_ENVS, dtype=th.bool)
    assert actor.initial_state(N_ENVS) == ()
    with th.no_grad():
        th.manual_seed(0)
        expected = policy(obs)
        th.manual_seed(0)
        actions, values, state = actor.act(obs, (), starts)
        assert state == ()
        if action_space is MOVE:
            assert th.equal(actions, expected[0])
        assert actions.shape == expected[0].shape
        assert th.equal(values, expected[1])
        assert th.equal(actor.predict_values(obs, (), starts), policy.predict_values(obs))
        evaluated, reference = actor.evaluate_actions(obs, actions, (), starts[None]), policy.evaluate_actions(obs, actions)
        for value, expected_value in zip(evaluated, reference, strict=True):
            assert th.equal(value, expected_value)  # type: ignore[arg-type]


def test_lstm_policy_needs_no_adapter() -> None:
    policy = make("mlp")
    assert as_recurrent(policy) is policy


# --- actions ---


def test_discrete_actions_are_env_actions() -> None:
    actions = np.array([0, 3, 2])
    assert to_env_actions(make("mlp"), actions) is actions


def test_gaussian_actions_are_clipped_and_squashed_ones_scaled() -> None:
    actions = np.array([[5, -5], [0.5, 3], [-1, 4]], dtype=np.float32)
    clipped = to_env_actions(make("mlp-box"), actions)
    assert clipped.tolist() == [[1, -2], [0.5, 3], [-1, 4]]
    assert actions[0].tolist() == [5, -5]
    actions = np.array([[-1, -1], [0, 0], [1, 1], [0.5, -0.5]], dtype=np.float32)
    scaled = to_env_actions(make("mlp-box", use_sde=True, squash_output=True), actions)
    assert scaled.tolist() == [[-1, -2], [0, 1], [1, 4], [0.5, -0.5]]
    assert clipped.dtype == scaled.dtype == np.float32


def test_squashed_policy_predicts_within_the_space_and_has_no_entropy() -> None:
    policy = make("mlp-box", use_sde=True, squash_output=True)
    policy.reset_noise(N_ENVS)
    obs, state = sample_obs(VECTOR, N_STEPS, N_ENVS), random_state(policy)
    actions, _, log_probs, _ = step_by_step(policy, obs, state, STARTS)
    assert actions.abs().max() <= 1
    values, again, entropy = policy.evaluate_actions(as_tensor(flat(obs)), actions.flatten(0, 1), state, STARTS)
    assert entropy is None
    assert values.shape == (N_STEPS * N_ENVS, 1)
    # the logarithm of 1 - tanh² near the bounds magnifies rounding
    assert_close(again.detach().reshape(N_STEPS, N_ENVS), log_probs, tolerance=1e-2)
    predicted, _ = policy.predict(obs[0], deterministic=True)
    assert all(policy.action_space.contains(action) for action in predicted)


# --- save and load ---


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("mlp", {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}, "net_arch": {"pi": [8], "vf": [4]}}),
        ("mlp-box", {"use_sde": True, "squash_output": True, "activation_fn": th.nn.ReLU}),
        ("cnn", {"normalize_images": False, "forget_gate_bias": 1.0}),
        ("cnn", {"channels_last": False, "features_extractor_class": NatureCNN}),
        ("cnn", {"enable_critic_lstm": False, "features_extractor_kwargs": {"features_dim": 9}}),
        ("multi", {"optimizer_class": th.optim.RMSprop}),
    ],
)
def test_saved_policy_is_the_same_when_loaded(kind: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    policy = make(kind, **kwargs, lstm_hidden_size=24)
    path = str(tmp_path / "policy.pt")
    policy.save(path)
    loaded = KINDS[kind][0].load(path)
    assert type(loaded) is type(policy)
    assert repr(loaded) == repr(policy)
    for name in (
        "lstm_hidden_size",
        "n_lstm_layers",
        "shared_lstm",
        "enable_critic_lstm",
        "lstm_kwargs",
        "forget_gate_bias",
        "channels_last",
        "normalize_values",
        "net_arch",
    ):
        assert getattr(loaded, name) == getattr(policy, name)
    assert type(loaded.optimizer) is type(policy.optimizer)
    for (name, one), (other_name, other) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name
        assert th.equal(one, other)
        assert one.stride() == other.stride()
    obs = sample_obs(policy.observation_space, N_ENVS)
    before = predicted_state(policy, sample_obs(policy.observation_space, N_ENVS, seed=1))
    (actions, state), (other_actions, other_state) = (p.predict(obs, before, deterministic=True) for p in (policy, loaded))
    np.testing.assert_array_equal(actions, other_actions)
    np.testing.assert_array_equal(np.array(state), np.array(other_state))
