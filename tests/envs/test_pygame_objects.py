"""Environments that were rendered with pygame train in workers, which have the same pictures."""

import threading
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pygame
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C
from sb3_a3c.envs.pickling import dump_env, load_env
from tests.toy_envs import Countdown

pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # of Box2D, at its import
#: Whose versions differ between those of gymnasium.
TAXI = max(name for name in gym.registry if name.startswith("Taxi-"))


@pytest.fixture(autouse=True)
def _no_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")
    pygame.quit()
    yield
    pygame.quit()


class Drawn(Countdown):
    """Observes a picture, which it draws with what its constructor made; half of it is a part of the other surface."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def __init__(self) -> None:
        super().__init__()
        self.picture = pygame.Surface((8, 8))
        self.half = self.picture.subsurface((4, 0, 4, 8))
        self.clock = pygame.time.Clock()
        self.sprite = pygame.Surface((2, 2), pygame.SRCALPHA)
        self.sprite.fill((200, 100, 0, 128))
        self.stencil = pygame.Surface((2, 2))
        self.stencil.fill((9, 9, 9))
        self.stencil.set_at((0, 0), (0, 0, 255))
        self.stencil.set_colorkey((9, 9, 9))
        self.shadow = pygame.Surface((2, 2))
        self.shadow.set_alpha(100)

    def observation(self) -> Any:
        self.picture.fill((30, 60, 90))
        self.half.fill((0, 50, 0))
        for row, surface in enumerate((self.sprite, self.stencil, self.shadow)):
            self.picture.blit(surface, (self.t % 7, 2 * row))
        return pygame.surfarray.array3d(self.picture)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("CartPole-v1", "human"),
        *((name, "rgb_array") for name in ("CartPole-v1", "MountainCar-v0", "FrozenLake-v1", TAXI, "Blackjack-v1")),
    ],
)
def test_a_rendered_environment_renders_in_its_copy(name: str, mode: str) -> None:
    env = gym.make(name, render_mode=mode)
    env.reset(seed=0)
    env.render()
    copy = load_env(*dump_env(env))
    for each in (env, copy):
        each.reset(seed=1)
    before, after = env.render(), copy.render()
    if mode == "rgb_array":
        np.testing.assert_array_equal(before, after)
    assert env.step(1)[0] == pytest.approx(copy.step(1)[0])


def test_lunar_lander_is_named_only_what_reset_makes() -> None:
    env = gym.make("LunarLander-v3", render_mode="human")
    env.reset(seed=0)
    env.render()
    with pytest.warns(UserWarning, match=r"but for \['drawlist', 'lander', 'legs', 'moon'\], which can't be pickled"):
        copy = load_env(*dump_env(env))
    copy.reset(seed=0)
    copy.step(2)


def test_surfaces_have_their_pixels() -> None:
    env = Drawn()
    copy = load_env(*dump_env(env))
    for each in (env, copy):
        each.reset()
    for _ in range(9):
        observation = env.step(0)[0]
        np.testing.assert_array_equal(copy.step(0)[0], observation)
        assert len(np.unique(observation.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize("mode", ["rgb_array", "human"])
def test_reset_render_and_learn(mode: str) -> None:
    env = gym.make("CartPole-v1", render_mode=mode)
    env.reset()
    env.render()
    model = A3C("MlpPolicy", env, n_steps=10, n_workers=1).learn(20)
    assert model.num_timesteps == 20
    assert (env.render() is None) == (mode == "human")  # the user's is as it was


def test_what_can_not_be_pickled_after_playing_is_told() -> None:
    env = make_vec_env(Countdown, 2)
    env.set_attr("viewer", threading.Lock())
    model = A3C("MlpPolicy", env, n_workers=2)
    with pytest.raises(ValueError, match=r"pickling them raised TypeError.*take new.*`model\.set_env\(make_vec_env\(…\)\)`"):
        model.learn(20)
    model.set_env(make_vec_env(Countdown, 2))
    model.learn(20)
