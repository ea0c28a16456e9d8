"""Environments arrive as the user left them, also those that pickle their constructor's arguments only."""

import contextlib
import itertools
import os
import signal
import threading
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils import EzPickle
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor

from sb3_a3c import A3C
from sb3_a3c.envs.pickling import dump_env, load_env
from sb3_a3c.envs.sharding import clone_env
from tests.toy_envs import Countdown

NUMBERS = itertools.count()


class Simulator(Countdown, EzPickle):
    """Holds what can't be pickled, and refers to itself."""

    def __init__(self, size: int = 1) -> None:
        EzPickle.__init__(self, size=size)
        super().__init__()
        self.size, self.level, self.goal = size, 0, np.zeros(3)
        self.handle, self.body = threading.Lock(), None
        self.own_reward = self.reward

    def reward(self) -> float:
        return float(self.level)


class Numbered(Simulator):
    """Each one takes a handle of its own from a library."""

    def __init__(self) -> None:
        super().__init__()
        EzPickle.__init__(self)
        self.client = next(NUMBERS)


class Doubled(gym.RewardWrapper[Any, Any], EzPickle):
    def __init__(self, env: gym.Env[Any, Any]) -> None:
        EzPickle.__init__(self, env)
        super().__init__(env)
        self.factor = 2

    def reward(self, reward: Any) -> float:
        return self.factor * float(reward)


class Own(Simulator):
    """Says itself how it is pickled."""

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "level": self.level}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.level = state["level"] + 1


def sent(env: Any) -> Any:
    return load_env(*dump_env(env))


def test_an_ez_pickle_environment_keeps_what_was_set() -> None:
    env = Simulator(size=5)
    env.level, env.goal[1], env.size = 3, 4.0, 6
    vars(env)["later"] = {"rule": lambda: env.level}
    copy = sent(env)
    assert (copy.level, copy.size, copy.goal.tolist(), copy._ezpickle_kwargs) == (3, 6, [0, 4, 0], {"size": 5})
    assert copy.later["rule"]() == 3
    copy.level = 8
    assert (copy.own_reward(), copy.later["rule"](), env.level) == (8.0, 8, 3)  # they refer to the copy
    assert copy.handle is not env.handle


def test_an_unchanged_one_is_only_rebuilt() -> None:
    data, _ = dump_env(Simulator())
    assert b"level" not in data
    assert sent(sent(Simulator())).level == 0


def test_wrappers_that_pickle_their_arguments() -> None:
    env = Monitor(Doubled(Simulator()))
    env.unwrapped.level, env.env.factor = 7, 3  # type: ignore[attr-defined]
    env.reset()
    copy = sent(env)
    copy.reset()
    assert copy.step(0)[1] == env.step(0)[1] == 21.0
    assert copy.env.env is copy.unwrapped


def test_a_class_with_a_pickling_of_its_own() -> None:
    env = Own()
    env.level = 5
    assert sent(env).level == 6


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # of Box2D, at its import
def test_gymnasium_environments() -> None:
    env = gym.make("LunarLander-v3", enable_wind=True)
    env.unwrapped.gravity = -2.0  # type: ignore[attr-defined]
    copy = sent(env)
    assert (copy.unwrapped.gravity, copy.unwrapped.enable_wind, copy.unwrapped.spec) == (-2.0, True, env.unwrapped.spec)
    env.reset(seed=1)
    with pytest.warns(UserWarning, match=r"LunarLander .* but for \['drawlist', 'lander', 'legs', 'moon'\], which can't be"):
        played = sent(env)
    for each in (env, copy, played):
        each.reset(seed=2)
    steps = [each.step(2)[:3] for each in (env, copy, played)]
    np.testing.assert_array_equal(steps[0][0], steps[1][0])
    np.testing.assert_array_equal(steps[0][0], steps[2][0])


def test_what_can_not_be_carried_is_named() -> None:
    env = Simulator()
    vars(env)["body"] = threading.Lock()
    with pytest.warns(UserWarning, match=r"each Simulator anew .*\['body'\], which can't be pickled\. .* SubprocVecEnv"):
        assert sent(env).body is None
    numbered = Numbered()
    numbered.level = 2
    with pytest.warns(UserWarning, match=r"\['client'\], which differ whenever one is made\."):
        copy = sent(numbered)
    assert (copy.level, copy.client) == (2, next(NUMBERS) - 1)


def test_one_object_is_made_for_comparison_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_vec_env(Simulator, n_envs=5)
    made, init = [], Simulator.__init__

    def count(self: Simulator, size: int = 1) -> None:
        made.append(self)
        init(self, size)

    monkeypatch.setattr(Simulator, "__init__", count)
    dump_env(env)
    assert len(made) == 1


@pytest.mark.parametrize("n_workers", [0, None, 2])
def test_learn_and_its_replaced_workers_have_what_was_set(n_workers: int | None) -> None:
    class Levels(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 1:
                self.levels = self.training_env.get_attr("level")
                self.training_env.env_method("set_wrapper_attr", "level", 5)
                assert self.training_env.env_method("reward") == [5.0, 5.0]
                if n_workers != 0:
                    os.kill(self.locals["infos"][1]["pid"], signal.SIGKILL)
            return True

        def _on_training_end(self) -> None:
            self.levels += self.training_env.get_attr("level")

    env = make_vec_env(Simulator, n_envs=2)
    env.env_method("set_wrapper_attr", "level", 3, indices=[1])
    levels, message = Levels(), r"restart 1 of at most 10\. If calls of env_method changed .* repeat them \(reward\)"
    with contextlib.nullcontext() if n_workers == 0 else pytest.warns(UserWarning, match=message):
        A3C("MlpPolicy", env, n_steps=5, n_workers=n_workers).learn(200, levels)
    assert levels.levels == [0, 3, 5, 5]


def test_clones_are_as_the_original() -> None:
    env = Simulator()
    env.level = 4
    assert clone_env(env, 2).get_attr("level") == [4, 4]
