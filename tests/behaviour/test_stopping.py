"""However training ends, also by a signal: what was learned is in the model, and no process, file or thread is left."""

import contextlib
import json
import multiprocessing.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_a3c import A3C

#: A program that trains for a number of rounds, each of which something ends. It prints "ready" once the workers run, and
#: its state as JSON once they have ended. Arguments: the kind of environments, the case, and the number of rounds.
PROGRAM = """
import contextlib, copy, ctypes, gc, json, multiprocessing, os, signal, sys, threading, time
import gymnasium as gym
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from sb3_a3c import A3C

kind, case, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Env(gym.Wrapper):
    n = 0

    def step(self, action):
        self.n += 1
        if case == "stuck" and self.n == 200:
            os.write(1, b"ready\\n")  # unbuffered, as other processes write too
            time.sleep(60)
        if case == "stuck in C" and self.n == 200:
            os.write(1, b"ready\\n")
            ctypes.PyDLL(None).sleep(60)  # keeps Python's lock
        return super().step(action)

def state(env):
    gc.collect()
    alive = set(filter(is_ours, os.listdir("/proc"))) - {str(p.pid) for p in getattr(env, "processes", [])}
    return {
        "processes": sorted(alive),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "torch's threads": th.get_num_threads(),
        "redirected": "reset" in vars(env),
    }

def is_ours(pid):
    with contextlib.suppress(OSError):
        return pid.isdigit() and os.getsid(int(pid)) == os.getsid(0)

def interrupts(handler):
    try:
        handler(signal.SIGINT, None)
    except KeyboardInterrupt:
        return True

def equal(one, other):
    return all(map(th.equal, one.parameters(), other.parameters()))

def train(model):
    env = make_vec_env("CartPole-v1", 4, wrapper_class=Env, vec_env_cls=dict(dummy=DummyVecEnv, subproc=SubprocVecEnv)[kind])
    model.set_env(env)
    if case != "start":
        model.learn(20)  # starts the fork server, which stays
    before, n_updates, old, calls, stores = state(env), model._n_updates, copy.deepcopy(model.policy), [], []
    counts = []
    flag, over, ended = threading.Event(), threading.Event(), "returned"

    def callback(local_variables, _):
        calls.append(0)
        stores[:] = [model._collector.store]
        stores[0].close = lambda: None  # it is read below
        if len(calls) == 3 and case not in ("start", "stuck", "stuck in C"):
            print("ready", flush=True)
        if len(calls) == 50 and case == "raise":
            raise NotADirectoryError
        return not (len(calls) == 50 and case == "false" or flag.is_set())

    def learn():
        for _ in range(50 if case == "often" else 1):
            model.learn(20 if case == "often" else 10**9, callback=callback)
            counts.append(model.num_timesteps)
        over.set()

    try:
        try:
            if case == "start":
                print("ready", flush=True)
            if "thread" in case:
                threading.Thread(target=learn, daemon="daemon" in case).start()
                over.wait()  # not Thread.join(), which after Ctrl-C takes the thread for ended
            else:
                learn()
        except BaseException as error:
            ended = type(error).__name__
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # the second one, after learn has ended
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "daemon" in case:
        return {"ended": ended}
    flag.set()
    "thread" in case and over.wait(60)
    over_at, shared = time.monotonic(), copy.deepcopy(model.policy)
    if stores:
        stores.pop().fetch_policy(shared)
    time.sleep(0.1 if "thread" in case else 0)  # until the thread has ended
    model.save("model")
    found = {
        "ended": ended,
        "over at": over_at,
        "handler is back": interrupts(handler),
        "counted": sum(counts) or model.num_timesteps,
        "learned": (model._n_updates - n_updates) * 10,
        "is finite": all(bool(p.isfinite().all()) for p in model.policy.parameters()),
        "in model": not equal(old, shared) and equal(shared, model.policy) and equal(shared, A3C.load("model").policy),
        "before": before,
        "after": state(env),
    }
    with contextlib.suppress(BrokenPipeError, EOFError):  # from SB3, if Ctrl-C has ended its processes too
        env.close()
    signal.signal(signal.SIGINT, handler)
    return found

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    multiprocessing.set_forkserver_preload(["stable_baselines3.common.env_util", "sb3_a3c"])
    if case == "handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", 4), n_workers=2, n_steps=5, envs_per_update=2)
    for _ in range(rounds):
        print(json.dumps(train(model)), flush=True)
"""


