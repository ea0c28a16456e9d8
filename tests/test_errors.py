"""A3C's exceptions: base classes, and pickling. Its warnings: the line that they point at."""

import functools
import linecache
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_a3c import A3C
from sb3_a3c.errors import A3CError, DivergenceError, RemoteTraceback, WorkerDiedError, warn
from tests.envs.test_pickling import Simulator
from tests.toy_envs import Countdown


@pytest.mark.parametrize("kind", [WorkerDiedError, RemoteTraceback, DivergenceError])
def test_all_are_a3c_errors_and_can_be_pickled(kind: type[A3CError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(error) is kind
    assert isinstance(error, A3CError)
    assert "what happened" in str(error)


def test_builtin_base_classes() -> None:
    assert issubclass(DivergenceError, ValueError)  # RL Zoo prunes a trial on these
    assert issubclass(WorkerDiedError, RuntimeError)


def clone_what_can_not_be_copied() -> None:
    env = Simulator()
    vars(env)["body"] = threading.Lock()
    A3C("MlpPolicy", env, n_workers=2)  # the user's line


def learn_with_a_compiled_policy() -> None:
    model = A3C("MlpPolicy", Countdown(), n_workers=0)
    model.policy.mlp_extractor = th.compile(model.policy.mlp_extractor, backend="eager")  # type: ignore[assignment]
    model.learn(5)  # the user's line


class Own(DummyVecEnv):
    """Can't be split."""


def learn_in_this_process() -> None:
    model = A3C("MlpPolicy", Own([Countdown]))
    model.learn(5)  # the user's line


def learn_from_a_reward_that_is_nan() -> None:
    class Faulty(Countdown):
        def reward(self) -> float:
            return np.nan if self.n_steps == 3 else 1.0

    model = A3C("MlpPolicy", Faulty(), n_workers=0)
    model.learn(40)  # the user's line


def clip_as_a2c_does() -> None:
    A3C("MlpPolicy", Countdown(), max_grad_norm=0.5)  # the user's line


def learn_while_a_worker_is_killed() -> None:
    def kill(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps == 10:
            os.kill(local["infos"][0]["pid"], signal.SIGKILL)
        return True

    model = A3C("MlpPolicy", Countdown(), n_workers=1, n_steps=5)
    model.learn(200, callback=kill)  # the user's line


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (clone_what_can_not_be_copied, "each Simulator anew"),
        (learn_with_a_compiled_policy, "is compiled"),
        (learn_in_this_process, "trains in this process"),
        (learn_from_a_reward_that_is_nan, "update was dropped"),
        (clip_as_a2c_does, "small in A3C"),
        (learn_while_a_worker_is_killed, "was replaced"),
    ],
)
def test_warnings_point_at_the_users_line(act: Callable[[], Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        act()
    (warning,) = caught
    assert linecache.getline(warning.filename, warning.lineno).endswith("# the user's line\n")


def test_the_users_line_is_the_innermost() -> None:
    """Also that of a callback, which SB3 calls."""
    modules: list[dict[str, Any]] = [
        {"__name__": name} for name in ("user", "stable_baselines3.common.base", "user", "sb3_a3c.a3c", "contextlib")
    ]
    call: Callable[[], None] = functools.partial(warn, "something")
    for number, names in enumerate(reversed(modules)):
        names["call"] = call
        exec(compile("def f():\n    call()\n", f"file {number}", "exec"), names)
        call = names["f"]
    with pytest.warns(UserWarning, match="something") as caught:
        call()
    assert caught[0].filename == "file 2"
