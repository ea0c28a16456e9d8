"""A worker's share of the user's environments: the same wrappers, the same episodes, the same monitor files."""

import csv
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped, make_atari_env, make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_a3c.envs.sharding import EnvShare, clone_env, deal, split_env, take_share
from sb3_a3c.envs.wrapper_state import FirstReset, begin_episodes, continue_from, pending_seeds

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (14, 13, 3), dtype=np.uint8)  # channels are the smallest axis also when stacked by 4
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR})


class Dice(gym.Env[Any, Any]):
    """All but the action's part of the reward is drawn from the seeded generator; episodes last 4 steps on average."""

    def __init__(self, obs_space: spaces.Space[Any] = VECTOR) -> None:
        self.observation_space = obs_space
        self.action_space = spaces.Discrete(10)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._draw(self.observation_space), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        die, coin = self.np_random.integers(4), self.np_random.integers(2)
        obs, reward = self._draw(self.observation_space), 100.0 * int(action) + float(die)
        return obs, reward, bool(die == 0 and coin == 0), bool(die == 0 and coin == 1), {"die": int(die)}

    def _draw(self, space: spaces.Space[Any]) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._draw(part) for key, part in space.spaces.items()}
        assert space.shape is not None
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape, dtype=np.uint8)
        return self.np_random.normal(size=space.shape).astype(np.float32)


def first_reset(seeds: Sequence[int]) -> FirstReset:
    return FirstReset(tuple(seeds), ({},) * len(seeds))


def split(env: VecEnv, shares: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[EnvShare]:
    return split_env(env, shares, first_reset(seeds))


def begin(env: VecEnv, seeds: Sequence[int]) -> VecEnv:
    return begin_episodes(env, first_reset(seeds))


def dice(n_envs: int, obs_space: spaces.Space[Any] = VECTOR) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Dice(obs_space))] * n_envs)


Stack = Callable[[VecEnv], VecEnv]

STACKS: dict[str, tuple[spaces.Space[Any], Stack]] = {
    "plain": (VECTOR, lambda env: env),
    "plain dict": (DICT, lambda env: env),
    "stacked vectors": (VECTOR, lambda env: VecFrameStack(env, 3)),
    "stacked vectors, first": (VECTOR, lambda env: VecFrameStack(env, 2, channels_order="first")),
    "stack(transpose)": (IMAGE, lambda env: VecFrameStack(VecTransposeImage(env), 4)),
    "transpose(stack)": (IMAGE, lambda env: VecTransposeImage(VecFrameStack(env, 4))),
    "transpose, skipped": (IMAGE, lambda env: VecTransposeImage(env, skip=True)),
    "dict, stack(transpose)": (DICT, lambda env: VecFrameStack(VecTransposeImage(env), 4)),
    "dict, transpose(stack)": (DICT, lambda env: VecTransposeImage(VecFrameStack(env, 4))),
    "dict, orders": (DICT, lambda env: VecFrameStack(env, 2, channels_order={"image": "first", "vector": "last"})),
}


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> Iterator[VecEnv]:
    """5 environments under some stack of wrappers"""
    obs_space, wrap = STACKS[request.param]
    env = wrap(dice(5, obs_space))
    yield env
    env.close()


def layers(env: VecEnv) -> list[type[VecEnv]]:
    kinds: list[type[VecEnv]] = [type(env)]
    while isinstance(env, VecEnvWrapper):
        env = env.venv
        kinds.append(type(env))
    return kinds


def dummy(env: VecEnv) -> DummyVecEnv:
    assert isinstance(env.unwrapped, DummyVecEnv)
    return env.unwrapped


def parts(obs: Any) -> dict[str, npt.NDArray[Any]]:
    """Copies: wrappers hand out their buffers"""
    return {key: np.array(value) for key, value in (obs.items() if isinstance(obs, dict) else [("", obs)])}


def assert_same(one: Any, other: Any) -> None:
    assert parts(one).keys() == parts(other).keys()
    for key, value in parts(one).items():
        assert value.dtype == parts(other)[key].dtype
        np.testing.assert_array_equal(value, parts(other)[key])


