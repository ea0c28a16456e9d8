"""What workers do between rollouts: take over changes that callbacks make, wait for tickets, and serve calls."""

import math
import os
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_a3c import A3C
from sb3_a3c.actor_learner.report import Report, RolloutStatistics
from sb3_a3c.workers.assignment import MAX_ROLLOUTS_WAITING
from tests.toy_envs import StepCounter

BOTH = pytest.mark.parametrize("n_workers", [0, 2])
SGD: dict[str, Any] = dict(policy_kwargs=dict(optimizer_class=th.optim.SGD), learning_rate=1e-2)
N_TICKETS = MAX_ROLLOUTS_WAITING + 1  # rollouts by which a worker may be ahead of the callbacks


def cartpole(**kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs=4, wrapper_class=StepCounter, wrapper_kwargs=kwargs)


def env_of(model: A3C) -> VecEnv:
    env = model.get_env()
    assert env is not None
    return env


def weights(model: Any) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


class At(BaseCallback):
    """Calls ``action`` at one call; records the reports, and the parameters at the start of each rollout of SB3."""

    def __init__(self, call: int, action: Callable[[Any], None]) -> None:
        super().__init__()
        self.call, self.action = call, action
        self.reports: list[Report] = []
        self.weights: list[tuple[int, th.Tensor]] = []  # with the number of calls before
        self.pids: list[int] = []
        self.shown = [0] * 4  # transitions of each environment
        self.shown_before: list[int] = []  # the same at that call

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, A3C)
        collector: Any = self.model._collector
        if not self.weights:  # nothing has been received yet
            self.pids = getattr(collector._workers, "pids", [])
            self.add, collector._assembler.add = collector._assembler.add, self._record
        self.weights.append((self.n_calls, weights(self.model)))

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            self.shown[info["env_index"]] += 1
        if self.n_calls == self.call:
            self.shown_before = list(self.shown)
            self.action(self.model)
        return True

    def _record(self, report: Report) -> None:
        self.reports.append(report)
        self.add(report)

    def workers_have_ended(self) -> bool:
        return not any(os.path.exists(f"/proc/{pid}") for pid in self.pids)


# --- hyper-parameters that a callback changes -----------------------------------------------------------------------


def all_returns_are_1(n_envs: int, statistics: RolloutStatistics) -> bool:
    return statistics.return_moments == (statistics.n_transitions, statistics.n_transitions)


EFFECTS: list[Any] = [
    # rewards are 1 and values 0
    pytest.param({"gamma": 0.0}, all_returns_are_1, id="gamma"),
    pytest.param({"gae_lambda": 0.0}, all_returns_are_1, id="gae_lambda"),
    pytest.param({"ent_coef": 1e9}, lambda n_envs, statistics: statistics.grad_norm > 1e4, id="ent_coef"),
    pytest.param({"vf_coef": 1e9}, lambda n_envs, statistics: statistics.grad_norm > 1e4, id="vf_coef"),
    pytest.param({"n_steps": 12}, lambda n_envs, statistics: statistics.n_transitions == 12 * n_envs, id="n_steps"),
    pytest.param({"envs_per_update": 1}, lambda n_envs, statistics: statistics.n_updates == n_envs, id="envs_per_update"),
]


@BOTH
@pytest.mark.parametrize(("change", "is_changed"), EFFECTS)
def test_a_callback_changes_hyperparameters(
    change: dict[str, Any], is_changed: Callable[[int, RolloutStatistics], bool], n_workers: int
) -> None:
    model = A3C("MlpPolicy", cartpole(), n_steps=5, n_workers=n_workers, envs_per_update=4, learning_rate=0.0)
    for parameter in model.policy.value_net.parameters():
        parameter.data.zero_()
    at = At(20, lambda model: vars(model).update(change))
    model.learn(800, callback=at)
    for first in (0, 2)[: max(1, n_workers)]:
        mine = [report for report in at.reports if report.env_indices[0] == first]
        changed = [is_changed(len(report.env_indices), report.statistics) for report in mine]
        n_before = changed.index(True)
        assert changed == [False] * n_before + [True] * (len(changed) - n_before)
        # transitions that were shown before the change, or waited, were made before it
        n_shown = at.shown_before[first] / 5
        assert n_before == 4 if n_workers == 0 else n_shown <= n_before <= n_shown + N_TICKETS
        assert len(changed) - n_before > 5
    assert model._n_updates == sum(report.statistics.n_updates for report in at.reports)
    assert model.num_timesteps == sum(report.statistics.n_transitions for report in at.reports)


