"""Spaces, policies, layers and optimizers: workers do with them what A2C does."""

import re
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_a3c import A3C, MlpLstmPolicy

ONE_OF_EACH = pytest.mark.parametrize(("policy", "n_workers"), [("MlpPolicy", 0), ("MlpLstmPolicy", 2)])
SMALL_LSTM = dict(lstm_hidden_size=16)

VECTOR = spaces.Box(-2, 2, (3,))
CHOICE = spaces.Discrete(4)
MOVE = spaces.Box(np.array([-2, 0], dtype=np.float32), np.array([1, 4], dtype=np.float32))
IMAGE = spaces.Box(0, 255, (36, 40, 3), dtype=np.uint8)


class Recording(gym.Env[Any, Any]):
    """
    Random observations and episode ends. The infos have the action, the observation that it was chosen for, and whether that
    was the first of an episode. Actions outside the space raise.
    """

    render_mode = None

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = deepcopy(observation_space), action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t, self.obs = 0, self.observation_space.sample()
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        info = {"action": np.array(action), "chosen_for": self.obs, "is_first": self.t == 0}
        self.t, self.obs = self.t + 1, self.observation_space.sample()
        return self.obs, float(np.sum(action)), bool(self.np_random.random() < 0.1), self.t == 7, info


def recording(
    observation_space: spaces.Space[Any] = VECTOR, action_space: spaces.Space[Any] = CHOICE, n_envs: int = 4
) -> DummyVecEnv:
    return DummyVecEnv([lambda: Recording(observation_space, action_space)] * n_envs)


class Seen(BaseCallback):
    """Collects what callbacks see."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[npt.NDArray[Any]] = []
        self.new_obs: list[Any] = []
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.actions.append(self.locals["actions"])
        self.new_obs.append(self.locals["new_obs"])
        self.infos += self.locals["infos"]
        return True

    @property
    def pairs(self) -> list[tuple[npt.NDArray[Any], dict[str, Any]]]:
        """For each transition the policy's action, before clipping, and the info."""
        return list(zip(np.concatenate(self.actions), self.infos, strict=True))


def copied(model: OnPolicyAlgorithm) -> dict[str, th.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}


def assert_all_learned(model: A3C, before: dict[str, th.Tensor]) -> None:
    unmoved = [name for name, parameter in model.policy.named_parameters() if th.equal(parameter, before[name])]
    assert not unmoved
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def kind(value: Any) -> Any:
    """Type, shape and dtype."""
    if isinstance(value, dict):
        return {key: kind(part) for key, part in value.items()}
    return type(value), value.shape, value.dtype


# --- actions ----------------------------------------------------------------------------------------------------------

ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (2,)),
    "box, asymmetric": MOVE,
    "box, matrix": spaces.Box(-1, 0.5, (2, 3)),
    "box, double": spaces.Box(-1, 1, (1,), dtype=np.float64),
    "discrete": CHOICE,
    "multi-discrete": spaces.MultiDiscrete([2, 3, 4]),
    "multi-binary": spaces.MultiBinary(3),
}