class Program:
    """The program, in its own session and process group, as in a terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._folder = folder
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )
        self._servers: set[int] = set()  # fork servers and multiprocessing's resource tracker

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    @property
    def tracebacks(self) -> int:
        """Number in stderr, without those of SB3's processes that receive a second Ctrl-C while they end."""
        theirs = r"Process ForkServerProcess-\d+:\nTraceback .*?\nKeyboardInterrupt\n"
        return re.sub(theirs, "", self.stderr, flags=re.DOTALL).count("Traceback")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        self._servers |= {pid for pid, parent in self.processes().items() if parent == self.process.pid}
        return line

    def wait_until_ready(self, then: float = 0.0) -> None:
        """And up to ``then`` seconds longer."""
        assert self._line() == "ready", self.stderr
        time.sleep(random.uniform(0, then))

    def found(self) -> dict[str, Any]:
        while (line := self._line()) == "ready":  # printed by each environment that is stuck
            pass
        assert line, self.stderr
        found: dict[str, Any] = json.loads(line)
        return found

    def processes(self) -> dict[int, int]:
        """
        All of the session, with their parents; zombies too, except orphans, which init reaps, and children of a fork server,
        which waits for none once the main process is gone, and takes seconds to end.
        """
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.process.pid and not (state == "Z" and int(parent) in {1, *self._servers}):
                    found[int(path.name)] = int(parent)
        return found

    def check_nothing_is_left(self, segments: set[str]) -> None:
        deadline = time.monotonic() + 5
        while left := self.processes().keys() - self._servers:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        # fork servers end later: Python needs seconds to clean up all modules that they have imported
        while names := [*map(str, self.processes()), *(segments & set(os.listdir("/dev/shm")))]:
            assert time.monotonic() < deadline + 25, names
            time.sleep(0.02)


@contextlib.contextmanager
def program(folder: Path, kind: str, case: str, rounds: int = 1) -> Iterator[Program]:
    """Run it. After the block its main process must end, and then all others."""
    random.seed(f"{kind} {case}")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", kind, case, str(rounds)]
    segments = set(os.listdir("/dev/shm"))
    running = Program(command, folder)
    try:
        yield running
        running.process.wait(timeout=20)
        running.check_nothing_is_left(set(os.listdir("/dev/shm")) - segments)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.communicate()


def check(found: dict[str, Any], ended: str) -> None:
    assert found["ended"] == ended
    assert found["in model"] and found["is finite"] and found["handler is back"] and found["counted"] == found["learned"] > 0
    assert found["after"] == found["before"]


ROUNDS = 5
slow = pytest.mark.slow
every_kind = pytest.mark.parametrize("kind", [pytest.param("dummy", marks=slow), pytest.param("subproc", marks=slow)])


@pytest.mark.parametrize(
    ("kind", "times", "rounds"),
    [("dummy", 1, 1), *(pytest.param(kind, n, ROUNDS, marks=slow) for kind in ("dummy", "subproc") for n in (1, 2))],
)
def test_ctrl_c(kind: str, times: int, rounds: int, tmp_path: Path) -> None:
    with program(tmp_path, kind, f"Ctrl-C, {times}", rounds) as running:
        for _ in range(rounds):
            running.wait_until_ready(then=0.4)
            for _ in range(times):
                time.sleep(10 ** random.uniform(-4, -1))
                os.killpg(running.process.pid, signal.SIGINT)
            began = time.monotonic()
            check(found := running.found(), "KeyboardInterrupt")
            assert found["over at"] - began < 3
    assert running.tracebacks == 0, running.stderr


@slow
@pytest.mark.parametrize(("kind", "case"), [("dummy", "stuck"), ("subproc", "stuck"), ("dummy", "stuck in C")])
@pytest.mark.parametrize(("times", "seconds"), [(1, 6), (2, 2)])
def test_ctrl_c_while_an_environment_is_stuck(times: int, seconds: float, kind: str, case: str, tmp_path: Path) -> None:
    with program(tmp_path, kind, case) as running:
        running.wait_until_ready()
        time.sleep(0.5)  # the others learn all they can
        for _ in range(times):
            time.sleep(0.1)
            os.killpg(running.process.pid, signal.SIGINT)
        began = time.monotonic()
        check(found := running.found(), "KeyboardInterrupt")
        assert found["over at"] - began < seconds
    assert running.tracebacks == 0, running.stderr


@slow
@pytest.mark.parametrize(("kind", "earliest"), [("dummy", 0), ("dummy", 1), ("subproc", 0.5)])
def test_ctrl_c_while_the_first_workers_start(kind: str, earliest: float, tmp_path: Path) -> None:
    with program(tmp_path, kind, "start") as running:
        running.wait_until_ready(then=1)
        time.sleep(earliest)
        os.killpg(running.process.pid, signal.SIGINT)
        assert (found := running.found())["ended"] == "KeyboardInterrupt"
        assert found["counted"] == found["learned"]
    assert running.tracebacks == 0, running.stderr


