"""What a callback reads belongs to its row, or is not there and says why."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_a3c import A3C
from sb3_a3c.workers.callback_locals import can_see_observations

N_ENVS = 3
BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Telling(gym.Env[Any, Any]):
    """Episodes of 7 steps. Each info has the observations before and after the step, and the action that was received."""

    observation_space: spaces.Space[Any] = BOX
    action_space = spaces.Box(-0.1, 0.1, (1,), np.float32)
    n_resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.n_resets, self.t = self.n_resets + 1, 0
        self.obs = self._draw()
        return self.obs, {}

    def step(self, action: Any) -> Any:
        self.t += 1
        before, self.obs = self.obs, self._draw()
        info = {"before": before, "after": self.obs, "action": action, "t": self.t}
        return self.obs, float(self.t), self.t == 7, False, info

    def _draw(self) -> Any:
        return self.np_random.normal(size=2).astype(np.float32)


class TellingDict(Telling):
    observation_space = spaces.Dict({"a": BOX, "b": BOX})

    def _draw(self) -> Any:
        return {key: self.np_random.normal(size=2).astype(np.float32) for key in "ab"}


@pytest.fixture(scope="module")
def subproc() -> Iterator[VecEnv]:
    env = SubprocVecEnv([Telling] * N_ENVS)
    yield env
    env.close()


class Compare(BaseCallback):
    """Compares each row's locals with what its info tells, and keeps the observations that follow an episode's end."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[Any, Any] = {}
        self.n_rows = 0

    def _on_step(self) -> bool:
        found = self.locals
        assert found["values"].shape == (N_ENVS, 1)
        assert isinstance(found["values"], th.Tensor)
        np.testing.assert_array_equal(found["clipped_actions"], np.clip(found["actions"], -0.1, 0.1))
        for i, info in enumerate(found["infos"]):
            assert found["rewards"][i] == info["t"]
            assert found["dones"][i] == (info["t"] == 7)
            np.testing.assert_array_equal(found["clipped_actions"][i], info["action"])
            keys = list(info["after"]) if isinstance(info["after"], dict) else [None]
            for key in keys:
                before, after, new_obs, obs = (
                    part if key is None else part[key]
                    for part in (info["before"], info["after"], found["new_obs"], found["obs_tensor"])
                )
                np.testing.assert_array_equal(obs[i].numpy(), before)
                if found["dones"][i]:
                    terminal = info["terminal_observation"]
                    np.testing.assert_array_equal(terminal if key is None else terminal[key], after)
                else:
                    np.testing.assert_array_equal(new_obs[i], after)
                old = self.newest.get((info["env_index"], key))
                assert old is None or np.array_equal(old, before)  # where the row before has ended
                self.newest[info["env_index"], key] = new_obs[i]
            self.n_rows += 1
        return True