def rows_of(obs: Any, rows: Sequence[int]) -> Any:
    return {key: value[list(rows)] for key, value in obs.items()} if isinstance(obs, dict) else obs[list(rows)]


def play(env: VecEnv, n_steps: int, indices: Sequence[int] | None = None) -> list[tuple[Any, ...]]:
    """Reset and step with actions that depend on the step and on which of 5 environments it is."""
    actions = np.random.default_rng(0).integers(0, 10, (n_steps, 5))[:, list(indices or range(env.num_envs))]
    log: list[tuple[Any, ...]] = [(parts(env.reset()),)]
    for t in range(n_steps):
        obs, rewards, dones, infos = env.step(actions[t])
        log.append((parts(obs), rewards.copy(), dones.copy(), infos))
    return log


def assert_same_episodes(ours: list[tuple[Any, ...]], whole: list[tuple[Any, ...]], indices: Sequence[int]) -> None:
    assert_same(ours[0][0], rows_of(whole[0][0], indices))
    for (obs, rewards, dones, infos), (all_obs, all_rewards, all_dones, all_infos) in zip(ours[1:], whole[1:], strict=True):
        assert_same(obs, rows_of(all_obs, indices))
        np.testing.assert_array_equal(rewards, all_rewards[list(indices)])
        np.testing.assert_array_equal(dones, all_dones[list(indices)])
        for info, other in zip(infos, [all_infos[i] for i in indices], strict=True):
            assert info.keys() == other.keys()
            assert (info["die"], info["TimeLimit.truncated"]) == (other["die"], other["TimeLimit.truncated"])
            if "terminal_observation" in info:
                assert_same(info["terminal_observation"], other["terminal_observation"])


# --- dealing ---


@pytest.mark.parametrize(
    ("n_envs", "n_workers", "shares"),
    [
        (5, 2, [(0, 1), (2, 3, 4)]),
        (4, 2, [(0, 1), (2, 3)]),
        (3, 3, [(0,), (1,), (2,)]),
        (3, 1, [(0, 1, 2)]),
        (1, 1, [(0,)]),
        (8, 3, [(0, 1), (2, 3, 4), (5, 6, 7)]),
    ],
)
def test_deal(n_envs: int, n_workers: int, shares: list[tuple[int, ...]]) -> None:
    assert deal(n_envs, n_workers) == shares


def test_every_deal_is_even_and_complete() -> None:
    for n_envs in range(1, 20):
        for n_workers in range(1, n_envs + 1):
            shares = deal(n_envs, n_workers)
            assert [i for share in shares for i in share] == list(range(n_envs))
            sizes = {len(share) for share in shares}
            assert len(shares) == n_workers
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 0


# --- shares ---


def test_a_share_has_the_same_environments_under_the_same_wrappers(stack: VecEnv) -> None:
    share = take_share(stack, [3, 1])
    assert share.num_envs == 2
    assert layers(share) == layers(stack)
    assert share.observation_space == stack.observation_space
    assert share.action_space == stack.action_space
    mine, all_envs = dummy(share).envs, dummy(stack).envs
    assert mine[0] is all_envs[3]
    assert mine[1] is all_envs[1]


def test_shares_step_as_the_unsplit_environment_does(stack: VecEnv) -> None:
    seeds = [11, 22, 33, 44, 55]
    stack.reset()
    stack.step(np.zeros(5, dtype=int))  # shares are taken in mid-game
    indices = [*deal(5, 2), (4, 0)]
    shares = split(stack, indices, seeds)
    whole = play(begin(stack, seeds), 30)
    assert sum(int(dones.sum()) for _, _, dones, _ in whole[1:]) > 10
    for share, mine in zip(shares, indices, strict=True):
        env = share.open()
        assert layers(env) == layers(stack)
        assert env.observation_space == stack.observation_space
        assert_same_episodes(play(env, 30, mine), whole, mine)
        env.close()


