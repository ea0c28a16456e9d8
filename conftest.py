"""Runs the Python blocks of README.md and docs/: those of a page in order, in one namespace and a folder of its own."""

import contextlib
import signal
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

CHECKOUT = Path(__file__).parent
#: The pages train for as long as a user would. Here a call of ``learn`` ends after this number of timesteps.
MAX_TIMESTEPS = 300

_learn = OnPolicyAlgorithm.learn
_undo = contextlib.ExitStack()


def _short_learn(model: Any, total_timesteps: float, *args: Any, **kwargs: Any) -> Any:
    return _learn(model, min(total_timesteps, MAX_TIMESTEPS), *args, **kwargs)  # type: ignore[arg-type]


def begin_page(namespace: dict[str, Any]) -> None:
    """Called before the first block of a page."""
    folder = Path(_undo.enter_context(tempfile.TemporaryDirectory()))
    (folder / "examples").symlink_to(CHECKOUT / "examples")
    _undo.enter_context(contextlib.chdir(folder))
    _undo.callback(th.set_num_threads, th.get_num_threads())
    th.set_num_threads(1)  # as for the tests: so short a training is too small for more
    _undo.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # a page shows how to set it
    _undo.enter_context(mock.patch.object(OnPolicyAlgorithm, "learn", _short_learn))


def end_page(namespace: dict[str, Any]) -> None:
    """Called after the last block of a page."""
    namespace.clear()
    _undo.close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=begin_page, teardown=end_page
).pytest()