@pytest.mark.parametrize("n_workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["Dummy", "Dict", "Subproc"])
def test_every_local_belongs_to_its_row(kind: str, n_workers: int, request: pytest.FixtureRequest) -> None:
    if kind == "Subproc":
        env = request.getfixturevalue("subproc")
    else:
        env = DummyVecEnv([Telling if kind == "Dummy" else TellingDict] * N_ENVS)
    compare = Compare()
    policy = "MultiInputPolicy" if kind == "Dict" else "MlpLstmPolicy"
    A3C(policy, env, n_workers=n_workers, n_steps=5).learn(600, CallbackList([compare]))
    assert compare.n_rows >= 600 - N_ENVS


def test_what_does_not_exist_says_why() -> None:
    errors: dict[str, str] = {}

    class Read(BaseCallback):
        def _on_step(self) -> bool:
            for name in ("log_probs", "rollout_buffer", "nonsense"):
                with pytest.raises(KeyError) as error:
                    self.locals[name]
                errors[name] = str(error.value)
            return False

    A3C("MlpPolicy", "CartPole-v1", n_workers=0).learn(100, EveryNTimesteps(1, Read()))
    assert "do not compute them" in errors["log_probs"]
    assert "learns from its rollout at once" in errors["rollout_buffer"]
    assert "Those that are: actions" in errors["nonsense"]


def test_a2cs_locals_exist_but_for_those_that_are_documented() -> None:
    def names(model: Any) -> set[str]:
        found: set[str] = set()

        def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
            found.update(local)
            return True

        model.learn(40, note)
        return found

    kwargs: dict[str, Any] = dict(policy="MlpPolicy", env=make_vec_env("Pendulum-v1", 2))
    missing = names(A2C(**kwargs)) - names(A3C(**kwargs, n_workers=0))
    of_a_loop = {"idx", "done", "terminal_obs", "terminal_value"}  # over environments: of the last one only
    assert missing - of_a_loop == {"log_probs", "rollout_buffer"}


def test_observations_are_sent_only_if_a_callback_can_see_them() -> None:
    class Own(CheckpointCallback):
        pass

    mine, theirs = Compare(), CheckpointCallback(10, ".")
    assert not can_see_observations(CallbackList([theirs, EveryNTimesteps(5, theirs)]))
    assert can_see_observations(CallbackList([theirs, EveryNTimesteps(5, mine)]))
    assert can_see_observations(CallbackList([Own(10, ".")]))

    class Counts(BaseCallback):
        reads_observations = False

        def _on_step(self) -> bool:
            with pytest.raises(KeyError, match=r"new_obs: .*without `reads_observations = False`"):
                self.locals["new_obs"]
            return True

    assert not can_see_observations(CallbackList([theirs, Counts()]))
    assert can_see_observations(CallbackList([Counts(), mine]))
    A3C("MlpPolicy", "CartPole-v1", n_workers=0).learn(40, Counts())


@pytest.mark.parametrize("n_workers", [0, 2])
def test_raw_values_of_vec_normalize_are_refused_while_workers_run(n_workers: int) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))

    class Raw(BaseCallback):
        def _on_step(self) -> bool:
            for read in (env.get_original_reward, env.get_original_obs):
                with pytest.raises(RuntimeError, match=r"does not have the raw values.*`info`"):
                    read()
            loaded = pickle.loads(pickle.dumps(env))  # as callbacks save it
            assert loaded.get_original_reward().shape == loaded.get_original_obs().shape == (0,)
            return False

    def read_later(local: dict[str, Any], _: dict[str, Any]) -> bool:
        return local["n_steps"] < 4 or bool(env.get_original_obs())

    with pytest.raises(RuntimeError, match="does not have the raw values"):
        A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(100, read_later)
    A3C("MlpPolicy", env, n_workers=n_workers).learn(100, Raw())
    env.reset()
    assert env.get_original_obs().shape == (2, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_what_environments_keep_of_their_last_step_is_refused_while_workers_run(
    vec_env: type[VecEnv], n_workers: int
) -> None:
    base: Any = vec_env([lambda: gym.make("CartPole-v1")] * 2)  # type: ignore[arg-type,call-arg]
    env = VecMonitor(base)
    reads: list[Callable[[], Any]] = [lambda: base.reset_infos[0], lambda: np.asarray(env.episode_returns)]
    if isinstance(base, DummyVecEnv):
        reads += [lambda: base.buf_rews[1], lambda: list(base.buf_infos), lambda: base.buf_dones.copy()]

    class Read(BaseCallback):
        n_refused = 0

        def _on_step(self) -> bool:
            for read in reads:
                with pytest.raises(RuntimeError, match=r"`\w+`: while A3C learns, .*`info`"):
                    read()
                self.n_refused += 1
            return True

    callback = Read()
    try:
        A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(50, callback)
        assert callback.n_refused == 25 * len(reads)
        for read in reads:
            read()
        assert len(base.reset_infos) == 2
    finally:
        env.close()
