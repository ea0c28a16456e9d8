"""
Atari environments equal to those of SB3's ``make_atari_env``, but faster.

SB3's wrappers read every frame of the emulator in colour and resize whole frames. This module reads only the two frames of
four that are shown, in grey levels, and resizes only the parts that have changed. SB3's own wrappers do the rest frame by
frame (no-ops, lives, FIRE, ``Monitor``, the sign of rewards), so seeds, rewards, dones and infos are equal step for step.
The result is a ``DummyVecEnv``, with everything that SB3 and A3C can do with one.

ALE's own vectorised environment (``ale_py.AtariVectorEnv``) can't replace it: it steps all environments or none, whereas a
reset in SB3 may step one of them several times (a no-op after a lost life, FIRE, UP), and it does not return the rewards of
no-ops. On one core, which is what a worker has, both take about the same time. This one uses a single core, because ALE
holds Python's lock: for more, use A3C's workers or, with other algorithms, ``vec_env_cls=SubprocVecEnv``.
"""

import dataclasses
import functools
import inspect
import math
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.atari_wrappers import (
    ClipRewardEnv,
    EpisodicLifeEnv,
    FireResetEnv,
    NoopResetEnv,
    StickyActionEnv,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

try:
    import ale_py
    import cv2
except ImportError as error:
    raise ImportError(
        f"sb3_a3c.atari needs packages that the rest of sb3_a3c does not ({error}). "
        "Install them: pip install ale-py opencv-python-headless"
    ) from error

gym.register_envs(ale_py)

#: Games whose grey levels are wrong by more than 1 in ALE 0.12.1 (one of 103). They are read in colour.
_WRONG_GREYS = ("air_raid",)

#: Arguments of ALE's environments that say what an observation or an action is.
_FIXED_ENV_KWARGS = ("obs_type", "sound_obs", "continuous")


class GreyFrames(gym.Wrapper[Any, Any, Any, Any]):
    """
    SB3's ``MaxAndSkipEnv`` and ``WarpFrame`` in one, with grey levels read from the emulator.

    :param env: an environment of ALE, possibly wrapped; its observations are ignored
    :param skip: number of frames for which each action is repeated
    :param size: height and width of the observations
    """

    def __init__(self, env: gym.Env[Any, Any], skip: int, size: int) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (size, size, 1), np.uint8)
        self._skip = skip
        screen: tuple[int, int] = self._ale.getScreenDims()
        self._in_colour = env.unwrapped.spec is not None and env.unwrapped.spec.kwargs["game"] in _WRONG_GREYS
        self._read_screen = "getScreenRGB" if self._in_colour else "getScreenGrayscale"  # a method of the emulator
        # as in SB3 not cleared by a reset: a step that ends early, with the game, shows older frames
        self._last_two = np.zeros((2, *screen, 3) if self._in_colour else (2, *screen), dtype=np.uint8)
        self._frame = np.zeros(screen, dtype=np.uint8)
        self._picture = np.zeros((size, size), dtype=np.uint8)  # that frame, resized
        # shrunk from 210 to 84 lines, each 5 lines become 2 that depend on no others; enlarged, lines depend on neighbours
        self._n_stripes = math.gcd(size, screen[0]) if size <= min(screen) else 1

    def reset(self, **kwargs: Any) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """
        :param kwargs: those of ``gym.Env.reset``
        :return: the first frame, information
        """
        _, info = self.env.reset(**kwargs)
        return self._warped(_grey(self._ale.getScreenRGB())), info

    def step(self, action: Any) -> tuple[npt.NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """
        :param action: repeated for ``skip`` frames
        :return: the maximum of the last two frames, sum of rewards, terminated, truncated, information
        """
        total_reward = 0.0
        for frame in range(-self._skip, 0):
            _, reward, terminated, truncated, info = self.env.step(action)
            if frame >= -2:
                getattr(self._ale, self._read_screen)(self._last_two[frame])
            total_reward += float(reward)
            if terminated or truncated:
                break
        shown = np.maximum(*self._last_two)
        return self._warped(_grey(shown) if self._in_colour else shown), total_reward, terminated, truncated, info

    @property
    def _ale(self) -> Any:
        """The emulator; not an attribute, because unlike the environment it can't be pickled."""
        return self.unwrapped.ale  # type: ignore[attr-defined]

    def _warped(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize a frame as SB3 does, but only those stripes of lines that differ from the previous frame."""
        n_stripes, size, width = self._n_stripes, len(self._picture), frame.shape[1]
        # (height, width) -> (n_stripes, pixels of a stripe)
        changed = np.flatnonzero((frame != self._frame).reshape(n_stripes, -1).any(axis=1))
        if changed.size:
            # (height, width) -> (n_stripes, lines, width) -> (changed stripes * lines, width)
            lines = frame.reshape(n_stripes, -1, width)[changed].reshape(-1, width)
            resized = cv2.resize(lines, (size, changed.size * size // n_stripes), interpolation=cv2.INTER_AREA)
            # (size, size) -> (n_stripes, lines, size)
            self._picture.reshape(n_stripes, -1, size)[changed] = resized.reshape(changed.size, -1, size)
            self._frame = frame
        return self._picture[:, :, None].copy()  # (size, size) -> (size, size, 1)


def _grey(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(height, width, 3) -> (height, width)"""
    grey: Any = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return grey  # type: ignore[no-any-return]


def ale_wrapper(
    env: gym.Env[Any, Any],
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    terminal_on_life_loss: bool = True,
    clip_reward: bool = True,
    action_repeat_probability: float = 0.0,
) -> gym.Env[Any, Any]:
    """
    SB3's ``AtariWrapper`` with :class:`GreyFrames`; order and arguments are the same.

    :param env: an environment of ALE
    :param noop_max: Max number of no-ops
    :param frame_skip: Frequency at which the agent experiences the game.
        This correspond to repeating the action ``frame_skip`` times.
    :param screen_size: Resize Atari frame
    :param terminal_on_life_loss: If True, then step() returns terminated=True whenever a life is lost.
    :param clip_reward: If True (default), the reward is clip to {-1, 0, 1} depending on its sign.
    :param action_repeat_probability: Probability of repeating the last action
    :return: the wrapped environment
    """
    has_fire = "FIRE" in env.get_wrapper_attr("get_action_meanings")()
    if action_repeat_probability > 0.0:
        env = StickyActionEnv(env, action_repeat_probability)
    if noop_max > 0:
        env = NoopResetEnv(env, noop_max)
    env = GreyFrames(env, frame_skip, screen_size)
    if terminal_on_life_loss:
        env = EpisodicLifeEnv(env)
    if has_fire:
        env = FireResetEnv(env)
    return ClipRewardEnv(env) if clip_reward else env


def make_ale_vec_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    start_index: int = 0,
    monitor_dir: str | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
) -> VecEnv:
    """
    SB3's ``make_atari_env``, but faster. Only pixels differ, and only where the last two frames of a step have different
    colours: this function takes the brighter one, SB3 the maximum of red, green and blue.

    :param env_id: the environment ID, such as "PongNoFrameskip-v4"
    :param n_envs: the number of environments you wish to have in parallel
    :param seed: the initial seed for the random number generator
    :param start_index: start rank index
    :param monitor_dir: Path to a folder where the monitor files will be saved.
        If None, no file will be written, however, the env will still be wrapped
        in a Monitor wrapper to provide additional information about training.
    :param wrapper_kwargs: Optional keyword argument to pass to :func:`ale_wrapper`
    :param env_kwargs: Optional keyword argument to pass to the env constructor
    :param vec_env_cls: A custom ``VecEnv`` class constructor. Default: None (``DummyVecEnv``).
    :param vec_env_kwargs: Keyword arguments to pass to the ``VecEnv`` class constructor.
    :param monitor_kwargs: Keyword arguments to pass to the ``Monitor`` class constructor.
    :return: The wrapped environment
    :raises ValueError: for arguments that can't be used
    """
    _check_kwargs(wrapper_kwargs or {}, env_kwargs or {})
    # gymnasium's checks of every frame take time, and Monitor repeats them
    spec = dataclasses.replace(_spec(env_id), order_enforce=False, disable_env_checker=True)
    return make_vec_env(
        functools.partial(gym.make, spec),
        n_envs,
        seed,
        start_index,
        monitor_dir,
        ale_wrapper,
        # observations are not used, frames come from the emulator: "ram" is the fastest kind
        {"render_mode": "rgb_array", "obs_type": "ram", **(env_kwargs or {})},
        vec_env_cls,
        vec_env_kwargs,
        monitor_kwargs,
        wrapper_kwargs,
    )


def _spec(env_id: str) -> gym.envs.registration.EnvSpec:
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, TypeError, AttributeError) as error:
        raise ValueError(
            f'There is no environment {env_id!r}: {error} Use the id of an Atari game, such as "PongNoFrameskip-v4".'
        ) from error
    if spec.entry_point != "ale_py.env:AtariEnv":
        raise ValueError(
            f"{env_id!r} is no Atari game of ALE. Use make_vec_env({env_id!r}, …), "
            'or the id of an Atari game, such as "PongNoFrameskip-v4".'
        )
    return spec


def _check_kwargs(wrapper_kwargs: dict[str, Any], env_kwargs: dict[str, Any]) -> None:
    known = list(inspect.signature(ale_wrapper).parameters)[1:]  # without `env`
    for name, value in wrapper_kwargs.items():
        if name not in known:
            raise ValueError(f"`wrapper_kwargs` has {name!r}, which AtariWrapper does not know. Use {', '.join(known)}.")
        minimum = {"frame_skip": 1, "screen_size": 1}.get(name, 0)
        if not value >= minimum:
            raise ValueError(f"`{name}` in `wrapper_kwargs` must be at least {minimum}, not {value!r}.")
    for name in _FIXED_ENV_KWARGS:
        if name in env_kwargs:
            raise ValueError(
                f"`env_kwargs` has {name!r}, but observations here are grey frames and actions are discrete. "
                "Leave it out, or use make_atari_env."
            )