@ONE_OF_EACH
@pytest.mark.parametrize("name", ACTIONS)
def test_actions_have_the_type_of_a2cs_and_are_inside_the_space(name: str, policy: str, n_workers: int) -> None:
    space = ACTIONS[name]
    env = recording(VECTOR, space)
    model, seen = A3C(policy, env, n_steps=5, n_workers=n_workers, seed=0), Seen()
    before = copied(model)
    model.learn(200, seen)
    assert_all_learned(model, before)

    seen_by_a2c = Seen()
    a2c = A2C("MlpPolicy", env, n_steps=5, seed=0).learn(20, seen_by_a2c)
    assert [kind(actions) for actions in seen.actions] == [kind(seen_by_a2c.actions[0])] * len(seen.actions)
    assert kind(seen.infos[0]["action"]) == kind(seen_by_a2c.infos[0]["action"])

    taken = np.stack([info["action"] for info in seen.infos])
    if isinstance(space, spaces.Box):
        for chosen, info in seen.pairs:
            np.testing.assert_array_equal(info["action"], np.clip(chosen, space.low, space.high))
        inside = (taken > space.low) & (taken < space.high)
        assert inside.any(axis=0).all()
        assert not inside.all(axis=0).any()  # a Gaussian exceeds the bounds unless clipped
    else:
        for chosen, info in seen.pairs:
            np.testing.assert_array_equal(info["action"], chosen)
        n_values = [space.n] if isinstance(space, spaces.Discrete) else getattr(space, "nvec", [2, 2, 2])
        columns = taken.reshape(len(taken), -1).T
        assert [sorted(set(column)) for column in columns] == [list(range(n)) for n in n_values]

    for obs in (VECTOR.sample(), np.stack([VECTOR.sample() for _ in range(3)])):
        for deterministic in (True, False):
            actions = model.predict(obs, deterministic=deterministic)[0]
            assert kind(actions) == kind(a2c.predict(obs, deterministic=deterministic)[0])
            assert all(space.contains(action) for action in (actions if obs.ndim > 1 else [actions]))


# --- observations -----------------------------------------------------------------------------------------------------

OBSERVATIONS: dict[str, tuple[spaces.Space[Any], str, dict[str, Any]]] = {
    "box": (VECTOR, "Mlp", {}),
    "matrix": (spaces.Box(-1, 1, (2, 3)), "Mlp", {}),
    "double": (spaces.Box(-1, 1, (3,), dtype=np.float64), "Mlp", {}),
    "integers": (spaces.Box(0, 255, (4,), dtype=np.uint8), "Mlp", {}),
    "discrete": (spaces.Discrete(9), "Mlp", {}),
    "multi-discrete": (spaces.MultiDiscrete([3, 4]), "Mlp", {}),
    "multi-binary": (spaces.MultiBinary(4), "Mlp", {}),
    "multi-binary matrix": (spaces.MultiBinary([2, 3]), "Mlp", {}),
    "flattened image": (spaces.Box(0, 255, (6, 5, 3), dtype=np.uint8), "Mlp", {}),
    "image": (IMAGE, "Cnn", {}),
    "channels first": (spaces.Box(0, 255, (1, 36, 40), dtype=np.uint8), "Cnn", {}),
    "float image": (spaces.Box(0, 1, (3, 36, 40)), "Cnn", {"normalize_images": False}),
    "dict": (
        spaces.Dict(
            image=IMAGE,
            vector=VECTOR,
            number=spaces.Discrete(3),
            numbers=spaces.MultiDiscrete([2, 3]),
            flags=spaces.MultiBinary(2),
        ),
        "MultiInput",
        {},
    ),
}


