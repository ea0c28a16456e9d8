"""Updates with NaN or infinite numbers are dropped without changing a bit, training continues, and the user is told why."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecNormalize

from sb3_a3c import A3C, DivergenceError, MlpPolicy, a3c
from sb3_a3c.actor_learner.report import RolloutStatistics
from sb3_a3c.actor_learner.update_guard import DroppedUpdateError, Fault, UpdateGuard
from sb3_a3c.store.finite import all_finite
from sb3_a3c.store.shared_memory import SharedMemoryStore
from tests.toy_envs import Countdown

WARNED = pytest.mark.filterwarnings("ignore:An update was dropped")


class Faulty(Countdown):
    """Observations or rewards are bad while its attribute ``where`` names them; with ``at`` only after that many steps."""

    action_space: spaces.Space[Any] = spaces.Discrete(3)
    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, where: str = "", bad: float = math.nan, at: int | None = None) -> None:
        super().__init__()
        self.where, self.bad, self.at = where, bad, at

    def observation(self) -> Any:
        is_bad = self.is_bad("observation") or (self.t == 10 and self.is_bad("terminal observation"))
        return np.array([self.t, self.bad if is_bad else 1.0], dtype=np.float32)

    def reward(self) -> float:
        return self.bad if self.is_bad("reward") else 1.0

    def is_bad(self, where: str) -> bool:
        return where == self.where and self.at in (None, self.n_steps)


class Continuous(Faulty):
    action_space = spaces.Box(-1, 1, (2,), np.float32)


class Nested(Faulty):
    observation_space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-np.inf, np.inf, (2,), np.float32))

    def observation(self) -> Any:
        return {"a": self.t % 3, "b": super().observation()}


class Spoilable(MlpPolicy):
    """Multiplies its gradient by ``factor``; adds ``added`` to the loss, whose gradient stays finite."""

    factor, added = 1.0, 0.0

    def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = super().evaluate_actions(*args, **kwargs)
        values.register_hook(lambda gradient: gradient * self.factor)  # type: ignore[no-untyped-call]
        return values, log_prob, None if entropy is None else entropy + self.added


def envs(make: Any = Faulty, n_envs: int = 4, *args: Any) -> VecEnv:
    return DummyVecEnv([functools.partial(make, *args)] * n_envs)


def weights(model: A3C) -> dict[str, th.Tensor]:
    """Parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def parameters(model: A3C) -> dict[str, th.Tensor]:
    return {name: value.detach().clone() for name, value in model.policy.named_parameters()}


def learned_numbers(model: A3C) -> dict[str, th.Tensor]:
    """Parameters, buffers and moments, copied."""
    policy = model.policy
    moments = {
        f"{name} {key}": value.clone()
        for name, parameter in policy.named_parameters()
        for key, value in policy.optimizer.state[parameter].items()
    }
    return {**weights(model), **moments}


def learn(model: A3C, total_timesteps: int) -> int:
    """Number of updates that were dropped."""
    skipped: list[int] = []

    def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
        skipped.append(local["self"]._collector.statistics.skipped_updates)
        return True

    model.learn(total_timesteps, callback=note)
    return skipped[-1]