def test_a_share_opened_twice_plays_the_same_episodes_twice() -> None:
    (share,) = split(dice(2), [(0, 1)], [7, 8])
    first, second = share.open(), share.open()
    assert dummy(first).envs[0] is not dummy(second).envs[0]
    log = play(first, 30)
    assert_same_episodes(log, play(second, 30), (0, 1))
    others = play(EnvShare(share.data, (), first_reset([9, 8])).open(), 30)
    (first_obs,), (other_obs,) = log[0], others[0]
    np.testing.assert_array_equal(first_obs[""][1], other_obs[""][1])
    assert not np.array_equal(first_obs[""][0], other_obs[""][0])


def test_seeds_are_those_of_the_share() -> None:
    shares = split(dice(5), [(0, 2), (4, 3)], [10, 11, 12, 13, 14])
    for share, seeds in zip(shares, ([10, 12], [14, 13]), strict=True):
        env = share.open()
        assert pending_seeds(env) == seeds
        env.reset()
        assert env.get_attr("np_random_seed") == seeds


def test_opening_a_pickled_share_leaves_the_original_alone() -> None:
    env = dice(2)
    env.seed(5)
    first = env.reset()
    generators = [single.unwrapped.np_random.bit_generator.state for single in env.envs]
    for share in split(env, [(0,), (1,)], [7, 8]):
        play(share.open(), 20)
    assert [single.unwrapped.np_random.bit_generator.state for single in env.envs] == generators
    assert pending_seeds(env) == [None, None]
    env.seed(5)
    assert_same(env.reset(), first)


def test_pending_seeds_are_those_of_the_next_reset(stack: VecEnv) -> None:
    assert pending_seeds(stack) == [None] * 5
    stack.seed(40)
    assert pending_seeds(stack) == [40, 41, 42, 43, 44]
    pending_seeds(stack).clear()  # a copy
    stack.reset()
    assert stack.get_attr("np_random_seed") == [40, 41, 42, 43, 44]
    assert pending_seeds(stack) == [None] * 5


# --- what can't be split or sent ---


class SpecialVecEnv(DummyVecEnv):
    """Who knows what it does"""


class SpecialFrameStack(VecFrameStack):
    """Who knows what it does"""


class SpecialNormalize(VecNormalize):
    """Who knows what it does"""


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("SpecialVecEnv", lambda env: SpecialVecEnv([Dice])),
        ("SpecialVecEnv", lambda env: VecFrameStack(SpecialVecEnv([Dice]), 2)),
        ("SpecialFrameStack", lambda env: SpecialFrameStack(env, 2)),
        ("SpecialNormalize", SpecialNormalize),
        ("SpecialNormalize", lambda env: VecFrameStack(SpecialNormalize(env), 2)),
    ],
)
def test_what_can_not_be_split_says_what_to_do(name: str, wrap: Stack) -> None:
    env = wrap(dice(2))
    with pytest.raises(ValueError, match=rf"{name}.*n_workers=0"):
        take_share(env, [0])
    with pytest.raises(ValueError, match=rf"{name}.*n_workers=0"):
        split(env, [(0,)], [1, 2])


class Holding(gym.Wrapper[Any, Any, Any, Any]):
    """An environment with something in its pocket"""

    def __init__(self, env: gym.Env[Any, Any], thing: Any) -> None:
        super().__init__(env)
        self.thing = thing