def make_choices_certain(model: A3C, space: spaces.Space[Any]) -> None:
    """Make the policy deterministic, with different actions for different observations."""
    env = recording(space, n_envs=20)
    env.seed(0)
    head: Any = model.policy.action_net
    latents: list[th.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    model.predict(env.reset())  # type: ignore[arg-type]
    hook.remove()
    with th.no_grad():
        head.weight.mul_(1e9)
        head.bias.copy_(-head.weight @ latents[0].mean(dim=0))


@pytest.mark.parametrize(("memory", "n_workers"), [("", 0), ("Lstm", 2)])
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_workers_act_as_predict_does(name: str, memory: str, n_workers: int) -> None:
    """With a deterministic policy that does not learn, ``predict`` with its state carried gives each worker's actions."""
    space, prefix, policy_kwargs = OBSERVATIONS[name]
    model = A3C(
        f"{prefix}{memory}Policy",
        recording(space),
        learning_rate=0.0,
        n_steps=5,
        n_workers=n_workers,
        take_turns=True,
        seed=0,
        policy_kwargs=policy_kwargs,
    )
    make_choices_certain(model, space)
    before, seen = copied(model), Seen()
    model.learn(60, seen)
    assert all(th.equal(parameter, before[key]) for key, parameter in model.policy.named_parameters())
    states: defaultdict[int, Any] = defaultdict(lambda: None)
    for _, info in seen.pairs:
        env, start = info["env_index"], np.array([info["is_first"]])
        action, states[env] = model.predict(info["chosen_for"], states[env], start, deterministic=True)
        assert action == info["action"]
    assert len({int(info["action"]) for info in seen.infos}) > 1
    assert len(states) == 4


@pytest.mark.parametrize(("name", "memory"), [*((name, "Lstm") for name in OBSERVATIONS), ("dict", ""), ("image", "")])
def test_every_parameter_learns_from_every_kind_of_observation(name: str, memory: str) -> None:
    space, prefix, policy_kwargs = OBSERVATIONS[name]
    env, seen, seen_by_a2c = recording(space), Seen(), Seen()
    kwargs: dict[str, Any] = dict(n_steps=5, policy_kwargs=policy_kwargs, seed=0)
    model = A3C(f"{prefix}{memory}Policy", env, n_workers=0, **kwargs)
    before = copied(model)
    model.learn(60, seen)
    assert_all_learned(model, before)
    A2C(f"{prefix}Policy", env, **kwargs).learn(1, seen_by_a2c)
    assert [kind(obs) for obs in seen.new_obs] == [kind(seen_by_a2c.new_obs[0])] * len(seen.new_obs)


class Pixels(BaseFeaturesExtractor):
    """Raises unless images are channels-first with values up to ``brightest``."""

    def __init__(self, space: spaces.Box, brightest: float) -> None:
        super().__init__(space, features_dim=3)
        self.brightest = brightest

    def forward(self, images: th.Tensor) -> th.Tensor:
        assert images.dtype == th.float32
        assert images.shape[1:] == (3, 36, 40), images.shape
        assert images.min() >= 0
        assert 0.9 * self.brightest < images.max() <= self.brightest, images.max()
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("space", "normalize_images", "brightest", "policy", "n_workers"),
    [
        (IMAGE, True, 1.0, "MlpLstmPolicy", 2),
        (IMAGE, False, 255.0, "MlpPolicy", 0),
        (spaces.Box(0, 255, (3, 36, 40), dtype=np.uint8), True, 1.0, "MlpLstmPolicy", 0),
        (spaces.Box(0, 8, (3, 36, 40)), False, 8.0, "MlpPolicy", 2),
    ],
)
def test_images_are_channels_first_and_scaled_once(
    space: spaces.Box, normalize_images: bool, brightest: float, policy: str, n_workers: int
) -> None:
    policy_kwargs: dict[str, Any] = dict(
        features_extractor_class=Pixels,
        features_extractor_kwargs=dict(brightest=brightest),
        normalize_images=normalize_images,
    )
    model = A3C(policy, recording(space), n_steps=5, n_workers=n_workers, policy_kwargs=policy_kwargs)
    model.learn(40)  # with terminal observations, at most 7 steps apart
    model.predict(space.sample())
    with pytest.raises(AssertionError):  # the extractor does check
        model.policy.features_extractor(th.zeros(1, 36, 40, 3))


#: Images, whether the policy is to scale them, and a wrapper.
FLOATS, FLOATS_LAST = spaces.Box(0, 1, (3, 36, 40)), spaces.Box(0, 1, (36, 40, 3))
REFUSED_IMAGES: list[Any] = [
    *[
        (FLOATS_LAST, True, None),
        (FLOATS_LAST, False, None),
        (FLOATS, True, None),
        (spaces.Box(0, 8, (36, 40)), False, None),
    ],
    *[(IMAGE, True, VecNormalize), (IMAGE, False, VecNormalize)],
]
TAKEN_IMAGES: list[Any] = [
    *[(FLOATS, False, None, 2), (IMAGE, False, None, 0), (spaces.Box(0, 255, (3, 36, 40), np.uint8), True, None, 0)],
    *[(FLOATS, False, VecNormalize, 0), (IMAGE, False, lambda env: VecNormalize(VecTransposeImage(env)), 2)],
    (IMAGE, True, lambda env: VecNormalize(env, norm_obs=False), 0),
]


