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
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecTransposeImage

from sb3_a3c.envs.sharding import EnvShare, clone_env, deal, split_env, take_share
from sb3_a3c.envs.wrapper_state import FirstReset, begin_episodes, continue_from, pending_seeds, wrappers

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (14, 13, 3), dtype=np.uint8)  # channels are the smallest axis also when stacked by 4
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR})


class Dice(gym.Env[Any, Any]):
    """Draws observations and the rest of the reward from the seeded generator; episodes last 4 steps on average."""

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


def dummy(env: VecEnv) -> DummyVecEnv:
    assert isinstance(env.unwrapped, DummyVecEnv)
    return env.unwrapped


def parts(obs: Any) -> dict[str, npt.NDArray[Any]]:
    """Copies, as wrappers return their buffers"""
    return {key: np.array(value) for key, value in (obs.items() if isinstance(obs, dict) else [("", obs)])}


def assert_same(one: Any, other: Any) -> None:
    assert parts(one).keys() == parts(other).keys()
    for key, value in parts(one).items():
        assert value.dtype == parts(other)[key].dtype
        np.testing.assert_array_equal(value, parts(other)[key])


def rows_of(obs: Any, rows: Sequence[int]) -> Any:
    return {key: value[list(rows)] for key, value in obs.items()} if isinstance(obs, dict) else obs[list(rows)]


def play(env: VecEnv, n_steps: int, indices: Sequence[int] | None = None) -> list[tuple[Any, ...]]:
    """Reset, then step with actions that depend on the step and on the environment's index (of at most 5)."""
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


# --- shares ---


def test_deal_is_even_and_complete() -> None:
    assert deal(5, 2) == [(0, 1), (2, 3, 4)]
    for n_envs in range(1, 20):
        for n_workers in range(1, n_envs + 1):
            shares = deal(n_envs, n_workers)
            assert [i for share in shares for i in share] == list(range(n_envs))
            sizes = {len(share) for share in shares}
            assert len(shares) == n_workers
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 0


def test_shares_step_as_the_unsplit_environment(stack: VecEnv) -> None:
    taken = take_share(stack, [3, 1])
    assert taken.num_envs == 2
    assert all(mine is dummy(stack).envs[i] for mine, i in zip(dummy(taken).envs, (3, 1), strict=True))
    seeds = [11, 22, 33, 44, 55]
    stack.reset()
    stack.step(np.zeros(5, dtype=int))  # shares are taken in mid-episode
    indices = [*deal(5, 2), (4, 0)]
    shares = split(stack, indices, seeds)
    whole = play(begin(stack, seeds), 30)
    assert sum(int(dones.sum()) for _, _, dones, _ in whole[1:]) > 10
    for share, mine in zip(shares, indices, strict=True):
        env = share.open()
        assert [type(wrapper) for wrapper in wrappers(env)] == [type(wrapper) for wrapper in wrappers(stack)]
        assert (env.observation_space, env.action_space) == (stack.observation_space, stack.action_space)
        assert_same_episodes(play(env, 30, mine), whole, mine)
        assert env.get_attr("np_random_seed") == [seeds[i] for i in mine]
        env.close()


def test_an_opened_share_keeps_no_copy() -> None:
    (share,) = split(dice(1), [(0,)], [7])
    assert share.data
    share.open()
    assert not share.data


def test_opening_a_share_leaves_the_original_alone() -> None:
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


# --- what can't be split or sent ---


class SpecialVecEnv(DummyVecEnv):
    pass


class SpecialFrameStack(VecFrameStack):
    pass


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("SpecialVecEnv", lambda env: VecFrameStack(SpecialVecEnv([Dice]), 2)),
        ("SpecialFrameStack", lambda env: SpecialFrameStack(env, 2)),
    ],
)
def test_unknown_classes_can_not_be_split(name: str, wrap: Stack) -> None:
    env = wrap(dice(2))
    for function in (lambda: take_share(env, [0]), lambda: split(env, [(0,)], [1, 2])):
        with pytest.raises(ValueError, match=rf"{name}.*n_workers=0"):
            function()


