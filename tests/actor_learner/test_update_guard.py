"""Numbers that are none: what they would spoil is dropped, to the bit; all else goes on; and the user hears why."""

import functools
import math
import threading
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecNormalize

from sb3_a3c import A3C, DivergenceError, MlpLstmPolicy, MlpPolicy
from sb3_a3c.actor_learner.report import RolloutStatistics
from sb3_a3c.actor_learner.update_guard import DroppedUpdateError, Fault, UpdateGuard
from sb3_a3c.envs.non_finite import zero_non_finite
from sb3_a3c.store import replica as replica_module
from sb3_a3c.store.finite import all_finite
from sb3_a3c.store.shared_memory import SharedMemoryStore

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
TOLD = pytest.mark.filterwarnings("ignore:An update was dropped")


class Faulty(gym.Env[Any, Any]):
    """Counts to ten. Observations or rewards are bad while its attribute ``where`` says so, or at one step only."""

    action_space: spaces.Space[Any] = spaces.Discrete(3)
    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    render_mode = None

    def __init__(self, where: str = "", bad: float = math.nan, at: int | None = None) -> None:
        self.where, self.bad, self.at = where, bad, at
        self.n_steps = self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t = 0
        return self.observation(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        self.n_steps += 1
        obs = self.observation()
        if self.t == 10 and self.is_bad("terminal observation"):
            obs[1] = self.bad
        return obs, self.bad if self.is_bad("reward") else 1.0, False, self.t == 10, {}

    def observation(self) -> Any:
        return np.array([self.t, self.bad if self.is_bad("observation") else 1.0], dtype=np.float32)

    def is_bad(self, where: str) -> bool:
        return where == self.where and self.at in (None, self.n_steps)


class Continuous(Faulty):
    action_space = spaces.Box(-1, 1, (2,), np.float32)


class Nested(Faulty):
    observation_space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-np.inf, np.inf, (2,), np.float32))

    def observation(self) -> Any:
        return {"a": self.t % 3, "b": super().observation()}


class _Times(th.autograd.Function):
    """Lets numbers pass, and multiplies their gradient."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, factor: float) -> th.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> Any:
        return gradient * ctx.factor, None


class Extractor(BaseFeaturesExtractor):
    """Its gradient can be spoiled."""

    factor = 1.0

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, features_dim=2)
        self.linear = th.nn.Linear(2, 2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        features: th.Tensor = _Times.apply(self.linear(x), self.factor)  # type: ignore[no-untyped-call]
        return features


class WithOddLoss(MlpPolicy):
    """The loss can be spoiled, its gradient stays finite."""

    added = 0.0

    def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = super().evaluate_actions(*args, **kwargs)
        return values, log_prob, None if entropy is None else entropy + self.added


def envs(make: Any = Faulty, n_envs: int = 4, *args: Any) -> VecEnv:
    return DummyVecEnv([functools.partial(make, *args)] * n_envs)


def weights(model: A3C) -> dict[str, th.Tensor]:
    """As they are now."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def numbers(model: A3C) -> dict[str, th.Tensor]:
    """All that was learned, as it is now."""
    policy = model.policy
    moments = {
        f"{name} {key}": value.clone()
        for name, parameter in policy.named_parameters()
        for key, value in policy.optimizer.state[parameter].items()
    }
    return {**weights(model), **moments}


def learn(model: A3C, total_timesteps: int) -> int:
    """:return: how many updates were dropped"""
    skipped: list[int] = []

    def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
        skipped.append(local["self"]._collector.statistics.skipped_updates)
        return True

    model.learn(total_timesteps, callback=note)
    return skipped[-1]