@pytest.mark.parametrize(("space", "normalize_images", "wrapper"), REFUSED_IMAGES)
def test_images_that_a2c_refuses(space: spaces.Box, normalize_images: bool, wrapper: Any) -> None:
    errors = []
    for cls, policy in ((A2C, "CnnPolicy"), (A3C, "CnnLstmPolicy")):
        env = recording(space) if wrapper is None else wrapper(recording(space))
        with pytest.raises((AssertionError, RuntimeError)) as raised:
            cls(policy, env, policy_kwargs=dict(normalize_images=normalize_images))
        errors.append(raised.value)
    by_a2c, by_a3c = errors
    assert isinstance(by_a3c, AssertionError)
    if isinstance(by_a2c, AssertionError):
        text = re.sub("(Cnn|Mlp|MultiInput)Policy", r"\1LstmPolicy", str(by_a2c)).replace("NatureCNN", "BabyCNN")
        assert str(by_a3c).startswith(text)
    else:  # of torch: "Kernel size can't be greater than actual input size"
        assert re.search(r"needs channels-first images.* 36 channels of 40x3 pixels\.\n", str(by_a3c))


@pytest.mark.parametrize(("space", "normalize_images", "wrapper", "n_workers"), TAKEN_IMAGES)
def test_images_that_a2c_takes(space: spaces.Box, normalize_images: bool, wrapper: Any, n_workers: int) -> None:
    channels = []
    algorithms: Any = ((A2C, "CnnPolicy", {}), (A3C, "CnnLstmPolicy", {"n_workers": n_workers}))
    for cls, policy, kwargs in algorithms:
        env = recording(space) if wrapper is None else wrapper(recording(space))
        model = cls(policy, env, n_steps=5, policy_kwargs=dict(normalize_images=normalize_images), **kwargs).learn(20)
        channels.append(model.policy.features_extractor.cnn[0].in_channels)
    assert channels == [3, 3]


# --- gSDE, and what A2C refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
@pytest.mark.parametrize("n_workers", [None, 0, 2], ids=["A2C", "0", "2"])
def test_sde_noise_is_resampled_as_in_a2c(n_workers: int | None, sde_sample_freq: int) -> None:
    env, seen = recording(spaces.Box(0.5, 0.5, (3,)), MOVE), Seen()  # always the same observation
    kwargs: dict[str, Any] = dict(n_steps=8, use_sde=True, sde_sample_freq=sde_sample_freq, learning_rate=0.0, seed=0)
    if n_workers is None:
        A2C("MlpPolicy", env, **kwargs).learn(8 * 4 * 3, seen)
    else:
        A3C("MlpPolicy", env, n_workers=n_workers, **kwargs).learn(8 * 4 * 3, seen)
    by_env: defaultdict[int, list[npt.NDArray[Any]]] = defaultdict(list)
    for n, (chosen, info) in enumerate(seen.pairs):
        by_env[info.get("env_index", n % 4)].append(chosen)
    firsts: set[tuple[float, ...]] = set()
    period = 8 if sde_sample_freq == -1 else 4
    for actions in by_env.values():
        blocks = [actions[begin : begin + period] for begin in range(0, len(actions), period)]
        for block in blocks:
            np.testing.assert_array_equal(block, [block[0]] * period)
        firsts |= {tuple(block[0]) for block in blocks}
    assert len(firsts) == len(seen.pairs) // period  # new noise for each block and each environment