def stop_the_rate(model: Any) -> None:
    model.lr_schedule = lambda _: 0.0


def stop_the_gradients(model: Any) -> None:
    model.max_grad_norm = 0


@BOTH
@pytest.mark.parametrize("stop", [stop_the_rate, stop_the_gradients])
def test_a_callback_can_freeze_the_parameters(stop: Callable[[Any], None], n_workers: int) -> None:
    model = A3C("MlpPolicy", cartpole(), n_steps=5, n_workers=n_workers, take_turns=True, envs_per_update=2, **SGD)
    at = At(20, stop)
    model.learn(800, callback=at)
    before = [seen for call, seen in at.weights if call <= 20]
    after = [seen for call, seen in at.weights if call >= 20 + 5 * (N_TICKETS + 2)]  # after all earlier gradients
    assert len(before) == 5
    assert not th.equal(before[0], before[-1])
    assert len(after) > 10
    assert all(th.equal(each, weights(model)) for each in after)
    assert model._n_updates == 2 * 800 / 20  # updates were made all the same


@BOTH
def test_an_invalid_hyperparameter_ends_learn(n_workers: int) -> None:
    model = A3C("MlpPolicy", cartpole(), n_steps=5, n_workers=n_workers, envs_per_update=2, **SGD)
    before = weights(model)
    at = At(40, lambda model: vars(model).update(n_steps=0))
    with pytest.raises(ValueError, match=r"`n_steps` must be .*, not 0"):
        model.learn(100_000, callback=at)
    assert at.n_calls == 40
    assert len(at.pids) == n_workers
    assert at.workers_have_ended()
    assert 160 <= model.num_timesteps <= 160 + 4 * 5 * (N_TICKETS + 1)
    assert model._n_updates >= 16
    assert not th.equal(before, weights(model))
    assert weights(model).isfinite().all()
    model.n_steps = 5
    assert model.learn(100).num_timesteps >= 100


# --- parameters that a callback sets --------------------------------------------------------------------------------


def wait_until_workers_wait(model: Any) -> None:
    n_updates = -1
    while n_updates != (n_updates := model._collector.store.n_updates):
        time.sleep(0.3)


@BOTH
def test_workers_continue_from_parameters_and_moments_that_a_callback_sets(n_workers: int) -> None:
    kwargs: dict[str, Any] = dict(n_steps=5, n_workers=n_workers, take_turns=True, learning_rate=0.0)
    new = deepcopy(A3C("MlpPolicy", cartpole(), **kwargs, seed=2).learn(40).get_parameters())
    for state in new["policy.optimizer"]["state"].values():
        state["step"].fill_(1000)
        state["exp_avg_sq"].fill_(1e6)
    n_updates: list[int] = []

    def set_new(model: A3C) -> None:
        wait_until_workers_wait(model)
        assert model._collector is not None
        n_updates.append(model._collector.store.n_updates)
        model.set_parameters(new)

    model = A3C("MlpPolicy", cartpole(), **kwargs, seed=1)
    at = At(20, set_new)
    model.learn(800, callback=at)
    after = model.get_parameters()
    n_later = model._n_updates - n_updates[0]
    assert 20 < n_later < 80
    assert all(th.equal(value, new["policy"][name]) for name, value in after["policy"].items())
    assert not th.equal(at.weights[0][1], weights(model))
    for state in after["policy.optimizer"]["state"].values():
        assert float(state["step"]) == 1000 + n_later
        assert state["exp_avg_sq"].flatten().tolist() == pytest.approx(
            [1e6 * 0.999**n_later] * state["exp_avg_sq"].numel(), 0.01
        )


# --- tickets --------------------------------------------------------------------------------------------------------


