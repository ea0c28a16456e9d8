"""VecNormalize with several workers: the user's statistics are those of all that was seen, each observation once."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_a3c import A3C
from sb3_a3c.envs.normalize import StatisticsMerger, merge_deltas, options, pop_deltas, record_deltas, set_options

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
DICT = spaces.Dict({"far": VECTOR, "near": spaces.Box(-np.inf, np.inf, (2,)), "kind": spaces.Discrete(4)})
GAMMA = 0.9


class Noise(gym.Env[Any, Any]):
    """Draws observations and rewards at random, and keeps those that its VecEnv returns."""

    def __init__(self, observation_space: spaces.Space[Any] = VECTOR) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2)
        self.render_mode = None
        self.seen: list[Any] = []
        self.returns: list[float] = []
        self._return = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._return = 0.0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, done = float(self.np_random.normal(2.0, 1.0)), bool(self.np_random.random() < 0.1)
        self._return = self._return * GAMMA + reward
        self.returns.append(self._return)
        obs = self._draw()
        if done:
            self.seen.pop()  # the VecEnv returns the next episode's first observation instead
        return obs, reward, done, False, {}

    def _draw(self) -> Any:
        obs = {
            "far": self.np_random.normal([5.0, -100.0, 0.5], [1.0, 20.0, 0.1]).astype(np.float32),
            "near": self.np_random.normal([1.0, -2.0], 3.0).astype(np.float32),
            "kind": int(self.np_random.integers(4)),
        }
        self.seen.append(obs)
        return obs if isinstance(self.observation_space, spaces.Dict) else obs["far"]

    def forget(self) -> None:
        """Leave out what the main process's copy has seen."""
        self.seen.clear()
        self.returns.clear()