def same_bits(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


@WARNED
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize(
    ("where", "bad", "policy", "make"),
    [
        ("reward", math.nan, "MlpLstmPolicy", Faulty),
        ("observation", -math.inf, "MlpLstmPolicy", Faulty),
        ("observation", math.nan, "MlpPolicy", Continuous),
        ("observation", math.nan, "MultiInputLstmPolicy", Nested),
        ("factor", math.inf, Spoilable, Faulty),
        ("added", math.nan, Spoilable, Faulty),
    ],
)
def test_a_dropped_update_changes_no_bit(where: str, bad: float, policy: Any, make: Any, n_workers: int) -> None:
    model = A3C(policy, envs(make), n_steps=5, n_workers=n_workers, envs_per_update=2, seed=1)
    model.learn(200)
    before, n_updates = learned_numbers(model), model._n_updates
    assert any(before["value_net.bias exp_avg"])
    assert model.env is not None
    if policy is Spoilable:
        setattr(model.policy, where, bad)
    else:
        model.env.set_attr("bad", bad)
        model.env.set_attr("where", where)
    n_skipped = learn(model, 200)
    assert same_bits(learned_numbers(model), before)
    assert model._n_updates == n_updates
    assert n_skipped == 20
    assert model.num_timesteps == 200


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("where", ["reward", "observation"])
def test_other_updates_are_made_and_one_warning_is_issued(where: str, n_workers: int) -> None:
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


@WARNED
@pytest.mark.parametrize(("at", "n_updates"), [(7, 19), (15, 18)])
def test_one_bad_observation_spoils_its_rollouts_and_not_the_recurrent_state(at: int, n_updates: int) -> None:
    """The one after the last step is in two rollouts: the first is bootstrapped from it, the second begins with it."""
    env = envs(Faulty, 1, "observation", math.nan, at)
    model = A3C("MlpLstmPolicy", env, n_steps=5, n_workers=0, seed=1)
    model.learn(100)
    assert model._n_updates == n_updates


@WARNED
@pytest.mark.parametrize(
    ("where", "advice", "n_workers"),
    [("observation", "VecCheckNan", 0), ("reward", "VecCheckNan", 1), ("gradient", "learning_rate", 0)],
)
def test_100_dropped_updates_in_a_row_end_the_training(where: str, advice: str, n_workers: int) -> None:
    model = A3C(Spoilable, envs(), n_steps=5, n_workers=n_workers)
    assert model.env is not None
    model.env.set_attr("where", where)
    model.policy.factor = math.nan if where == "gradient" else 1.0  # type: ignore[assignment]
    before = weights(model)
    with pytest.raises(
        DivergenceError, match=rf"^100 updates in a row were dropped, the last because .*{where} was.*{advice}"
    ):
        model.learn(10_000)
    assert same_bits(weights(model), before)
    assert model.num_timesteps in range(99 * 20 - 100, 99 * 20 + 1)


def test_an_update_that_is_made_resets_the_count() -> None:
    policy = A3C("MlpPolicy", "CartPole-v1", n_workers=0).policy
    guard, statistics = UpdateGuard(SharedMemoryStore(policy, 1).replica(policy, 0)), RolloutStatistics()
    for _ in range(3):
        for _ in range(99):
            with guard.dropping(statistics):
                raise DroppedUpdateError(Fault.REWARD)
        with guard.dropping(statistics):
            pass
    assert statistics.skipped_updates == 3 * 99


@WARNED
@pytest.mark.parametrize(("use_rms_prop", "n_workers"), [(False, 0), (True, 0), (False, 2)])
def test_a_step_to_infinity_is_undone(use_rms_prop: bool, n_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate becomes infinite; no parameter changes."""
    kwargs: dict[str, Any] = dict(use_rms_prop=use_rms_prop, policy_kwargs=dict(lstm_hidden_size=8))
    model = A3C("MlpLstmPolicy", envs(), learning_rate=1e-3, n_steps=5, n_workers=n_workers, **kwargs)
    model.learn(200)
    before = parameters(model)
    # no schedule may return it, but a step of a finite one can overflow, too
    monkeypatch.setattr(a3c, "check_rate", lambda name, schedule, progress: 0.0 if progress > 0.9 else math.inf)
    with pytest.raises(DivergenceError, match=r"parameters.* would have become NaN or infinite.*`learning_rate`.*`eps`"):
        model.learn(10_000)
    assert same_bits(parameters(model), before)


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
    monkeypatch.setattr("sb3_a3c.processes.supervisor.Supervisor.start", None)  # no worker is started
    model.set_parameters(bad)
    with pytest.raises(ValueError, match=r"parameter `value_net.bias` is NaN or infinite.*checkpoint"):
        model.learn(100)


@WARNED
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize(
    ("where", "bad"), [("observation", math.inf), ("reward", math.nan), ("terminal observation", math.nan)]
)
def test_vec_normalize_neither_hides_bad_numbers_nor_keeps_them(where: str, bad: float, n_workers: int) -> None:
    """One environment of four is always bad; SB3 alone would clip infinities, and keep NaN in its statistics."""
    env = VecNormalize(DummyVecEnv([functools.partial(Faulty, where, bad), Faulty, Faulty, Faulty]))
    model = A3C("MlpPolicy", env, n_steps=5, n_workers=n_workers, envs_per_update=1, seed=1)
    n_dropped = learn(model, 400)
    assert n_dropped > 0 and model._n_updates + n_dropped == 80
    if n_workers == 0:  # every second of the bad environment's 20 rollouts ends an episode
        assert n_dropped == (10 if where == "terminal observation" else 20)
    obs_rms: Any = env.obs_rms
    assert obs_rms.count == pytest.approx(404, abs=24)
    assert obs_rms.mean.tolist() == pytest.approx([4.5, 0.75 if where == "observation" else 1.0], abs=0.5)
    assert np.isfinite(env.ret_rms.mean) and 0 < env.ret_rms.var < 100
    assert env.ret_rms.count == pytest.approx(400, abs=24)
    assert "step_wait" not in vars(env.venv) and "reset" not in vars(env.venv)


@WARNED
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_no_bootstrap_from_a_bad_observation(policy: str) -> None:
    model = A3C(policy, envs(Faulty, 1, "terminal observation"), n_steps=5, n_workers=0)
    model.learn(100)
    assert model._n_updates == 10


def test_a_reset_that_raises_leaves_no_filter_in_the_environments() -> None:
    class Broken(Faulty):
        def reset(self, **kwargs: Any) -> Any:
            raise NotADirectoryError

    env = VecNormalize(envs(Broken))
    with pytest.raises(NotADirectoryError):
        A3C("MlpPolicy", env, n_workers=0).learn(100)
    assert "step_wait" not in vars(env.venv) and "reset" not in vars(env.venv)


def test_vec_check_nan_around_vec_normalize_sees_bad_numbers() -> None:
    env = VecCheckNan(VecNormalize(envs(Faulty, 4, "reward", math.nan, 5)), raise_exception=True)
    with pytest.raises(ValueError, match="found nan in rewards"):
        A3C("MlpPolicy", env, n_steps=5, n_workers=0).learn(400)