@pytest.mark.parametrize("thing", ["file", "lock"])
def test_files_and_locks_can_not_be_sent(thing: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        single = Dice()
        vars(single)["thing"] = file if thing == "file" else threading.Lock()
        hint = rf"can't be sent to worker processes: .*{thing}.*SubprocVecEnv.*n_workers=0"
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
        return gym.wrappers.TransformObservation(Local(Dice()), lambda obs: 2 * obs, VECTOR)

    (share,), (plain,) = (split(env, [(0,)], [3]) for env in (DummyVecEnv([make]), dice(1)))
    ours, reference = play(share.open(), 10), play(plain.open(), 10)
    assert_same(ours[0][0], {"": 2 * reference[0][0][""]})
    for (obs, rewards, *_), (plain_obs, plain_rewards, *_) in zip(ours[1:], reference[1:], strict=True):
        assert_same(obs, {"": 2 * plain_obs[""]})
        np.testing.assert_array_equal(rewards, plain_rewards + 1000)


# --- monitor files ---


def episodes(env: VecEnv, n_episodes: int) -> list[float]:
    """Play episodes of a single environment: their returns"""
    returns: list[float] = []
    env.reset()
    while len(returns) < n_episodes:
        _, _, _, infos = env.step(np.array([1]))
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    return returns


def monitor_rows(file: Path) -> tuple[str, list[dict[str, str]]]:
    header, *lines = file.read_text().splitlines()
    return header, list(csv.DictReader(lines))


def test_monitor_files_are_continued(tmp_path: Path) -> None:
    env = make_vec_env(Dice, monitor_dir=str(tmp_path), monitor_kwargs={"info_keywords": ("die",)})
    file = tmp_path / "0.monitor.csv"
    returns = episodes(env, 3)
    header = monitor_rows(file)[0]
    for _ in range(2):  # the second as for a worker that was replaced
        (share,) = split(env, [(0,)], [1])
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
    assert all(row["die"] == "0" for row in rows)  # the number that ends an episode, in the column of its name


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


def test_a_game_of_several_lives_begins_anew() -> None:
    fresh, env = begin(breakout(), [5]), breakout()
    lose_a_life(env)
    env.reset()
    assert lives(env) == 4  # SB3's wrapper continues the game
    env.step(np.array([0]))
    (share,) = split(env, [(0,)], [5])
    actions = np.arange(30)[:, None] % 4
    first_obs, expected = fresh.reset(), [fresh.step(action)[:3] for action in actions]
    for again in (share.open(), begin(env, [5])):
        assert_same(again.reset(), first_obs)
        assert lives(again) == 5
        for action, (other_obs, other_reward, other_done) in zip(actions, expected, strict=True):
            obs, reward, done, _ = again.step(action)
            assert_same(obs, other_obs)
            assert (reward[0], done[0]) == (other_reward[0], other_done[0])


def test_begin_episodes_seeds_the_next_reset() -> None:
    env = VecFrameStack(dice(5), 3)
    assert pending_seeds(env) == [None] * 5
    play(env, 3)
    assert begin(env, (1, 2, 3, 4, 5)) is env
    assert pending_seeds(env) == [1, 2, 3, 4, 5]
    pending_seeds(env).clear()  # a copy
    first = parts(env.reset())
    assert env.get_attr("np_random_seed") == [1, 2, 3, 4, 5]
    assert pending_seeds(env) == [None] * 5
    assert not np.array_equal(first[""], parts(env.reset())[""])  # not seeded again
    begin(env, (1, 2, 3, 4, 5))
    assert_same(env.reset(), first)


def test_a_monitor_that_forbids_early_resets() -> None:
    env = DummyVecEnv([lambda: Monitor(Dice(), allow_early_resets=False)])
    env.reset()  # as SB3's learn does
    (share,) = split(env, [(0,)], [1])
    assert_same(share.open().reset(), begin(env, [1]).reset())


class Foreign(VecEnv):
    """A VecEnv without the methods for wrappers, like those of some simulators"""

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


def test_begin_episodes_of_a_vec_env_without_wrapper_methods() -> None:
    first = parts(begin(dice(2), [1, 2]).reset())
    assert_same(begin(Foreign(dice(2)), [1, 2]).reset(), first)


# --- clones ---


@pytest.mark.parametrize("monitored_already", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_clones_are_different_objects_each_under_one_monitor(monitored_already: bool, n_envs: int) -> None:
    original = Monitor(Dice()) if monitored_already else Dice()
    env = clone_env(original, n_envs)
    assert type(env) is DummyVecEnv
    assert env.num_envs == n_envs
    assert len({id(single.unwrapped) for single in env.envs}) == n_envs
    assert env.envs[0].unwrapped is original.unwrapped
    assert (env.envs[0] is original) == monitored_already
    for single in env.envs:
        assert isinstance(single, Monitor)
        assert not is_wrapped(single.env, Monitor)


def test_clones_are_independent_and_can_be_split() -> None:
    env, seeds, indices = clone_env(Dice(IMAGE), 4), [3, 3, 4, 5], deal(4, 2)
    shares = split(env, indices, seeds)
    whole = play(begin(env, seeds), 20)
    np.testing.assert_array_equal(whole[0][0][""][0], whole[0][0][""][1])
    assert not np.array_equal(whole[0][0][""][1], whole[0][0][""][2])
    assert any("episode" in info for _, _, _, infos in whole[1:] for info in infos)
    for share, mine in zip(shares, indices, strict=True):
        assert_same_episodes(play(share.open(), 20, mine), whole, mine)