@ONE_OF_EACH
@pytest.mark.parametrize("squash", [False, True], ids=["clipped", "squashed"])
def test_sde_actions_are_inside_the_space(squash: bool, policy: str, n_workers: int) -> None:
    policy_kwargs = dict(squash_output=squash, log_std_init=0.5, use_expln=squash, full_std=not squash)
    kwargs: dict[str, Any] = dict(use_sde=True, sde_sample_freq=4, policy_kwargs=policy_kwargs)
    model = A3C(policy, recording(VECTOR, MOVE), n_steps=5, n_workers=n_workers, seed=0, **kwargs)
    for _ in range(2):  # the second time with noise sampled in this process
        before, seen = copied(model), Seen()
        model.learn(200, seen)
        assert_all_learned(model, before)
        assert "log_std" in before
        for chosen, info in seen.pairs:
            expected = (
                MOVE.low + (chosen + 1) / 2 * (MOVE.high - MOVE.low) if squash else np.clip(chosen, MOVE.low, MOVE.high)
            )
            np.testing.assert_allclose(info["action"], expected, rtol=0, atol=1e-6)
        beyond = np.concatenate([np.abs(actions).max(axis=1) for actions in seen.actions]) > 1
        assert beyond.any() != squash
        taken = np.stack([info["action"] for info in seen.infos])
        assert (np.ptp(taken, axis=0) > 1).all()
    actions, _ = model.predict(np.stack([VECTOR.sample() for _ in range(20)]))
    assert all(MOVE.contains(action) for action in actions)


REFUSED: list[Any] = [
    pytest.param(VECTOR, CHOICE, dict(use_sde=True), ValueError, 0, id="sde of discrete actions"),
    pytest.param(VECTOR, spaces.MultiBinary(2), dict(use_sde=True), ValueError, 0, id="sde of flags"),
    pytest.param(VECTOR, MOVE, dict(policy_kwargs=dict(squash_output=True)), AssertionError, 0, id="squash without sde"),
    pytest.param(VECTOR, spaces.Box(-np.inf, np.inf, (2,)), {}, AssertionError, 0, id="unbounded actions"),
    pytest.param(VECTOR, spaces.MultiBinary([2, 3]), {}, AssertionError, 0, id="multi-binary matrix"),
    pytest.param(VECTOR, spaces.Tuple([CHOICE]), {}, AssertionError, 0, id="tuple of actions"),
    pytest.param(VECTOR, spaces.Discrete(1, start=5), {}, ValueError, 2, id="actions from 5"),
    pytest.param(spaces.Dict(a=spaces.Dict(b=VECTOR)), CHOICE, {}, NotImplementedError, 0, id="nested observations"),
    pytest.param(spaces.Discrete(3, start=5), CHOICE, {}, RuntimeError, 2, id="observations from 5"),
]


@pytest.mark.parametrize(("observation_space", "action_space", "kwargs", "error", "n_workers"), REFUSED)
def test_what_a2c_refuses_raises_the_same_error(
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    kwargs: dict[str, Any],
    error: type[Exception],
    n_workers: int,
) -> None:
    with pytest.raises(error) as by_a2c:
        A2C("MlpPolicy", recording(observation_space, action_space), **kwargs).learn(20)
    with pytest.raises(error) as by_a3c:
        A3C("MlpPolicy", recording(observation_space, action_space), n_workers=n_workers, **kwargs).learn(20)
    assert str(by_a3c.value) == str(by_a2c.value)


# --- custom policies --------------------------------------------------------------------------------------------------