def same_bits(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


CASES: list[Any] = [
    ("reward", "MlpLstmPolicy", Faulty),
    ("observation", "MlpLstmPolicy", Faulty),
    ("observation", "MlpPolicy", Continuous),
]
CASES += [
    ("observation", "MultiInputLstmPolicy", Nested),
    ("gradient", "MlpLstmPolicy", Faulty),
    ("loss", WithOddLoss, Faulty),
]


@TOLD
@BAD
@pytest.mark.parametrize(("where", "policy", "make"), CASES)
def test_a_dropped_update_changes_no_bit(where: str, policy: Any, make: Any, bad: float) -> None:
    check_dropped_updates(where, policy, make, bad, n_workers=0)


@TOLD
@pytest.mark.parametrize(("where", "policy", "make"), CASES)
def test_a_dropped_update_of_worker_processes_changes_no_bit(where: str, policy: Any, make: Any) -> None:
    check_dropped_updates(where, policy, make, math.nan, n_workers=2)


def check_dropped_updates(where: str, policy: Any, make: Any, bad: float, n_workers: int) -> None:
    kwargs = dict(features_extractor_class=Extractor) if make is not Nested else {}
    model = A3C(policy, envs(make), n_steps=5, n_workers=n_workers, envs_per_update=2, policy_kwargs=kwargs, seed=1)
    model.learn(200)  # moments that are not zero
    before, n_updates, learned = numbers(model), model._n_updates, any(numbers(model)["value_net.bias exp_avg"])
    assert learned
    assert model.env is not None
    if where == "gradient":
        model.policy.features_extractor.factor = bad  # type: ignore[assignment]
    elif where == "loss":
        model.policy.added = bad  # type: ignore[assignment]
    else:
        model.env.set_attr("bad", bad)
        model.env.set_attr("where", where)
    n_skipped = learn(model, 200)
    assert same_bits(numbers(model), before)
    assert model._n_updates == n_updates
    assert n_skipped == 20
    assert model.num_timesteps == 200


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("where", ["reward", "observation"])
def test_all_else_goes_on_and_it_is_said_once(where: str, n_workers: int) -> None:
    env = DummyVecEnv([lambda: Faulty(where, at=None), Faulty, Faulty, Faulty])
    model = A3C("MlpLstmPolicy", env, n_steps=5, n_workers=n_workers, envs_per_update=1, seed=1)
    with pytest.warns(UserWarning, match=rf"^An update was dropped, as an? {where} was NaN or infinite") as warned:
        n_skipped = learn(model, 400)
    assert len(warned) == 1
    assert model.num_timesteps == 400
    if n_workers == 0:
        assert model._n_updates == 60  # 80, and every fourth was dropped
    else:
        assert 0 < model._n_updates < 80
        assert model._n_updates + n_skipped == 80
    assert all_finite(model.policy.parameters())


@TOLD
@pytest.mark.parametrize(("at", "n_updates"), [(7, 19), (15, 18)])
def test_one_bad_observation_spoils_the_rollouts_that_it_is_in_and_not_the_memory(at: int, n_updates: int) -> None:
    """The one after the last step is in two: its value is the bootstrap of the first, and the second begins with it."""
    env = envs(Faulty, 1, "observation", math.nan, at)
    model = A3C("MlpLstmPolicy", env, n_steps=5, n_workers=0, seed=1)
    model.learn(100)
    assert model._n_updates == n_updates


@TOLD
@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize(
    ("where", "advice"), [("observation", "VecCheckNan"), ("reward", "VecCheckNan"), ("gradient", "learning_rate")]
)
def test_100_in_a_row_end_the_training(where: str, advice: str, n_workers: int) -> None:
    model = A3C("MlpPolicy", envs(), n_steps=5, n_workers=n_workers, policy_kwargs=dict(features_extractor_class=Extractor))
    assert model.env is not None
    model.env.set_attr("where", where)
    model.policy.features_extractor.factor = math.nan if where == "gradient" else 1.0  # type: ignore[assignment]
    before = weights(model)
    with pytest.raises(
        DivergenceError, match=rf"^100 updates in a row were dropped, the last because .*{where} was.*{advice}"
    ):
        model.learn(10_000)
    assert same_bits(weights(model), before)
    assert model.num_timesteps in range(99 * 20 - 100, 99 * 20 + 1)


def test_a_passed_update_begins_the_count_anew() -> None:
    policy = A3C("MlpPolicy", "CartPole-v1", n_workers=0).policy
    guard, statistics = UpdateGuard(SharedMemoryStore(policy, 1).replica(policy, 0)), RolloutStatistics()
    for _ in range(3):
        for _ in range(99):
            with guard.dropping(statistics):
                raise DroppedUpdateError(Fault.REWARD)
        with guard.dropping(statistics):
            pass
    assert statistics.skipped_updates == 3 * 99


@TOLD
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("use_rms_prop", [False, True])
def test_a_step_to_infinity_is_undone(use_rms_prop: bool, n_workers: int) -> None:
    """A learning rate that suddenly is infinite: nothing of what it does to any parameter stays."""
    model = A3C("MlpLstmPolicy", envs(), learning_rate=1e-3, n_steps=5, n_workers=n_workers, use_rms_prop=use_rms_prop)
    model.learn(200)
    before = weights(model)
    model.learning_rate = lambda progress_remaining: 0.0 if progress_remaining > 0.9 else math.inf
    model._setup_lr_schedule()
    with pytest.raises(DivergenceError, match=r"parameters.* would have become NaN or infinite.*`learning_rate`.*`eps`"):
        model.learn(10_000)
    assert same_bits(weights(model), before)


def test_outputs_that_overflow_are_explained() -> None:
    for make in (Faulty, Continuous):
        model = A3C("MlpPolicy", envs(make), n_workers=0, seed=1)
        policy: Any = model.policy
        with th.no_grad():
            policy.action_net.weight.fill_(3e38)
            policy.mlp_extractor.policy_net[0].bias.fill_(10.0)
        with pytest.raises(DivergenceError, match=r"outputs were NaN or infinite.*too large.*`learning_rate`"):
            model.learn(100)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_parameters_that_are_not_finite_are_refused(n_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = A3C("MlpPolicy", envs(), n_workers=n_workers)
    good = model.get_parameters()
    bad = {**good, "policy": {name: value.clone() for name, value in good["policy"].items()}}
    bad["policy"]["value_net.bias"].fill_(math.nan)

    def set_bad(*_: Any) -> bool:
        model.set_parameters(bad)
        return True

    with pytest.raises(ValueError, match=r"parameter `value_net.bias` is NaN or infinite.*checkpoint"):
        model.learn(100, callback=set_bad)
    assert all_finite(model.policy.parameters())
    monkeypatch.setattr("sb3_a3c.processes.supervisor.Supervisor.start", None)
    model.set_parameters(bad)
    with pytest.raises(ValueError, match=r"parameter `value_net.bias` is NaN or infinite.*checkpoint"):
        model.learn(100)


@TOLD
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["observation", "reward", "terminal observation"])
def test_vec_normalize_neither_hides_bad_numbers_nor_keeps_them(where: str, bad: float, n_workers: int) -> None:
    """One environment of four is always bad; SB3 alone would clip its infinities, and keep a NaN for ever."""
    env = VecNormalize(DummyVecEnv([functools.partial(Faulty, where, bad), Faulty, Faulty, Faulty]))
    model = A3C("MlpPolicy", env, n_steps=5, n_workers=n_workers, envs_per_update=1, seed=1)
    n_dropped = learn(model, 400)
    assert n_dropped > 0 and model._n_updates + n_dropped == 80
    if n_workers == 0:  # of 20 rollouts of the bad one, every other ends with the end of an episode
        assert n_dropped == (10 if where == "terminal observation" else 20)
    obs_rms: Any = env.obs_rms
    assert obs_rms.count == pytest.approx(404, abs=24)
    assert obs_rms.mean.tolist() == pytest.approx([4.5, 0.75 if where == "observation" else 1.0], abs=0.5)
    assert np.isfinite(env.ret_rms.mean) and 0 < env.ret_rms.var < 100
    assert env.ret_rms.count == pytest.approx(400, abs=24)
    assert "step_wait" not in vars(env.venv) and "reset" not in vars(env.venv)


@TOLD
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_last_observation_is_no_bootstrap(bad: float, policy: str) -> None:
    model = A3C(policy, envs(Faulty, 1, "terminal observation", bad), n_steps=5, n_workers=0)
    model.learn(100)
    assert model._n_updates == 10


def test_a_reset_that_raises_leaves_the_environments_as_they_were() -> None:
    class Broken(Faulty):
        def reset(self, **kwargs: Any) -> Any:
            raise NotADirectoryError

    env = VecNormalize(envs(Broken))
    with pytest.raises(NotADirectoryError):
        A3C("MlpPolicy", env, n_workers=0).learn(100)
    assert "step_wait" not in vars(env.venv) and "reset" not in vars(env.venv)


def test_vec_check_nan_outside_of_vec_normalize_sees_all() -> None:
    env = VecCheckNan(VecNormalize(envs(Faulty, 4, "reward", math.nan, 5)), raise_exception=True)
    with pytest.raises(ValueError, match="found nan in rewards"):
        A3C("MlpPolicy", env, n_steps=5, n_workers=0).learn(400)


# --- the parts ------------------------------------------------------------------------------------------------------


def test_zeros_are_put_where_there_is_no_number() -> None:
    obs = np.array([[1.0, 2.0], [math.nan, 3.0], [4.0, -math.inf], [1e39, 5.0]])
    nested = {"a": obs[:2].copy(), "b": np.full((2, 3, 3), 255, dtype=np.uint8), "c": obs[2:].copy()}
    assert zero_non_finite(obs).tolist() == [False, True, True, True]
    assert obs.tolist() == [[1, 2], [0, 3], [4, 0], [0, 5]]
    assert zero_non_finite(nested).tolist() == [True, True]
    assert nested["c"].tolist() == [[4, 0], [0, 5]]
    assert (nested["b"] == 255).all()
    assert zero_non_finite(nested).tolist() == [False, False]


def make_policy(**kwargs: Any) -> ActorCriticPolicy:
    return MlpLstmPolicy(
        spaces.Box(-1, 1, (2,)), spaces.Discrete(2), lambda _: 1e-2, lstm_hidden_size=4, net_arch=[], **kwargs
    )


def set_gradients(policy: ActorCriticPolicy, value: float) -> None:
    for parameter in policy.parameters():
        parameter.grad = th.full_like(parameter, value)


def test_an_epsilon_of_zero_spoils_only_parameters_without_gradient_and_these_stay() -> None:
    policy = make_policy(optimizer_kwargs=dict(eps=0.0))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    before = [p.detach().clone() for p in policy.parameters()]
    set_gradients(policy, 1.0)
    next(iter(policy.parameters())).grad = th.zeros_like(next(iter(policy.parameters())))
    assert replica.push() is None
    assert store.n_updates == 0
    replica.pull()
    moved = [not th.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True)]
    assert moved == [False, *[True] * (len(before) - 1)]
    set_gradients(policy, 1.0)
    assert replica.push() == 0


