"""Networks that users change: by normalised weights, by replaced layers and frozen ones, before and while workers run."""

import dataclasses
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from torch.nn.utils import parametrizations

from sb3_a3c import A3C, MlpLstmPolicy
from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.workers.assignment import Assignment
from sb3_a3c.workers.in_process import InProcessWorker
from tests.toy_envs import Countdown

N_STEPS = 5


class Watching(Countdown):
    """Has nothing to choose, so that A2C and A3C see the same."""

    action_space = spaces.Discrete(1)


def make_env(n_envs: int = 1, cls: type[VecEnv] = DummyVecEnv) -> VecEnv:
    return cls([Watching] * n_envs)  # type: ignore[arg-type, call-arg]


class Then(BaseCallback):
    """Calls a function with the model's policy after some timesteps; keeps the parameters at the end of each rollout."""

    def __init__(self, timestep: int, edit: Callable[[Any], object]) -> None:
        super().__init__()
        self.timestep, self.edit = timestep, edit
        self.seen: list[dict[str, th.Tensor]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps == self.timestep:
            self.edit(self.model.policy)
        return True

    def _on_rollout_end(self) -> None:
        self.seen.append(copied(self.model.policy))


def copied(policy: Any) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def changed(old: dict[str, th.Tensor], new: dict[str, th.Tensor]) -> set[str]:
    return {name for name in old if not th.equal(old[name], new[name])}


# --- before workers run -----------------------------------------------------------------------------------------------


class Crossed(MlpExtractor):
    """Its ``forward`` does more than its two halves."""

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        latent_pi, latent_vf = super().forward(features)
        return latent_pi, latent_vf + latent_pi


class CrossedPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Crossed(self.features_dim, [8], th.nn.Tanh)


class CrossedLstmPolicy(MlpLstmPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor = Crossed(self.lstm_hidden_size, [8], th.nn.Tanh)


def normalise(policy: Any) -> None:
    first, second = policy.mlp_extractor.value_net[0], policy.mlp_extractor.value_net[2]
    parametrizations.weight_norm(first)
    parametrizations.spectral_norm(second)
    parametrizations.orthogonal(policy.value_net)


def replace(policy: Any) -> None:
    th.manual_seed(0)
    policy.value_net = th.nn.Sequential(th.nn.Linear(8, 4), th.nn.ReLU(), th.nn.Linear(4, 1))


def hook(policy: Any) -> None:
    policy.value_net.bias.register_hook(lambda gradient: 3 * gradient)


def pair(policy: Any = "MlpPolicy", optimizer_class: Any = th.optim.SGD, n_workers: int = 0) -> tuple[Any, Any]:
    """
    An A2C and an A3C that begin alike and have the same loss: A2C's is the mean over time, with the whole squared error of
    the critic; A3C's the sum, with half of it.
    """
    common: dict[str, Any] = dict(learning_rate=1e-4, n_steps=N_STEPS, gae_lambda=0.9, max_grad_norm=1e9)
    common["policy_kwargs"] = dict(optimizer_class=optimizer_class)
    if policy == "MlpPolicy":
        common["policy_kwargs"]["net_arch"] = [8, 8]
    a2c = A2C(policy, make_env(), vf_coef=0.5 * N_STEPS, **common)
    a3c = A3C(policy, make_env(), vf_coef=1.0, n_workers=n_workers, **common)
    a3c.policy.load_state_dict(a2c.policy.state_dict())
    return a2c, a3c


def assert_alike(a2c: Any, a3c: Any) -> None:
    expected, actual = copied(a2c.policy), copied(a3c.policy)
    assert list(expected) == list(actual)
    for name, value in expected.items():
        assert th.allclose(actual[name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize(
    ("policy", "edit"),
    [("MlpPolicy", normalise), ("MlpPolicy", replace), ("MlpPolicy", hook), (CrossedPolicy, lambda policy: None)],
    ids=["normalised", "replaced", "hook", "crossed"],
)
def test_a_changed_network_learns_as_in_a2c(policy: Any, edit: Callable[[Any], None], n_workers: int) -> None:
    models = pair(policy, n_workers=n_workers)
    for model in models:
        th.manual_seed(1)  # some changes begin with random numbers
        edit(model.policy)
        model.policy.optimizer = th.optim.SGD(model.policy.parameters())
        before = copied(model.policy)
        model.learn(20 * N_STEPS)
        critic = {f"value_net.{name}" for name, _ in model.policy.value_net.named_parameters()}
        assert changed(before, copied(model.policy)) >= critic
    assert_alike(*models)


@pytest.mark.parametrize("policy", [CrossedPolicy, CrossedLstmPolicy])
def test_workers_act_by_the_whole_extractor(policy: Any) -> None:
    model: Any = A3C(policy, make_env(), n_workers=0)
    recurrent, obs, starts = as_recurrent(model.policy), th.full((3, 1), 0.5), th.ones(3, dtype=th.bool)
    state, halves = recurrent.initial_state(3), model.policy.mlp_extractor.forward_critic
    with th.no_grad():
        _, values, _ = recurrent.act(obs, state, starts)
        evaluated, *_ = recurrent.evaluate_actions(obs, th.zeros(3), state, starts[None])
        forwarded = model.policy(obs, *([state, starts] if state else []))[1]
        cache = recurrent.new_activation_cache(1, [slice(0, 3)])
        cached = recurrent.act(obs, state, starts, cache)[1]
        model.policy.mlp_extractor.forward = lambda features: (halves(features), halves(features))
        without = recurrent.act(obs, state, starts)[1]
    for other in (evaluated, forwarded, cached):
        assert th.allclose(values, other, atol=1e-6)
    assert not th.allclose(values, without, atol=1e-4)


def with_an_unknown_parameter(policy: Any) -> None:
    policy.value_net = th.nn.Linear(64, 1)


def with_another_optimizer(policy: Any) -> None:
    policy.optimizer = th.optim.SGD(policy.parameters())


def with_a_foreign_parameter(policy: Any) -> None:
    policy.optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(3))]})