@pytest.mark.parametrize("thing", ["file", "lock"])
def test_what_can_not_be_sent_says_what_to_do(thing: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        single = Holding(Dice(), file if thing == "file" else threading.Lock())
        hint = r"can't be sent to worker processes: .*(file|lock).*n_workers=0"
        with pytest.raises(ValueError, match=hint) as caught:
            split(DummyVecEnv([lambda: single]), [(0,)], [1])
        assert caught.value.__cause__ is not None
        with pytest.raises(ValueError, match=hint):
            clone_env(single, 2)


def test_lambdas_and_local_classes_can_be_sent() -> None:
    offset = 1000.0

    class Local(gym.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return float(reward) + offset

    def make() -> gym.Env[Any, Any]:
        doubled = gym.wrappers.TransformObservation(Local(Dice()), lambda obs: 2 * obs, VECTOR)
        return Holding(doubled, lambda x: x + offset)

    env = DummyVecEnv([make])
    (share,) = split(env, [(0,)], [3])
    (plain,) = split(dice(1), [(0,)], [3])
    opened = share.open()
    assert opened.get_attr("thing")[0](1) == 1001
    ours, reference = play(opened, 10), play(plain.open(), 10)
    assert_same(ours[0][0], {"": 2 * reference[0][0][""]})
    for (obs, rewards, *_), (plain_obs, plain_rewards, *_) in zip(ours[1:], reference[1:], strict=True):
        assert_same(obs, {"": 2 * plain_obs[""]})
        np.testing.assert_array_equal(rewards, plain_rewards + 1000)


# --- monitor files ---


def episodes(env: VecEnv, n_episodes: int) -> list[float]:
    """Play so many episodes of a single environment: their returns"""
    returns: list[float] = []
    env.reset()
    while len(returns) < n_episodes:
        _, _, _, infos = env.step(np.array([1]))
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    return returns


def monitored(folder: Path, n_envs: int = 1) -> VecEnv:
    return make_vec_env(Dice, n_envs, seed=0, monitor_dir=str(folder), monitor_kwargs={"info_keywords": ("die",)})


def monitor_rows(file: Path) -> tuple[str, list[dict[str, str]]]:
    header, *lines = file.read_text().splitlines()
    return header, list(csv.DictReader(lines))


def test_monitor_files_go_on_where_they_are(tmp_path: Path) -> None:
    env = monitored(tmp_path)
    file = tmp_path / "0.monitor.csv"
    returns = episodes(env, 3)
    header = monitor_rows(file)[0]
    (share,) = split(env, [(0,)], [1])
    assert len(monitor_rows(file)[1]) == 3
    for _ in range(2):  # as a worker that was replaced would
        opened = share.open()
        assert len(monitor_rows(file)[1]) == len(returns)
        returns += episodes(opened, 4)
        opened.close()
    continue_from(env, [])
    returns += episodes(env, 3)
    env.close()
    assert header.startswith('#{"t_start": ')
    assert monitor_rows(file)[0] == header
    rows = monitor_rows(file)[1]
    assert [list(row) for row in rows] == [["r", "l", "t", "die"]] * 14
    assert [float(row["r"]) for row in rows] == returns
    assert all(row["die"] == "0" for row in rows)  # the figure that ends an episode, in the column of its name


def test_each_environment_keeps_its_own_monitor_file(tmp_path: Path) -> None:
    env = VecFrameStack(monitored(tmp_path, 3), 2)
    shares = split(env, [(0,), (1, 2)], [1, 2, 3])
    for share in shares:
        opened = share.open()
        play(opened, 40)
        opened.close()
    continue_from(env, [])
    play(env, 40)
    env.close()
    for i in range(3):
        header, rows = monitor_rows(tmp_path / f"{i}.monitor.csv")
        assert header.startswith("#")
        assert len(rows) >= 8
        assert all(None not in row.values() and int(row["l"]) > 0 and float(row["r"]) >= 0 for row in rows)


def test_environments_without_monitor_files_need_nothing() -> None:
    continue_from(dice(2), [])
    continue_from(DummyVecEnv([Dice]), [])
    continue_from(SubprocVecEnv.__new__(SubprocVecEnv), [])


# --- new episodes ---


def breakout() -> VecEnv:
    return make_atari_env("BreakoutNoFrameskip-v4", n_envs=1)


def lives(env: VecEnv) -> int:
    return int(dummy(env).envs[0].unwrapped.ale.lives())  # type: ignore[attr-defined]


def lose_a_life(env: VecEnv) -> None:
    env.reset()
    for t in range(300):
        if env.step(np.array([1 if t % 2 else 3]))[2][0]:
            assert lives(env) == 4
            return
    raise AssertionError("no life was lost")


@pytest.mark.parametrize("pickled", [False, True])
def test_a_game_of_several_lives_really_begins_anew(pickled: bool) -> None:
    fresh, env = breakout(), breakout()
    lose_a_life(env)
    env.reset()
    assert lives(env) == 4  # what SB3's wrapper makes of a reset in mid-game
    env.step(np.array([0]))
    again = split(env, [(0,)], [5])[0].open() if pickled else begin(env, [5])
    expected = begin(fresh, [5])
    assert_same(again.reset(), expected.reset())
    assert lives(again) == 5
    for t in range(30):
        obs, reward, done, _ = again.step(np.array([t % 4]))
        other_obs, other_reward, other_done, _ = expected.step(np.array([t % 4]))
        assert_same(obs, other_obs)
        assert (reward[0], done[0]) == (other_reward[0], other_done[0])


def test_begin_episodes_seeds_each_environment_once(stack: VecEnv) -> None:
    play(stack, 3)
    assert begin(stack, (1, 2, 3, 4, 5)) is stack
    assert pending_seeds(stack) == [1, 2, 3, 4, 5]
    first = parts(stack.reset())
    assert stack.get_attr("np_random_seed") == [1, 2, 3, 4, 5]
    second = parts(stack.reset())  # goes on drawing
    assert all(not np.array_equal(first[key], second[key]) for key in first)
    begin(stack, (1, 2, 3, 4, 5))
    assert_same(stack.reset(), first)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_monitor_that_forbids_early_resets_is_no_obstacle(pickled: bool) -> None:
    env = DummyVecEnv([lambda: Monitor(Dice(), allow_early_resets=False)])
    env.reset()  # as SB3's learn does
    (split(env, [(0,)], [1])[0].open() if pickled else begin(env, [1])).reset()


class Foreign(VecEnv):
    """A VecEnv that knows nothing of wrappers, like those of some simulators"""

    def __init__(self, inside: VecEnv) -> None:
        self.inside = inside
        super().__init__(inside.num_envs, inside.observation_space, inside.action_space)

    def reset(self) -> Any:
        self.inside._seeds = self._seeds
        return self.inside.reset()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return self.inside.get_attr(attr_name, indices)

    def _unknown(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    step_async = step_wait = set_attr = env_method = env_is_wrapped = close = _unknown


def test_vec_envs_that_know_nothing_of_wrappers_begin_episodes_too() -> None:
    first = parts(begin(dice(2), [1, 2]).reset())
    assert_same(begin(Foreign(dice(2)), [1, 2]).reset(), first)


# --- clones ---


@pytest.mark.parametrize("monitored_already", [False, True])
def test_clones_are_different_objects_each_under_one_monitor(monitored_already: bool) -> None:
    original = Monitor(Dice()) if monitored_already else Dice()
    env = clone_env(original, 3)
    assert type(env) is DummyVecEnv
    assert env.num_envs == 3
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert len({id(single.unwrapped) for single in env.envs}) == 3
    assert env.envs[0].unwrapped is original.unwrapped
    for single in env.envs:
        assert isinstance(single, Monitor)
        assert not is_wrapped(single.env, Monitor)
    assert (env.envs[0] is original) == monitored_already


def test_clones_play_on_their_own() -> None:
    env = clone_env(Dice(IMAGE), 3)
    assert isinstance(env, DummyVecEnv)
    log = play(begin(env, [3, 3, 4]), 20)
    (one,) = split(dice(1, IMAGE), [(0,)], [4])
    np.testing.assert_array_equal(log[0][0][""][0], log[0][0][""][1])
    assert_same_episodes(play(one.open(), 20, [2]), log, [2])
    assert any("episode" in info for _, _, _, infos in log[1:] for info in infos)


def test_one_clone_is_the_environment_itself() -> None:
    original = Dice()
    env = clone_env(original, 1)
    assert env.num_envs == 1
    assert dummy(env).envs[0].unwrapped is original


def test_clones_can_be_dealt_out() -> None:
    env = clone_env(Dice(), 4)
    seeds = [1, 2, 3, 4]
    indices = deal(4, 2)
    shares = split(env, indices, seeds)
    whole = play(begin(env, seeds), 20)
    for share, mine in zip(shares, indices, strict=True):
        assert_same_episodes(play(share.open(), 20, mine), whole, mine)