class NotZero(ActorCriticPolicy):
    """Never takes action 0."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        logits = self.action_net(latent_pi)
        logits = logits.masked_fill(th.arange(logits.shape[1]) == 0, -1e8)
        return self.action_dist.proba_distribution(action_logits=logits)


class NotZeroLstm(NotZero, MlpLstmPolicy):
    pass


@pytest.mark.parametrize(("policy", "n_workers"), [(NotZero, 0), (NotZeroLstm, 2)])
def test_custom_policy(policy: type[ActorCriticPolicy], n_workers: int) -> None:
    model, seen = A3C(policy, recording(), n_steps=5, n_workers=n_workers, seed=0), Seen()
    before = copied(model)
    model.learn(200, seen)
    assert type(model.policy) is policy
    assert {int(info["action"]) for info in seen.infos} == {1, 2, 3}
    assert_all_learned(model, before)
    assert copied(model)["action_net.bias"][0] == before["action_net.bias"][0]


class Linear(BaseFeaturesExtractor):
    """A frozen layer, and a trainable one."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, features_dim=5)
        self.frozen, self.layer = th.nn.Linear(3, 4), th.nn.Linear(4, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layer(th.tanh(self.frozen(x)))
        return features


@ONE_OF_EACH
def test_custom_extractor_learns_but_not_its_frozen_layer(policy: str, n_workers: int) -> None:
    policy_kwargs = dict(features_extractor_class=Linear)
    model = A3C(policy, recording(), n_steps=5, n_workers=n_workers, policy_kwargs=policy_kwargs)
    before = copied(model)
    model.learn(60)
    unmoved = {name for name, parameter in model.policy.named_parameters() if th.equal(parameter, before[name])}
    assert unmoved == {"features_extractor.frozen.weight", "features_extractor.frozen.bias"}
    assert not any(p.requires_grad for name, p in model.policy.named_parameters() if name in unmoved)


def test_separate_extractors_of_actor_and_critic() -> None:
    policy_kwargs = dict(features_extractor_class=Linear, share_features_extractor=False)
    model = A3C("MlpPolicy", recording(), n_steps=5, n_workers=2, policy_kwargs=policy_kwargs)
    actors, critics = (getattr(model.policy, f"{head}_features_extractor").layer for head in ("pi", "vf"))
    with th.no_grad():
        actors.weight.copy_(critics.weight)
    before = critics.weight.detach().clone()
    model.learn(60)
    assert not th.equal(actors.weight, before)
    assert not th.equal(critics.weight, before)
    assert not th.equal(actors.weight, critics.weight)
    assert model.policy.features_extractor is model.policy.pi_features_extractor


@pytest.mark.parametrize(
    ("policy", "space", "n_workers", "extractor"),
    [("MlpLstmPolicy", VECTOR, 0, None), ("CnnLstmPolicy", IMAGE, 2, dict(features_dim=8))],
)
def test_critic_without_memory_learns(policy: str, space: spaces.Box, n_workers: int, extractor: Any) -> None:
    policy_kwargs = dict(enable_critic_lstm=False, features_extractor_kwargs=extractor, **SMALL_LSTM)
    model = A3C(policy, recording(space), n_steps=5, n_workers=n_workers, policy_kwargs=policy_kwargs)
    before = copied(model)
    assert_all_learned(model.learn(60), before)
    assert {"critic.weight", "critic.bias"} <= before.keys()
    assert "features_extractor.linear.0.weight" in before


# --- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS: list[Any] = [
    pytest.param(th.optim.SGD, dict(momentum=0.9), {"momentum_buffer"}, id="SGD"),
    pytest.param(RMSpropTFLike, dict(eps=1e-5), {"step", "square_avg"}, id="RMSpropTFLike"),
    pytest.param(th.optim.AdamW, {}, {"step", "exp_avg", "exp_avg_sq"}, id="AdamW"),
    pytest.param(th.optim.Adam, dict(foreach=True), {"step", "exp_avg", "exp_avg_sq"}, id="Adam, foreach"),
]


