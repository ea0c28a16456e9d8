"""Ctrl-C comes at a moment when it does no harm, and what was learned is counted whenever it comes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
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
        with uninterrupted():
            interrupt()
            interrupt()
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


def test_in_other_threads_and_where_nobody_handles_interrupts_nothing_is_changed() -> None:
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


def test_whenever_two_signals_come_both_are_handled_afterwards() -> None:
    """A handler that raises gets between the exchange of the other's."""
    armed: list[bool] = []

    def raise_once(number: int, frame: object) -> None:
        if armed:
            armed.clear()
            raise RaisedError

    def send() -> None:
        while not stop.wait(1e-4):
            os.kill(os.getpid(), random.choice(signals))

    signals = [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, raise_once) for number in signals]
    n_raised, stop, sender = 0, threading.Event(), threading.Thread(target=send)
    sender.start()
    try:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            try:
                armed.append(True)
                with uninterrupted():
                    pass
                armed.clear()
            except RaisedError:
                n_raised += 1
            for number in signals:  # whoever is the handler now, it does as the user's
                with contextlib.suppress(RaisedError):
                    armed.append(True)
                    handler: Any = signal.getsignal(number)
                    handler(number, None)
                assert not armed
    finally:
        armed.clear()
        stop.set()
        sender.join()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    assert n_raised > 100


SCRIPT = """
import os, random, signal, sys, threading
import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

class Talkative(gym.Wrapper):
    def step(self, action):
        *step, info = super().step(action)
        return *step, {**info, "text": bytes(20_000)}  # messages that take long to read

random.seed(int(sys.argv[1]))
env = make_vec_env("CartPole-v1", n_envs=4, wrapper_class=Talkative)
model = A3C("MlpPolicy", env, n_workers=2, n_steps=5, envs_per_update=2)
model.learn(20)
counts = []
while len(counts) < 12:
    timer = threading.Timer(random.uniform(0.15, 0.5), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    before = model._n_updates
    try:
        model.learn(10**9)
    except KeyboardInterrupt:
        counts.append((model.num_timesteps, (model._n_updates - before) * 10))
print(counts)
assert all(counted == learned for counted, learned in counts), counts
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_was_learned_is_counted_whenever_ctrl_c_comes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