def with_a_lock(policy: Any) -> None:
    policy.lock = threading.Lock()


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_an_unknown_parameter, "optimizer does not know `value_net.weight`, `value_net.bias`, which would never be"),
        (with_a_foreign_parameter, r"optimizer has 1 parameter\(s\) that are not among `model.policy.parameters\(\)`"),
        (lambda policy: policy.requires_grad_(False), "All parameters of the policy are frozen"),
        (with_a_lock, "can't be copied for workers: .*thread.lock"),
    ],
)
def test_what_can_not_be_trained_raises_before_workers_start(
    edit: Callable[[Any], object], message: str, n_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = A3C("MlpPolicy", make_env(2), n_workers=n_workers)
    edit(model.policy)
    monkeypatch.setattr(Supervisor, "start", lambda self: pytest.fail("a process started"))
    monkeypatch.setattr(InProcessWorker, "wait", lambda self, timeout=None: pytest.fail("a rollout was made"))
    with pytest.raises(ValueError, match=message):
        model.learn(100)


@pytest.mark.parametrize("optimizer_kwargs", [{}, {"amsgrad": True}])
def test_what_the_errors_say_helps(optimizer_kwargs: dict[str, Any]) -> None:
    model = A3C("MlpPolicy", make_env(), n_workers=0, policy_kwargs=dict(optimizer_kwargs=optimizer_kwargs))
    with_an_unknown_parameter(model.policy)
    with pytest.raises(ValueError, match="make a new optimizer") as raised:
        model.learn(20)
    new_optimizer, freeze = [code for code in str(raised.value).split("`")[1::2] if code.startswith(("policy", "model"))]
    frozen = A3C("MlpPolicy", make_env(), n_workers=0)
    frozen.policy.extra = th.nn.Linear(2, 2)
    frozen.policy.extra.bias.requires_grad_(False)
    exec(freeze.replace("value_net", "extra"), {"model": frozen})
    frozen.learn(20)
    before = copied(model.policy)
    exec(new_optimizer, {"model": model})
    model.learn(20)
    assert changed(before, copied(model.policy)) >= {"value_net.weight", "value_net.bias"}
    assert model.policy.optimizer.param_groups[0]["amsgrad"] == bool(optimizer_kwargs)


def test_parameter_groups_and_parameters_that_the_optimizer_does_not_know_are_fine_if_frozen() -> None:
    model = A3C("MlpPolicy", make_env(), n_workers=0)
    policy = model.policy
    policy.mlp_extractor.requires_grad_(False)
    policy.optimizer = th.optim.SGD([{"params": policy.value_net.parameters()}, {"params": policy.action_net.parameters()}])
    before = copied(policy)
    model.learn(20)
    assert changed(before, copied(policy)) == {"value_net.weight", "value_net.bias"}


# --- while workers run ------------------------------------------------------------------------------------------------

EXTRACTOR = {f"mlp_extractor.value_net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def freeze(policy: Any) -> None:
    policy.mlp_extractor.value_net.requires_grad_(False)


def unfreeze(policy: Any) -> None:
    policy.mlp_extractor.value_net.requires_grad_(True)


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, th.optim.Adam])
@pytest.mark.parametrize(("first", "then"), [(unfreeze, freeze), (freeze, unfreeze)])
def test_a_callback_freezes_as_in_a2c(first: Any, then: Any, optimizer_class: Any) -> None:
    a2c, a3c = pair(optimizer_class=optimizer_class)
    # in A2C a rollout's own callbacks count, as it learns after them; here the next one begins with what they changed
    for model, timestep in ((a2c, 11 * N_STEPS), (a3c, 10 * N_STEPS)):
        first(model.policy)
        before = copied(model.policy)
        callback = Then(timestep, then)
        model.learn(20 * N_STEPS, callback)
        moved = [bool(EXTRACTOR & changed(old, new)) for old, new in itertools.pairwise([before, *callback.seen])]
        assert (moved[1], moved[-1]) == ((True, False) if then is freeze else (False, True))
    assert_alike(a2c, a3c)
    steps = [
        {name: float(model.policy.optimizer.state[p].get("step", 0)) for name, p in model.policy.named_parameters()}
        for model in (a2c, a3c)
    ]
    assert steps[0] == steps[1]
    if optimizer_class is th.optim.Adam:
        assert steps[1]["value_net.bias"] == 20 and {steps[1][name] for name in EXTRACTOR} == {10}