@pytest.mark.parametrize(("optimizer_class", "options", "keys"), OPTIMIZERS)
def test_model_has_the_optimizer_state_after_learn(
    optimizer_class: type[th.optim.Optimizer], options: dict[str, Any], keys: set[str]
) -> None:
    policy_kwargs = dict(optimizer_class=optimizer_class, optimizer_kwargs=options, **SMALL_LSTM)
    kwargs: dict[str, Any] = dict(n_steps=5, envs_per_update=2, take_turns=True, policy_kwargs=policy_kwargs)
    model = A3C("MlpLstmPolicy", recording(), n_workers=2, **kwargs)
    before = copied(model)
    for n in (1, 2):
        model.learn(60, reset_num_timesteps=False)
        assert model._n_updates == n * 6  # chunks of 2 environments, 5 steps each
        optimizer = model.policy.optimizer
        assert type(optimizer) is optimizer_class
        assert options.items() <= optimizer.param_groups[0].items()
        assert list(optimizer.state) == list(model.policy.parameters())
        for state in optimizer.state.values():
            assert {key for key, value in state.items() if value is not None} == keys
            assert float(state.get("step", n * 6)) == n * 6
            assert all(value.abs().max() > 0 for key, value in state.items() if key != "step")
    assert_all_learned(model, before)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_length_of_a_clipped_sgd_step(n_workers: int) -> None:
    model = A3C(
        "MlpLstmPolicy",
        recording(),
        n_steps=5,
        n_workers=n_workers,
        take_turns=True,
        learning_rate=0.5,
        max_grad_norm=0.1,
        envs_per_update=4,
        policy_kwargs=dict(optimizer_class=th.optim.SGD, **SMALL_LSTM),
    )
    before = copied(model)
    model.learn(1 if n_workers == 0 else 11)
    assert model._n_updates == max(1, n_workers)
    steps = th.cat([(p.detach() - before[name]).flatten() for name, p in model.policy.named_parameters()])
    longest = 0.05 * model._n_updates
    assert 0.5 * longest < float(steps.norm()) <= longest * (1 + 1e-4)
    if n_workers == 0:
        assert float(steps.norm()) == pytest.approx(longest, rel=1e-4)


def test_weight_decay_without_gradients() -> None:
    model = A3C(
        "MlpLstmPolicy",
        recording(),
        n_steps=5,
        n_workers=2,
        envs_per_update=2,
        take_turns=True,
        learning_rate=0.1,
        max_grad_norm=0.0,
        policy_kwargs=dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.5), **SMALL_LSTM),
    )
    before = copied(model)
    model.learn(200)
    assert model._n_updates == 20
    for name, parameter in model.policy.named_parameters():
        assert th.allclose(parameter, before[name] * 0.95**20, rtol=1e-5, atol=0), name


# --- layers that differ between acting and learning -------------------------------------------------------------------


class BatchNorm(BaseFeaturesExtractor):
    """Raises unless it is in training mode with gradients, or in evaluation mode without."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, features_dim=3)
        self.layer = th.nn.BatchNorm1d(3)

    def forward(self, x: th.Tensor) -> th.Tensor:
        assert self.training == self.layer.training == th.is_grad_enabled()
        features: th.Tensor = self.layer(x)
        return features


@pytest.mark.parametrize(("policy", "n_workers"), [("MlpPolicy", None), ("MlpPolicy", 2), ("MlpLstmPolicy", 0)])
def test_batch_norm_counts_every_batch_once_as_in_a2c(policy: str, n_workers: int | None, tmp_path: Path) -> None:
    env = recording(spaces.Box(2, 2, (3,)))  # constant observations have known statistics
    policy_kwargs = dict(features_extractor_class=BatchNorm)
    kwargs: dict[str, Any] = dict(n_steps=5, learning_rate=0.0, policy_kwargs=policy_kwargs)
    model: A2C | A3C
    if n_workers is None:
        model = A2C(policy, env, **kwargs).learn(200)
    else:
        model = A3C(policy, env, n_workers=n_workers, take_turns=True, envs_per_update=2, **kwargs).learn(200)
    assert model._n_updates == (10 if n_workers is None else 20)

    model.save(tmp_path / "model")
    for each in (model, type(model).load(tmp_path / "model")):
        norm: Any = each.policy.features_extractor.layer
        assert int(norm.num_batches_tracked) == model._n_updates
        assert norm.running_mean.tolist() == pytest.approx([2 * (1 - 0.9**model._n_updates)] * 3)
        assert norm.running_var.tolist() == pytest.approx([0.9**model._n_updates] * 3)
        each.predict(np.full(3, 2, dtype=np.float32))  # in evaluation mode, which the extractor asserts
        assert int(norm.num_batches_tracked) == model._n_updates