class Seen(BaseCallback):
    """Collects what the environments of the workers have seen, at the end of training."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.obs: list[dict[str, Any]] = []
        self.returns: list[float] = []
        self.rewards: list[float] = []  #: and these two as a callback sees them
        self.new_obs: list[Any] = []

    def _on_training_start(self) -> None:
        self.training_env.env_method("forget")

    def _on_step(self) -> bool:
        self.rewards.extend(self.locals["rewards"])
        self.new_obs.append(self.locals["new_obs"])
        return self.n_calls != self.stop_at

    def _on_training_end(self) -> None:
        self.obs = [obs for seen in self.training_env.get_attr("seen") for obs in seen]
        self.returns = [value for seen in self.training_env.get_attr("returns") for value in seen]

    def parts(self, key: str) -> npt.NDArray[np.float64]:
        return np.array([obs[key] for obs in self.obs], dtype=np.float64)


def noise(n_envs: int, obs_space: spaces.Space[Any] = VECTOR, vec_env: Any = DummyVecEnv) -> VecEnv:
    env: VecEnv = vec_env([lambda: Noise(obs_space)] * n_envs)
    return env


def obs_rms(env: VecNormalize) -> Any:
    return env.obs_rms


def assert_statistics(actual: RunningMeanStd, expected: RunningMeanStd) -> None:
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(actual.var, expected.var, rtol=1e-6)
    assert actual.count == pytest.approx(expected.count, rel=1e-12)


def of_all(batches: list[npt.NDArray[Any]]) -> RunningMeanStd:
    """Statistics of all batches, computed in one place."""
    statistic = RunningMeanStd(shape=batches[0].shape[1:])
    for batch in batches:
        statistic.update(batch)
    return statistic


BOTH = pytest.mark.parametrize("n_workers", [0, 2])


@pytest.mark.parametrize(("n_workers", "vec_env"), [(0, DummyVecEnv), (2, DummyVecEnv), (2, SubprocVecEnv)])
def test_statistics_are_those_of_everything_seen(n_workers: int, vec_env: type[VecEnv], tmp_path: Path) -> None:
    env = VecNormalize(noise(4, vec_env=vec_env), gamma=GAMMA)
    seen = Seen()
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=8).learn(640, callback=seen)
    assert model.num_timesteps == 640
    assert len(seen.obs) == 640 + 4  # the steps, and the first reset of each environment
    assert len(seen.returns) == 640
    assert_statistics(obs_rms(env), of_all([seen.parts("far")]))
    assert_statistics(env.ret_rms, of_all([np.array(seen.returns)]))

    # a second call continues, and what is saved is what was merged
    again = Seen()
    model.learn(160, callback=again)
    both = of_all([seen.parts("far"), again.parts("far")])
    assert_statistics(obs_rms(env), both)
    env.save(str(tmp_path / "statistics.pkl"))
    loaded = VecNormalize.load(str(tmp_path / "statistics.pkl"), noise(1))
    assert_statistics(obs_rms(loaded), both)
    assert_statistics(loaded.ret_rms, of_all([np.array(seen.returns), np.array(again.returns)]))
    obs = np.array([4.0, -90.0, 0.6])
    np.testing.assert_array_equal(loaded.normalize_obs(obs), env.normalize_obs(obs))
    env.close()


@BOTH
def test_steps_of_an_unfinished_rollout_count(n_workers: int) -> None:
    env = VecNormalize(noise(4), gamma=GAMMA)
    seen = Seen(stop_at=30)
    model = A3C("MlpPolicy", env, n_workers=n_workers, n_steps=50).learn(100_000, callback=seen)
    assert len(seen.obs) >= model.num_timesteps + 4
    assert_statistics(obs_rms(env), of_all([seen.parts("far")]))
    assert_statistics(env.ret_rms, of_all([np.array(seen.returns)]))


@BOTH
def test_dict_observations_without_norm_reward(n_workers: int) -> None:
    env = VecNormalize(noise(4, DICT), gamma=GAMMA, norm_obs_keys=["near", "far"], norm_reward=False)
    seen = Seen()
    A3C("MultiInputPolicy", env, n_workers=n_workers).learn(800, callback=seen)
    assert isinstance(obs_rms(env), dict)
    assert obs_rms(env).keys() == {"near", "far"}
    for key, statistic in obs_rms(env).items():
        assert_statistics(statistic, of_all([seen.parts(key)]))
    assert np.mean(seen.rewards) == pytest.approx(2.0, abs=0.2)


@BOTH
def test_frozen_statistics_are_used_unchanged(n_workers: int) -> None:
    env = VecNormalize(noise(4), gamma=GAMMA, training=False)
    vars(env)["obs_rms"] = of_all([np.array([[5.0, -100.0, 0.5]] * 3 + [[6.0, -80.0, 0.6]] * 3)])
    env.ret_rms.var = np.array(16.0)
    before = (obs_rms(env).copy(), env.ret_rms.copy())
    seen = Seen()
    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=10).learn(1000, callback=seen)
    for statistic, old in zip((obs_rms(env), env.ret_rms), before, strict=True):
        np.testing.assert_array_equal(statistic.mean, old.mean)
        np.testing.assert_array_equal(statistic.var, old.var)
        assert statistic.count == old.count
    # rewards are drawn from N(2, 1), and divided by the root of 16
    assert np.mean(seen.rewards) == pytest.approx(0.5, abs=0.05)
    assert np.std(seen.rewards) == pytest.approx(0.25, abs=0.03)
    obs = np.concatenate(seen.new_obs[9::10])  # at the ends of rollouts
    expected = (np.array([5.0, -100.0, 0.5]) - obs_rms(env).mean) / np.sqrt(obs_rms(env).var)
    np.testing.assert_allclose(obs.mean(axis=0), expected, atol=1.0)  # five standard errors


@BOTH
def test_a_callback_may_freeze_the_statistics(n_workers: int) -> None:
    env = VecNormalize(noise(4), gamma=GAMMA)
    counts: list[float] = []

    class Freeze(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls >= 25:
                env.training = False
            counts.append(obs_rms(env).count)
            return True

    A3C("MlpPolicy", env, n_workers=n_workers, n_steps=5).learn(1200, callback=Freeze())
    # a worker may be a few rollouts ahead, and is told between two of them
    assert 100 <= counts[-1] < 100 + 2 * 2 * 5 * 8
    assert counts[-1] == counts[150]


def test_two_vec_normalize_in_one_stack() -> None:
    inner = VecNormalize(noise(4), gamma=GAMMA, norm_obs=False)
    outer = VecNormalize(VecFrameStack(inner, 2), gamma=GAMMA, norm_reward=False)
    seen = Seen()
    A3C("MlpPolicy", outer, n_workers=2).learn(800, callback=seen)
    assert not hasattr(inner, "obs_rms")
    assert obs_rms(outer).count == pytest.approx(804)
    newest = of_all([seen.parts("far")])
    np.testing.assert_allclose(obs_rms(outer).mean[3:], newest.mean, rtol=1e-6)
    assert_statistics(inner.ret_rms, of_all([np.array(seen.returns)]))


# --- without training -----------------------------------------------------------------------------------------------


def test_deltas_are_exact_and_reported_once() -> None:
    user, first, second = (VecNormalize(noise(2)) for _ in range(3))
    for worker in (first, second):
        record_deltas(worker)
    rng = np.random.default_rng(0)
    batches = [rng.normal(3.0, 2.0, (2, 3)) for _ in range(20)]
    merger = StatisticsMerger(user, 3)
    for i, batch in enumerate(batches):
        worker, other = (first, second) if i % 3 else (second, first)
        obs_rms(worker).update(batch)
        if i % 4 == 0:
            deltas = pop_deltas(worker)
            merge_deltas(user, deltas)
            merge_deltas(other, deltas)
    waiting = 0.0
    for worker, other in ((first, second), (second, first)):
        deltas = pop_deltas(worker)
        waiting += deltas[1].count
        merger.merge(0, deltas)
        merge_deltas(other, deltas)
        assert all(new.count == 0 for new in pop_deltas(worker))  # deltas of others are not recorded
    expected = of_all(batches)
    for env in (user, first, second):
        assert_statistics(obs_rms(env), expected)
        assert env.ret_rms.count == 1e-4  # there were no rewards
    assert [merger.pop(worker)[1].count for worker in (0, 1, 1)] == [0, waiting, 0]
    assert 0 < waiting < 40


def test_options_are_copied_from_one_stack_to_another() -> None:
    one, other = (VecFrameStack(VecNormalize(noise(2)), 2) for _ in range(2))
    assert isinstance(one.venv, VecNormalize)
    one.venv.training, one.venv.clip_obs = False, 3.0
    assert options(one) != options(other)
    set_options(other, options(one))
    assert options(one) == options(other)
    assert options(noise(2)) == []