@pytest.mark.parametrize("env_class", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(("first", "then"), [(unfreeze, freeze), (freeze, unfreeze)])
def test_workers_follow_a_callback_that_freezes(first: Any, then: Any, env_class: Any) -> None:
    env = make_env(2, env_class)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=2, policy_kwargs=dict(net_arch=[8, 8]))
    first(model.policy)
    callback = Then(100, then)
    model.learn(600, callback)
    env.close()
    # in between are the rollouts that the workers are ahead of the callbacks
    for begin, end, learns in ((0, 8, then is freeze), (30, 59, then is unfreeze)):
        moved = changed(callback.seen[begin], callback.seen[end])
        assert "value_net.bias" in moved and moved & EXTRACTOR == (EXTRACTOR if learns else set())
        if not learns:
            assert not any(EXTRACTOR & changed(callback.seen[begin], between) for between in callback.seen[begin:end])
    n_steps = {float(model.policy.optimizer.state[p]["step"]) for p in model.policy.mlp_extractor.value_net.parameters()}
    assert n_steps and max(n_steps) < float(model.policy.optimizer.state[model.policy.value_net.bias]["step"])


def test_a_worker_in_the_place_of_a_dead_one_has_the_frozen_parameters_of_now() -> None:
    model = A3C("MlpPolicy", make_env(2), n_workers=0, n_steps=N_STEPS, policy_kwargs=dict(net_arch=[8, 8]))
    config = Assignment(model.env, model.policy, model._hyperparams(), 0, 0, [None] * 2, [{}] * 2).configs[0]  # type: ignore[arg-type]
    freeze(model.policy)
    before, store = copied(model.policy), SharedMemoryStore(model.policy, 1, share_memory=False)
    config = dataclasses.replace(config, hyperparams=model._hyperparams())  # as ``Assignment.renew`` does
    learner = ActorLearner(config, model.env, store, lambda: False)  # type: ignore[arg-type]
    learner.rollout(learning_rate=1e-3)
    store.fetch_policy(model.policy)
    learner.close()
    assert changed(before, copied(model.policy)) >= {"value_net.weight", "value_net.bias"}
    assert not EXTRACTOR & changed(before, copied(model.policy))


def spoil(policy: Any) -> None:
    with th.no_grad():
        policy.mlp_extractor.value_net[0].bias.fill_(np.nan)
    unfreeze(policy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_an_unknown_parameter, "were replaced while workers run.*`learn`"),
        (with_another_optimizer, "optimizer of the policy were replaced while workers run.*`learn`"),
        (lambda policy: policy.requires_grad_(False), "All parameters of the policy are frozen"),
        (spoil, "`mlp_extractor.value_net.0.bias` is NaN"),
        (lambda policy: policy.optimizer.param_groups[0].update(weight_decay=0.1), "Options of the policy's optimizer were"),
        (lambda policy: policy.extra.requires_grad_(), "does not know `extra.weight`, `extra.bias`"),
    ],
)
def test_a_callback_that_makes_a_policy_that_can_not_be_trained(edit: Any, message: str) -> None:
    model = A3C("MlpPolicy", make_env(2), n_workers=2, n_steps=N_STEPS)
    model.policy.extra = th.nn.Linear(2, 2).requires_grad_(False)
    freeze(model.policy)
    with pytest.raises(ValueError, match=message):
        model.learn(1000, Then(40, edit))
    assert not multiprocessing.active_children()


def test_hooks_of_the_optimizers_step_are_refused() -> None:
    model = A3C("MlpPolicy", make_env(2), n_workers=2, n_steps=N_STEPS)
    hook = model.policy.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks of `step`.*Override `step`"):
        model.learn(100)
    hook.remove()
    assert model.learn(100).num_timesteps >= 100
