"""``training_env`` while workers run: calls to the user's VecEnv reach the workers' environments."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

from sb3_a3c import A3C, RemoteTraceback, WorkerDiedError
from sb3_a3c.workers.env_proxy import call_env
from sb3_a3c.workers.protocol import EnvCall


class Ladder(gym.Env[Any, Any]):
    """Episodes last ``level`` steps, each of which pays ``level``."""

    def __init__(self, name: int) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,))
        self.action_space = spaces.Discrete(2)
        self.render_mode = "rgb_array"
        self.name, self.level, self.t = name, 2, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.options = options
        self.t = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(2, dtype=np.float32), float(self.level), self.t >= self.level, False, {}

    def render(self) -> Any:
        return np.full((4, 6, 3), self.name, dtype=np.uint8)

    def greet(self, greeting: str, mark: str = ".") -> str:
        return f"{greeting}, {self.name}{mark}"

    def fail(self) -> None:
        raise LookupError(f"nothing in {self.name}")

    def unsendable(self) -> Any:
        return (i for i in range(3))


def ladders(vec_env: Any, wrapper: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] = lambda env: env) -> VecEnv:
    def maker(i: int) -> Callable[[], gym.Env[Any, Any]]:
        return lambda: wrapper(Ladder(i))

    env: VecEnv = vec_env([maker(i) for i in range(4)])
    return env


@pytest.fixture(scope="module")
def subproc() -> Iterator[VecEnv]:
    """Shared by all tests of this file, because its processes take seconds to start."""
    env = ladders(SubprocVecEnv)
    yield env
    env.close()


@pytest.fixture(params=["Dummy, 0", "Dummy, 2", "Subproc, 2"])
def setup(request: pytest.FixtureRequest) -> tuple[VecEnv, int]:
    kind, n_workers = request.param.split(", ")
    env: VecEnv = ladders(DummyVecEnv) if kind == "Dummy" else request.getfixturevalue("subproc")
    env.set_attr("level", 2)
    return env, int(n_workers)


class At(BaseCallback):
    """Calls ``do`` at one call, and once more at the end of the training."""

    def __init__(self, call: int, do: Callable[[VecEnv], Any]) -> None:
        super().__init__()
        self.call, self.do = call, do
        self.results: list[Any] = []
        self.rewards: list[Any] = []

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"])
        if self.n_calls == self.call:
            self.results.append(self.do(self.training_env))
        return True

    def _on_training_end(self) -> None:
        self.results.append(self.do(self.training_env))


def test_methods_and_attributes(setup: tuple[VecEnv, int]) -> None:
    env, n_workers = setup

    def ask(training_env: VecEnv) -> Any:
        return (
            training_env.get_attr("name"),
            training_env.get_attr("name", indices=[3, 0, 3]),
            training_env.get_attr("name", indices=2),
            training_env.env_method("greet", "Hello"),
            training_env.env_method("greet", "Bye", mark="!", indices=[1]),
            training_env.env_is_wrapped(Monitor),
            training_env.has_attr("level"),
            training_env.has_attr("label"),
        )

    callback = At(20, ask)
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(400, callback=callback)
    expected = (
        [0, 1, 2, 3],
        [3, 0, 3],
        [2],
        ["Hello, 0.", "Hello, 1.", "Hello, 2.", "Hello, 3."],
        ["Bye, 1!"],
        [False] * 4,
        True,
        False,
    )
    assert callback.results == [expected, expected]
    assert ask(env) == expected


def test_set_attr_changes_the_workers_environments_and_lasts(setup: tuple[VecEnv, int]) -> None:
    env, n_workers = setup
    callback = At(20, lambda training_env: training_env.set_attr("level", 7))
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(600, callback=callback)
    assert set(np.concatenate(callback.rewards[:20])) == {2.0}
    late = np.concatenate(callback.rewards[-40:])
    assert set(late) == {7.0}
    # workers may be ahead of the callback by 5 rollouts of 5 steps in 4 environments
    n_old = sum((row == 2.0).sum() for row in callback.rewards[20:])
    assert n_old <= (0 if n_workers == 0 else 5 * 5) * 4
    assert env.get_attr("level") == [7] * 4
    again = At(1, lambda _: None)
    model.learn(100, callback=again)
    assert set(np.concatenate(again.rewards)) == {7.0}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_set_wrapper_attr_of_some_environments(n_workers: int) -> None:
    env = VecFrameStack(ladders(DummyVecEnv, Monitor), 2)
    callback = At(20, lambda training_env: training_env.env_method("set_wrapper_attr", "level", 3, indices=[1, 2]))
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(600, callback=callback)
    assert env.get_attr("level") == [2, 3, 3, 2]
    assert np.mean(callback.rewards[-50:]) == pytest.approx(2.5)
    env.close()


def test_images(setup: tuple[VecEnv, int]) -> None:
    env, n_workers = setup
    callback = At(10, lambda training_env: (training_env.get_images(), training_env.render()))
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(400, callback=callback)
    for images, tiled in callback.results:
        assert [int(image.mean()) for image in images] == [0, 1, 2, 3]
        assert tiled.shape == (8, 12, 3)


@pytest.mark.parametrize("n_workers", [0, 2])  # with SubprocVecEnv it would end the environment's process, as always
def test_a_callback_can_catch_what_a_method_raises(n_workers: int) -> None:
    env = ladders(DummyVecEnv)
    caught: list[Exception] = []

    def provoke(training_env: VecEnv) -> None:
        with pytest.raises(LookupError, match="nothing in 2") as error:
            training_env.env_method("fail", indices=[2])
        caught.append(error.value)
        with pytest.raises(AttributeError, match="label"):
            training_env.get_attr("label")

    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(400, callback=At(10, provoke))
    assert model.num_timesteps == 400
    assert len(caught) == 2
    if n_workers:
        assert isinstance(caught[0].__cause__, RemoteTraceback)
        assert "in fail" in str(caught[0].__cause__)


def test_a_result_that_cannot_be_pickled_is_an_error_of_that_call_only() -> None:
    def provoke(training_env: VecEnv) -> list[Any]:
        with pytest.raises(TypeError, match="generator"):
            training_env.env_method("unsendable")
        with pytest.raises(IndexError):
            training_env.get_attr("name", indices=[4])
        return training_env.get_attr("name", indices=[-1])

    callback = At(10, provoke)
    A3C("MlpPolicy", ladders(DummyVecEnv), n_workers=2).learn(400, callback=callback)
    assert callback.results == [[3], [3]]


def test_calls_at_every_step_keep_the_number_of_waiting_reports_bounded() -> None:
    waiting: list[int] = []

    def ask(local: dict[str, Any], _: dict[str, Any]) -> bool:
        local["env"].get_attr("level")
        waiting.append(sum(len(queue) for queue in local["self"]._collector._assembler._queues))
        return True

    model = A3C("MlpPolicy", ladders(DummyVecEnv), n_workers=2, n_steps=5).learn(1000, callback=ask)
    assert model.num_timesteps == 1000
    assert max(waiting) <= 4 * 5 * 4  # 4 rollouts of each environment


def test_step_and_reset_raise_until_learn_has_ended(setup: tuple[VecEnv, int]) -> None:
    env, n_workers = setup

    def step(training_env: VecEnv) -> None:
        if n_workers == 0:
            return
        for call in (training_env.reset, lambda: training_env.step(np.zeros(4, dtype=int))):
            with pytest.raises(RuntimeError, match=r"its workers step and reset these environments.*EvalCallback"):
                call()

    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(400, callback=At(10, step))
    methods = vars(env).keys() & {"env_method", "get_attr", "set_attr", "has_attr", "get_images", "reset", "step_async"}
    assert not methods
    env.reset()
    rewards = [env.step(np.zeros(4, dtype=int))[1].tolist() for _ in range(3)]
    assert rewards == [[2.0] * 4] * 3


@pytest.mark.parametrize("n_workers", [0, 2])
def test_options_of_the_next_reset_are_used_once(n_workers: int) -> None:
    env = ladders(DummyVecEnv)
    model = A3C("MlpPolicy", env, n_workers=n_workers)
    env.set_options([{"map": i} for i in range(4)])
    first, second = (At(1, lambda training_env: training_env.get_attr("options")) for _ in range(2))
    env.env_method("set_wrapper_attr", "level", 10_000)  # one long episode
    model.learn(100, callback=first)
    assert first.results == [[{"map": 0}, {"map": 1}, {"map": 2}, {"map": 3}]] * 2
    model.learn(100, callback=second, reset_num_timesteps=False)
    assert second.results == [[None] * 4] * 2


@pytest.mark.parametrize("catches", [False, True])
def test_the_death_of_a_worker_during_a_call_ends_learn(catches: bool) -> None:
    def ask(local: dict[str, Any], _: dict[str, Any]) -> bool:
        model = local["self"]
        if model.num_timesteps == 4:
            os.kill(model._collector._workers.pids[0], signal.SIGKILL)
        with contextlib.suppress(*[WorkerDiedError] * catches):
            model.get_env().get_attr("level")
        return True

    # and issues no warning, which would be an error here
    with pytest.raises(WorkerDiedError, match="Worker 0 was killed by SIGKILL"):
        A3C("MlpPolicy", ladders(DummyVecEnv), n_workers=2, n_steps=5, max_worker_restarts=0).learn(2000, callback=ask)


def test_a_death_after_a_callback_has_ended_the_training_is_a_warning() -> None:
    def end(local: dict[str, Any], _: dict[str, Any]) -> bool:
        os.kill(local["self"]._collector._workers.pids[0], signal.SIGKILL)
        return False

    with pytest.warns(UserWarning, match="At the end of training a worker failed: WorkerDiedError: Worker 0 was killed"):
        A3C("MlpPolicy", ladders(DummyVecEnv), n_workers=2, n_steps=5).learn(2000, callback=end)


def test_calls_from_another_thread_are_refused() -> None:
    env = ladders(DummyVecEnv)
    calls: list[Callable[[], Any]] = [
        lambda: env.get_attr("level"),
        lambda: env.set_attr("level", 9),
        lambda: env.env_method("greet", "Hello"),
        lambda: env.has_attr("level"),
        lambda: env.get_images(),
    ]
    errors: list[Exception] = []
    is_over = threading.Event()

    def disturb() -> None:
        while not is_over.wait(0.01):
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    errors.append(error)

    thread = threading.Thread(target=disturb)

    def ask(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps == 4:
            thread.start()
        if local["self"].num_timesteps == 400:
            is_over.set()
            thread.join()
        return bool(local["env"].get_attr("level") == [2] * 4)

    assert A3C("MlpPolicy", env, n_workers=2, n_steps=5).learn(400, callback=ask).num_timesteps == 400
    assert len(errors) >= 5
    names = {
        re.search(r"`(\w+)` reaches its workers' environments, and only from the thread", str(error)) for error in errors
    }
    assert {match and match[1] for match in names} == {"get_attr", "set_attr", "env_method", "has_attr", "get_images"}
    assert env.get_attr("level") == [2] * 4


def test_learn_and_set_env_raise_while_workers_run() -> None:
    env = ladders(DummyVecEnv)
    model = A3C("MlpPolicy", env, n_workers=2)

    def try_all(_: VecEnv) -> None:
        with pytest.raises(RuntimeError, match="already learning"):
            model.learn(100)
        with pytest.raises(RuntimeError, match="Call `set_env` after `learn`"):
            model.set_env(ladders(DummyVecEnv))

    assert model.learn(400, callback=At(10, try_all)).num_timesteps == 400
    model.set_env(ladders(DummyVecEnv))
    model.learn(40)


def test_call_env() -> None:
    env = ladders(DummyVecEnv)
    assert call_env(env, EnvCall("env_method", [1, 2], ("greet", "Hi"), {})) == ["Hi, 1.", "Hi, 2."]
    assert call_env(env, EnvCall("env_method", [0], ("greet", "Hi"), {"mark": "!"})) == ["Hi, 0!"]
    assert call_env(env, EnvCall("set_attr", [3], ("level", 5), {})) is None
    assert call_env(env, EnvCall("get_attr", [0, 3], ("level",), {})) == [2, 5]
    assert call_env(env, EnvCall("has_attr", None, ("level",), {})) is True  # takes no indices
