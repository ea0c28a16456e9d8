"""
A ``SubprocVecEnv`` lent to workers: its processes stay children of the main process, each worker uses the pipes to some of
them, and after training the user's object uses all of them again.
"""

import contextlib
import copy
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_a3c.errors import warn

#: Seconds that the environments of a dead worker have to finish the step they are in.
TAKE_BACK_SECONDS = 5.0


def lend(env: SubprocVecEnv, indices: Sequence[int]) -> SubprocVecEnv:
    """Return a ``SubprocVecEnv`` that uses only the processes of these environments, and never closes them."""
    share = copy.copy(env)
    share.num_envs = len(indices)
    share.remotes = tuple(env.remotes[i] for i in indices)
    share.work_remotes, share.processes = (), []
    share.closed = True  # closing is up to the user
    share.reset_infos, share._seeds, share._options = [{}] * len(indices), [None] * len(indices), [{}] * len(indices)
    return share


def take_back(env: SubprocVecEnv, indices: Iterable[int], patience: float = math.inf) -> None:
    """
    Discard the replies that no worker has read. Warn of environments that do not answer within ``patience`` seconds, or
    ``TAKE_BACK_SECONDS`` if that is less.
    """
    env.waiting = False
    mark = secrets.token_hex(8)
    deadline = time.monotonic() + min(patience, TAKE_BACK_SECONDS)
    lost = [index for index in indices if not _answers(env.remotes[index], mark, deadline)]
    if lost:
        warn(
            f"The processes of the environments {lost} do not answer any more: a terminal's Ctrl-C has ended them too, or "
            "the worker that drove them died. Close this SubprocVecEnv and make a new one."
        )


def _answers(remote: Any, mark: str, deadline: float) -> bool:
    """
    Whether the process replies with ``mark`` in time; replies before that are dropped. If the dead worker had read half of a
    reply, unpickling the rest can raise anything.
    """
    with contextlib.suppress(Exception):
        remote.send(("set_attr", ("_a3c_mark", mark)))
        remote.send(("get_attr", "_a3c_mark"))
        while remote.poll(max(0.0, deadline - time.monotonic())):
            answer = remote.recv()
            if isinstance(answer, str) and answer == mark:
                return True
    return False
