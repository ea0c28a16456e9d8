"""Signals that arrive inside a block of ``uninterrupted`` are handled at its end."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sb3_a3c.processes.signals import uninterrupted


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    handler = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted() as interrupted:
            assert not interrupted.is_set()
            interrupt()
            interrupt()
            assert interrupted.is_set()
            reached.append("end")
        reached.append("behind")
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_exception_in_the_block_leaves_the_handler_as_it_was() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), uninterrupted():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_changes_in_other_threads_and_for_ignored_signals() -> None:
    seen = []

    def look() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        look()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [handler, signal.SIG_IGN]


class RaisedError(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("exchange", [1, 2, 3, 4])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_no_signal_is_lost_while_handlers_are_exchanged(
    moment: str, exchange: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``signal.signal`` is called twice at the start of the block and twice at its end; the user's handlers raise."""
    handled: list[int] = []
    sent: list[int] = [number]
    n_exchanges, set_handler = 0, signal.signal

    def handle(number: int, frame: object) -> None:
        handled.append(number)
        raise RaisedError

    def exchange_and_send(*arguments: Any) -> None:
        nonlocal n_exchanges
        n_exchanges += 1
        if n_exchanges == exchange and moment == "before":
            signal.raise_signal(number)
        set_handler(*arguments)
        if n_exchanges == exchange and moment == "after":
            signal.raise_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [set_handler(number, handle) for number in signals]
    try:
        monkeypatch.setattr(signal, "signal", exchange_and_send)
        with pytest.raises(RaisedError), uninterrupted():  # noqa: PT012
            for other in signals:
                sent.append(other)
                signal.raise_signal(other)
        assert set(handled) == set(sent)
        for other in signals:  # a handler that could not be restored does the same
            assert moment == "before" or signal.getsignal(other) is handle
            with pytest.raises(RaisedError):
                signal.raise_signal(other)
    finally:
        for other, handler in zip(signals, before, strict=True):
            set_handler(other, handler)


SCRIPT = """
import os, random, signal, threading
import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

class LongInfos(gym.Wrapper):
    def step(self, action):
        *step, info = super().step(action)
        return *step, {**info, "text": bytes(20_000)}  # messages that take long to read

random.seed(1)
env = make_vec_env("CartPole-v1", n_envs=4, wrapper_class=LongInfos)
model = A3C("MlpPolicy", env, n_workers=2, n_steps=5, envs_per_update=2).learn(20)
counts = []
while len(counts) < 12:
    timer = threading.Timer(random.uniform(0.15, 0.5), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    before = model._n_updates
    try:
        model.learn(10**9)
    except KeyboardInterrupt:
        counts.append((model.num_timesteps, (model._n_updates - before) * 10))
assert all(counted == learned for counted, learned in counts), counts
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_all_learned_timesteps_are_counted_whenever_ctrl_c_comes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