def test_workers_use_up_their_tickets_while_a_callback_blocks() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def block(model: A3C) -> None:
        time.sleep(1.0)
        in_this_step = [info["env_index"] for info in at.locals["infos"]]
        shown_before = [n - in_this_step.count(env) for env, n in enumerate(at.shown)]
        seen.append((shown_before, env_of(model).get_attr("n_steps")))
        time.sleep(0.3)
        assert env_of(model).env_method("add", 0) == seen[0][1]  # they wait

    model, at = A3C("MlpPolicy", cartpole(), n_steps=5, n_workers=2), At(22, block)
    model.learn(2000, callback=at)
    shown_before, made = seen[0]
    assert sum(shown_before) == 4 * 21
    for env in (0, 2):  # the first of each worker
        assert made[env] == made[env + 1] == 5 * (shown_before[env] // 5 + N_TICKETS)
    assert 2000 <= model.num_timesteps < 2000 + 2 * 10  # training has continued
    assert sum(at.shown) == 4 * at.n_calls == 4 * (model.num_timesteps // 4)


# --- calls to environments ------------------------------------------------------------------------------------------


class Caller(BaseCallback):
    """Calls all environments in every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.n_hooks = dict.fromkeys(("training_start", "rollout_start", "step", "rollout_end", "training_end"), 0)
        self.marks: set[str] = set()
        self.made = [0] * 4

    def _call(self, hook: str) -> None:
        assert isinstance(self.model, A3C)
        env = env_of(self.model)
        self.n_hooks[hook] += 1
        env.set_attr("mark", hook)
        assert env.get_attr("mark") == [hook] * 4
        before, after = self.made, env.get_attr("n_steps")
        assert all(old <= new for old, new in zip(before, after, strict=True))
        (last,) = env.env_method("add", 1000, indices=[3])
        assert last >= after[3] + 1000
        self.made = after

    def _on_training_start(self) -> None:
        self._call("training_start")

    def _on_rollout_start(self) -> None:
        self._call("rollout_start")

    def _on_step(self) -> bool:
        self.marks |= {info["mark"] for info in self.locals["infos"]}
        if self.n_calls % 3 == 0:
            self._call("step")
        return True

    def _on_rollout_end(self) -> None:
        self._call("rollout_end")

    def _on_training_end(self) -> None:
        self._call("training_end")


@pytest.mark.parametrize(
    ("n_workers", "seconds", "take_turns"),
    [
        (0, 0.0, False),
        (2, 0.0, False),  # workers wait for callbacks
        (2, 0.002, False),  # callbacks wait for workers
        (2, 0.002, True),
    ],
)
def test_calls_are_served_in_every_hook(n_workers: int, seconds: float, take_turns: bool) -> None:
    caller = Caller()
    model = A3C("MlpPolicy", cartpole(seconds=seconds), n_steps=5, n_workers=n_workers, take_turns=take_turns)
    model.learn(400, callback=caller)
    assert 400 <= model.num_timesteps < 400 + 2 * 10
    n_rollouts = -(-model.num_timesteps // 20)
    n_hooks = dict(rollout_start=n_rollouts, step=model.num_timesteps // 4 // 3, rollout_end=n_rollouts)
    assert caller.n_hooks == {"training_start": 1, **n_hooks, "training_end": 1}
    assert "new" not in caller.marks  # on_training_start comes before the first step
    assert sum(caller.made) == model.num_timesteps
    assert env_of(model).get_attr("mark") == ["training_end"] * 4


def test_calls_are_served_while_waiting_for_another_workers_turn() -> None:
    def maker(seconds: float) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: StepCounter(gym.make("CartPole-v1"), seconds)

    answers: list[float] = []

    def call(model: A3C) -> None:
        for _ in range(20):
            began = time.monotonic()
            env_of(model).get_attr("n_steps", indices=[0, 1])  # of the worker that waits for the other most of the time
            answers.append(time.monotonic() - began)

    env = DummyVecEnv([maker(seconds) for seconds in (0.0, 0.0, 0.05, 0.05)])
    model = A3C("MlpPolicy", env, n_steps=5, n_workers=2, take_turns=True)
    model.learn(80, callback=At(5, call))
    assert len(answers) == 20
    assert sorted(answers)[10] < 0.1  # the other's rollout takes half a second
    assert model.num_timesteps == 80


class Live(BaseCallback):
    """Lowers the rate that a schedule reads at the 10th, 20th, … call, and records what the log would show."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()  # can't be pickled
        self.rate = 1.0
        self.rates: list[float] = []  # of the rollouts, as reported
        self.logged: list[float] = []

    def schedule(self, progress_remaining: float) -> float:
        with self.lock:
            return self.rate

    def _on_training_start(self) -> None:
        self.rate = 1.0

    def _on_rollout_start(self) -> None:
        collector: Any = self.model._collector  # type: ignore[attr-defined]
        if self.n_calls == 0:
            self.add, collector.statistics.add = collector.statistics.add, self._record

    def _on_step(self) -> bool:
        if self.n_calls % 10 == 0:
            self.rate /= 2
        return True

    def _record(self, new: RolloutStatistics) -> None:
        self.rates.append(new.learning_rate)
        self.add(new)

    def _on_rollout_end(self) -> None:
        self.logged.append(self.model._collector.statistics.learning_rate)  # type: ignore[attr-defined]


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_a_schedule_that_reads_changing_state_is_live(n_workers: int, vec_env: type[VecEnv]) -> None:
    live = Live()
    env = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=vec_env)  # type: ignore[arg-type]
    try:
        A3C("MlpPolicy", env, learning_rate=live.schedule, n_steps=5, n_workers=n_workers, take_turns=True).learn(80, live)
    finally:
        env.close()
    n_workers = max(n_workers, 1)
    assert len(live.rates) == 8 * n_workers
    if live.model.n_workers == 0:  # type: ignore[attr-defined]
        # calls 1-10 show rollouts 1 and 2, and the rate is halved before the third
        assert live.rates == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    else:  # a worker begins a rollout once its 4th last has been shown: rollout 6 after the 10th call
        assert live.rates == [1] * 5 * n_workers + [1 / 2] * 2 * n_workers + [1 / 4] * n_workers
    assert live.logged == live.rates[n_workers - 1 :: n_workers]  # what it shows was used


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_callback_replaces_the_schedule(n_workers: int) -> None:
    rates: list[float] = []

    class Replace(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                self.model.lr_schedule = lambda progress: progress
            rates.append(self.model._collector.statistics.learning_rate)  # type: ignore[attr-defined]
            return True

    model = A3C("MlpPolicy", cartpole(), learning_rate=0.51, n_steps=5, n_workers=n_workers, take_turns=True)
    model.learn(800, Replace())
    assert set(rates[5:10]) == {0.51}
    assert rates[-1] == pytest.approx(0.0)
    lowered = [rate for rate in rates if rate is not None and rate != 0.51]
    assert lowered == sorted(lowered, reverse=True)
    assert len(set(lowered)) == 40 - (2 if n_workers == 0 else 5)  # of 40 rollouts of each worker


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize(
    ("late", "error"),
    [(lambda: math.nan, "`lr_schedule` must be a finite number.*not nan"), (lambda: 1 / 0, "division by zero")],
)
def test_a_schedule_that_fails_ends_learn(late: Callable[[], float], error: str, n_workers: int) -> None:
    def schedule(progress: float) -> float:
        return 1e-3 if progress > 0.4 else late()

    model = A3C("MlpPolicy", cartpole(), learning_rate=schedule, n_steps=5, n_workers=n_workers)
    with pytest.raises((ValueError, ZeroDivisionError), match=error):
        model.learn(400)
    assert 0 < model.num_timesteps <= 240


def test_learn_until_a_callback_stops() -> None:
    model = A3C("MlpPolicy", cartpole(), n_steps=5, n_workers=2, learning_rate=lambda progress: 1e-3 * progress)
    rates = set()

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            rates.add(self.model._collector.statistics.learning_rate)  # type: ignore[attr-defined]
            return self.n_calls < 50

    model.learn(math.inf, Stop())
    assert 200 <= model.num_timesteps <= 200 + 2 * 2 * 5 * (N_TICKETS + 1)
    assert rates <= {None, 1e-3}
