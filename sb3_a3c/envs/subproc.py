"""
A ``SubprocVecEnv`` lent to workers. The processes of its environments stay the user's children; a worker talks to its
slice of them over the user's own pipes, and the user goes on with them afterwards.
"""

import contextlib
import copy
import math
import secrets
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv

#: Seconds in which the environments of a worker that died must have finished the step that they are in.
TAKE_BACK_SECONDS = 5.0


def lend(env: SubprocVecEnv, indices: Sequence[int]) -> SubprocVecEnv:
    """
    :param env: the user's
    :param indices: which of its environments
    :return: one that drives only these, and never closes them
    """
    share = copy.copy(env)
    share.num_envs = len(indices)
    share.remotes = tuple(env.remotes[i] for i in indices)
    share.work_remotes, share.processes = (), []
    share.closed = True  # not the worker's to close
    share.reset_infos, share._seeds, share._options = [{}] * len(indices), [None] * len(indices), [{}] * len(indices)
    return share


def take_back(env: SubprocVecEnv, indices: Iterable[int], patience: float = math.inf) -> None:
    """
    Of a worker that died: its environments may be about to answer what nobody waits for any more. Read on until each
    answers a question of our own.

    :param env: the user's
    :param indices: which environments the worker had
    :param patience: seconds to wait, if less than ``TAKE_BACK_SECONDS``
    """
    env.waiting = False  # what it waited for is read here
    mark = secrets.token_hex(8)
    deadline = time.monotonic() + min(patience, TAKE_BACK_SECONDS)
    lost = [index for index in indices if not _answers(env.remotes[index], mark, deadline)]
    if lost:
        warnings.warn(
            f"The processes of the environments {lost} do not answer any more since the worker that drove them died. "
            "Close this SubprocVecEnv and make a new one.",
            stacklevel=2,
        )


def _answers(remote: Any, mark: str, deadline: float) -> bool:
    with contextlib.suppress(Exception):  # its process is gone, or its last answer was read by half: anything may come
        remote.send(("set_attr", ("_a3c_mark", mark)))
        remote.send(("get_attr", "_a3c_mark"))
        while remote.poll(max(0.0, deadline - time.monotonic())):
            answer = remote.recv()
            if isinstance(answer, str) and answer == mark:
                return True
    return False