@pytest.mark.parametrize(
    ("number", "kind", "case"),
    [
        (signal.SIGKILL, "subproc", "killed"),
        pytest.param(signal.SIGTERM, "dummy", "stuck in C", marks=slow),
        pytest.param(signal.SIGKILL, "dummy", "stuck in C", marks=slow),
        pytest.param(signal.SIGTERM, "subproc", "killed", marks=slow),
        pytest.param(signal.SIGTERM, "dummy", "killed", marks=slow),
        # a process of SubprocVecEnv that is stuck ends when its step does, as always
        pytest.param(signal.SIGKILL, "dummy", "stuck", marks=slow),
    ],
)
def test_workers_end_with_the_main_process(number: signal.Signals, kind: str, case: str, tmp_path: Path) -> None:
    with program(tmp_path, kind, case) as running:
        running.wait_until_ready(then=0.5)
        os.kill(running.process.pid, number)
        assert running.process.wait(timeout=5) == -number


@every_kind
@pytest.mark.parametrize("to_all", [False, True])
def test_a_handler_of_sigterm_that_exits(to_all: bool, kind: str, tmp_path: Path) -> None:
    rounds = 1 if to_all else ROUNDS  # it kills fork servers too
    with program(tmp_path, kind, "handler", rounds) as running:
        for _ in range(rounds):
            running.wait_until_ready(then=0.4)
            (os.killpg if to_all else os.kill)(running.process.pid, signal.SIGTERM)
            found = running.found()
            if to_all:  # what the workers could not report is learned, but not counted
                found.update(counted=found["learned"], after=found["before"])
            check(found, "SystemExit")
    assert running.tracebacks == 0, running.stderr


@every_kind
@pytest.mark.parametrize(
    ("case", "ended"), [("false", "returned"), ("raise", "NotADirectoryError"), ("often", "returned")], ids=lambda case: case
)
def test_a_callback_or_the_goal_ends_learn(case: str, ended: str, kind: str, tmp_path: Path) -> None:
    """In the case "often", 50 calls of ``learn``."""
    with program(tmp_path, kind, case) as running:
        running.wait_until_ready()
        check(running.found(), ended)
    assert running.stderr == ""


@every_kind
@pytest.mark.parametrize("case", ["thread", "daemon thread"])
def test_ctrl_c_while_a_thread_trains(case: str, kind: str, tmp_path: Path) -> None:
    """The main thread receives it, and has a callback end the training; a daemon thread is left as it is."""
    with program(tmp_path, kind, case) as running:
        running.wait_until_ready(then=0.4)
        os.kill(running.process.pid, signal.SIGINT)
        found = running.found()
        if case == "thread":
            check(found, "KeyboardInterrupt")
    if case == "thread":
        assert (running.process.returncode, running.stderr) == (0, "")
    else:  # Python before 3.14 aborts a program that ends while such a thread is in torch, with A2C too
        assert running.process.returncode in (0, -signal.SIGABRT)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (DummyVecEnv, "exits"),
        (DummyVecEnv, "returns False"),
        (DummyVecEnv, "continues"),
        (SubprocVecEnv, "exits"),
        pytest.param(SubprocVecEnv, "returns False", marks=slow),
        pytest.param(SubprocVecEnv, "continues", marks=slow),
    ],
)
def test_a_process_forked_in_a_callback_leaves_the_training_alone(kind: Any, how: str) -> None:
    """However it leaves the callback. This is not for use: a child is to end by ``os._exit``."""
    children: list[int] = []
    main_process = os.getpid()

    def fork(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps != 40 or children:
            return True
        child = os.fork()
        if child > 0:
            children.append(child)
        elif how == "exits":
            sys.exit(0)
        return child > 0 or how != "returns False"

    env = make_vec_env("CartPole-v1", 4, vec_env_cls=kind)
    model, code = A3C("MlpPolicy", env, n_workers=2, n_steps=5), 1
    try:
        model.learn(800, callback=fork)
        code = 0
    except SystemExit:
        code = 2
    except RuntimeError as error:
        code = 3 if "forked from the one in which A3C learns" in str(error) else 1
    finally:
        if os.getpid() != main_process:
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # as at the end of a program
            os._exit(code)
    assert (code, model.num_timesteps, len(children)) == (0, 800, 1)
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == {"exits": 2, "returns False": 0, "continues": 3}[how]
    model.learn(40)  # the environments' processes are as they were
    env.close()