def test_moments_that_met_a_bad_parameter_are_mended() -> None:
    policy = make_policy(optimizer_kwargs=dict(weight_decay=0.1))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    name, parameter = next(iter(policy.named_parameters()))
    replica._shared_of[parameter].data[0, 0] = math.nan  # as if another worker's step had been here
    set_gradients(policy, 1.0)
    assert replica.push() is None
    replica.pull()
    set_gradients(policy, 1.0)
    assert replica.push() == 0
    assert all(all_finite([value]) for state in replica.optimizer.state.values() for value in state.values()), name


def test_buffers_that_overflow_are_not_shared_but_masks_may_be_infinite() -> None:
    policy = make_policy()
    policy.register_buffer("mask", th.tensor([0.0, -math.inf]))
    policy.register_buffer("running_mean", th.zeros(2))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    set_gradients(policy, 1.0)
    assert replica.push() == 0
    buffer: Any = policy.running_mean
    buffer.fill_(math.inf)
    set_gradients(policy, 1.0)
    assert replica.push() is None
    replica.discard()
    assert buffer.tolist() == [0.0, 0.0]
    assert all(parameter.grad is None for parameter in policy.parameters())
    set_gradients(policy, 1.0)
    assert replica.push() == 0


def test_who_pulls_while_a_step_is_being_mended_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, private = make_policy(), make_policy()
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    shared_parameter = next(iter(replica._shared_of.values())).data
    good, theirs = shared_parameter.clone(), next(iter(private.parameters())).detach().clone()
    shared_parameter[1:].fill_(math.nan)
    store.fetch_policy(private)  # never waits: where there is no number, there stays the last one
    fetched = next(iter(private.parameters()))
    assert th.equal(fetched[:1], good[:1]) and th.equal(fetched[1:], theirs[1:])

    def mend() -> None:
        time.sleep(0.05)
        shared_parameter.copy_(good)

    thread = threading.Thread(target=mend)
    thread.start()
    replica.pull()
    thread.join()
    assert th.equal(next(iter(policy.parameters())), good)
    monkeypatch.setattr(replica_module, "MAX_COPIES", 3)
    shared_parameter.fill_(math.inf)
    with pytest.raises(DivergenceError, match="shared parameters are NaN or infinite"):
        replica.pull()
