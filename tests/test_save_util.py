"""Files of saved models are written atomically, and a damaged one raises a ValueError."""

import errno
import io
import itertools
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_a3c import A3C, save_util
from sb3_a3c.resume import has_statistics, load_statistics, newest_model
from sb3_a3c.save_util import atomic_write


@pytest.fixture(scope="module")
def model() -> A3C:
    return A3C("MlpPolicy", "CartPole-v1", n_steps=5, n_workers=0, seed=1, policy_kwargs=dict(net_arch=[8])).learn(20)


@pytest.fixture
def path(model: A3C, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model.zip"


def same(a: A3C, b: A3C) -> bool:
    parameters = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    states = [each.policy.optimizer.state_dict()["state"] for each in (a, b)]
    return all(th.equal(x, y) for x, y in parameters) and all(
        th.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("given", ["model", "model.pth", "a/b/model.zip"])
def test_names_are_as_in_sb3(given: str, kind: type, model: A3C, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model.save(kind(given))
    assert (tmp_path / given).with_suffix(Path(given).suffix or ".zip").is_file()
    assert same(A3C.load(kind(given)), model)


def test_open_files(model: A3C, path: Path) -> None:
    file = io.BytesIO()
    file.write(b"before")
    file.seek(0)
    model.save(file)
    file.seek(3)
    assert same(A3C.load(file), model)
    with path.open("wb") as write_only:
        model.save(write_only)
        assert same(A3C.load(path), model)  # not only once the file is closed
        write_only.write(b"more")
    assert path.read_bytes().endswith(b"more")


def test_open_files_that_sb3_refuses(model: A3C, path: Path) -> None:
    with path.open("rb") as file, pytest.raises(ValueError, match="Expected a writable file"):
        model.save(file)
    with pytest.raises(TypeError, match="has invalid type"):
        model.save(io.StringIO())  # type: ignore[arg-type]


# --- permissions ------------------------------------------------------------------------------------------------------

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_new_files_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "model", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.zip").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_existing_files_keep_their_mode(mode: int, path: Path, model: A3C) -> None:
    path.write_bytes(b"old")
    path.chmod(mode)
    inode = path.stat().st_ino
    model.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.stat().st_ino != inode  # replaced
    assert same(A3C.load(path), model)


def test_content_is_never_readable_to_more_users(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0o600)
    modes = []
    original = os.open

    def recording(*args: Any, **kwargs: Any) -> int:
        descriptor = original(*args, **kwargs)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", recording)
    atomic_write(path, b"new")
    assert modes == [0o600]


@AS_ROOT
def test_existing_files_keep_their_owner(path: Path) -> None:
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    atomic_write(path, b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 5678, 0o640)
    assert path.read_bytes() == b"new"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def without_root(function: Callable[[], object]) -> str:
    """Call a function in a forked process that is not root's; return what it raised."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            signal.alarm(20)
            function()
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as file:
        return file.read().decode()


def test_folder_that_is_read_only(open_folder: Path) -> None:
    path = open_folder / "model.zip"
    path.write_bytes(b"old")
    path.chmod(0o666)
    open_folder.chmod(0o555)
    assert without_root(lambda: atomic_write(path, b"new")) == ""
    assert path.read_bytes() == b"new"
    error = without_root(lambda: atomic_write(open_folder / "other.zip", b"new"))
    assert error == "PermissionError(13, 'Permission denied')"
    assert names(open_folder) == ["model.zip"]


@AS_ROOT
def test_file_of_another_user_stays_theirs(open_folder: Path) -> None:
    """Only root can give a new file to another user: the old one is written in place."""
    open_folder.chmod(0o777)
    path = open_folder / "model.zip"
    path.write_bytes(b"older")
    path.chmod(0o666)
    assert without_root(lambda: atomic_write(path, b"new")) == ""
    assert path.stat().st_uid == 0
    assert path.read_bytes() == b"new"
    assert names(open_folder) == ["model.zip"]


@AS_ROOT
def test_write_protected_file(open_folder: Path) -> None:
    """As in SB3: a good model can be protected with ``chmod``."""
    open_folder.chmod(0o777)
    path = open_folder / "model.zip"
    path.write_bytes(b"old")
    path.chmod(0o444)
    os.chown(path, 65534, 65534)
    assert without_root(lambda: atomic_write(path, b"new")) == "PermissionError(13, 'Permission denied')"
    assert path.read_bytes() == b"old"
    assert names(open_folder) == ["model.zip"]


# --- names, links, pipes and mounts -----------------------------------------------------------------------------------


def test_planted_links_are_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(b"mine")
    planted = [path.with_name(f".{path.name}.{os.getpid()}.part")]  # the name of earlier versions
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    planted.append(path.with_name(".guessed.part"))
    for link in planted:
        link.symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"new")
    monkeypatch.undo()
    atomic_write(path, b"newer")
    assert victim.read_bytes() == b"mine"
    assert planted[0].is_symlink()
    assert path.read_bytes() == b"newer"


def test_temporary_names_are_not_predictable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = os.open

    def recording(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path).name)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", recording)
    for _ in range(20):
        set_random_seed(1)
        atomic_write(tmp_path / "model", b"")
    assert len(set(opened)) == 20
    assert all(re.fullmatch(r"\.[0-9a-f]{16}\.part", name) for name in opened)


def test_symbolic_link_is_kept(path: Path, model: A3C) -> None:
    link = path.with_name("newest.zip")
    link.symlink_to(path.name)
    path.write_bytes(b"old")
    model.save(link)
    assert link.is_symlink()
    assert same(A3C.load(path), model)


def test_pipe_is_written_to(model: A3C, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.zip"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    model.save(pipe)
    content, _ = reader.communicate(timeout=10)
    assert same(A3C.load(io.BytesIO(content)), model)
    assert pipe.is_fifo()


IN_A_MOUNT = """
import os, runpy, sys  # the module alone: the package would take seconds to import

atomic_write = runpy.run_path(sys.argv[2])["atomic_write"]
atomic_write(sys.argv[1], b"new")
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_file_that_is_mounted(read_only: bool, tmp_path: Path) -> None:
    """As a container's volume of a single file; with a folder that is read-only, too."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.zip"
    path.write_bytes(b"below the mount")
    outside.write_bytes(b"the old one")
    mounts = f"mount --bind {outside} {path}"
    if read_only:
        mounts = f"mount --bind {folder} {folder} && {mounts} && mount -o remount,bind,ro {folder}"
    can_mount = subprocess.run(["unshare", "-m", "sh", "-c", mounts], capture_output=True, text=True, timeout=20)
    if can_mount.returncode != 0:
        pytest.skip(f"can't mount here: {can_mount.stderr}")
    save = f"{mounts} && exec {sys.executable} -c '{IN_A_MOUNT}' {path} {save_util.__file__}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", save], capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr) == (0, "")
    assert outside.read_bytes() == b"new"
    assert path.read_bytes() == b"below the mount"
    assert names(folder) == ["model.zip"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS])
def test_file_that_cannot_be_renamed_over(code: int, path: Path, model: A3C, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    path.write_bytes(path.read_bytes() * 2)
    inode = path.stat().st_ino
    monkeypatch.setattr("os.replace", fail)
    model.save(path)
    assert path.stat().st_ino == inode
    assert same(A3C.load(path), model)
    assert names(path.parent) == ["model.zip"]


# --- errors, kills and several writers --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in the content", "on the disk", "at the end"])
def test_error_leaves_the_old_file(where: str, path: Path, model: A3C, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    if where == "in the content":
        monkeypatch.setattr(A3C, "_excluded_save_params", fail)
    else:
        monkeypatch.setattr("os.fsync" if where == "on the disk" else "os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert names(path.parent) == ["model.zip"]


SAVER = """
import runpy, sys  # the module alone: the package would take seconds to import

atomic_write = runpy.run_path(sys.argv[2])["atomic_write"]
for i in range(1, 10**9):
    atomic_write(sys.argv[1], b"%020d" % i * 100_000)
    print(i, flush=True)
"""


def test_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    generator = np.random.default_rng()
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path), save_util.__file__], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(generator.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        written = ["1", *process.communicate(timeout=10)[0].split()]
        content = path.read_bytes()
        assert len(content) == 20 * 100_000
        assert content == content[:20] * 100_000
        assert int(content[:20]) - int(written[-1]) in (0, 1)  # the one printed last, or the next


def test_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "model.zip").mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path / "model", b"")
    assert names(tmp_path) == ["model.zip"]


def numbered(number: int) -> A3C:
    """A model whose timesteps, parameters and statistics are all one number."""
    env = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=False)
    model = A3C("MlpPolicy", env, n_workers=0, policy_kwargs=dict(net_arch=[8]))
    set_number(model, number)
    return model


def set_number(model: A3C, number: int) -> None:
    model.num_timesteps = number
    for parameter in model.policy.parameters():
        th.nn.init.constant_(parameter, number)
    normalize = model.get_vec_normalize_env()
    assert normalize is not None
    normalize.ret_rms.count = number


def number_of(path: Path | io.BytesIO) -> int:
    """The number of a model, which must be the same in all of its parts."""
    model, env = A3C.load(path), make_vec_env("CartPole-v1")
    numbers = {float(value) for parameter in model.policy.parameters() for value in parameter.detach().flatten()}
    numbers |= {float(model.num_timesteps), float(load_statistics(path, env).ret_rms.count)}
    env.close()
    assert len(numbers) == 1
    return int(numbers.pop())


@pytest.mark.timeout(60)
def test_several_threads_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    models = [numbered(number) for number in range(1, 5)]
    models[0].save(path)
    is_over = threading.Event()

    def save_again_and_again(model: A3C) -> int:
        n_saved = 0
        while not is_over.is_set():
            model.save(path)
            n_saved += 1
        return n_saved

    with ThreadPoolExecutor() as pool:
        saving = [pool.submit(save_again_and_again, model) for model in models]
        try:
            seen = [number_of(io.BytesIO(path.read_bytes())) for _ in range(12)]
            assert all(A3C.load(path).num_timesteps in range(1, 5) for _ in range(12))
        finally:
            is_over.set()
        assert all(future.result(20) > 2 for future in saving)
    assert set(seen) <= {1, 2, 3, 4} and len(set(seen)) > 1
    assert names(tmp_path) == ["model.zip"]


# --- a model and its statistics ---------------------------------------------------------------------------------------


def call_before_each_line(function: Callable[[], object], model: A3C, path: Path) -> None:
    """Save a model, and call a function before each line that :meth:`A3C.save` and ``save_util`` execute."""

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        code = frame.f_code
        if code.co_filename != save_util.__file__ and code is not A3C.save.__code__:
            return None
        if event == "line":
            function()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model.save(path)
    finally:
        sys.settrace(before)


def save_and_kill(model: A3C, path: Path, n_lines: int) -> None:
    """Save in a forked process that is killed after a number of lines."""
    lines = itertools.count()

    def kill() -> None:
        if next(lines) == n_lines:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            signal.alarm(20)
            call_before_each_line(kill, model, path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.timeout(120)
def test_kill_leaves_a_model_with_its_own_statistics(tmp_path: Path) -> None:
    """At each line once, early and late ones in turn, so that there are many failures in a row."""
    model, path, lines = numbered(1), tmp_path / "model.zip", list[None]()
    model.save(path)
    call_before_each_line(lambda: lines.append(None), model, path)
    last = len(lines) - 1
    assert last > 25
    left = [1]
    for n_lines in sorted(range(last + 1), key=lambda n_lines: min(n_lines, last - n_lines)):
        set_number(model, left[-1] + 1)
        save_and_kill(model, path, n_lines)
        assert newest_model(tmp_path, with_statistics=True) == path
        left.append(number_of(path))
        assert left[-1] in (left[-2], model.num_timesteps)
    assert 1 < left[-1] < last / 2  # only those killed between renaming and the end have replaced the file
    assert all(name.endswith(".part") for name in names(tmp_path)[:-1])


def test_statistics_are_those_that_sb3_would_save(tmp_path: Path) -> None:
    """Also while workers run: values of the last step are none of theirs."""

    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 20:
                assert isinstance(self.model, A3C)
                self.model.save(tmp_path / "model")
                self.model.save(file)
                env.save(str(tmp_path / "sb3.pkl"))
            return True

    file = io.BytesIO()
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2), gamma=0.9, clip_obs=5.0)
    for n_workers in (0, 2):
        model = A3C("MlpPolicy", env, n_steps=5, n_workers=n_workers).learn(100, Save())
        assert env.ret_rms.count > 40
        new = make_vec_env("CartPole-v1", n_envs=3)
        expected = VecNormalize.load(str(tmp_path / "sb3.pkl"), new)
        for source in (tmp_path / "model", str(tmp_path / "model.zip"), file):
            loaded = load_statistics(source, new)
            assert loaded.venv is new
            assert pickle.dumps(loaded) == pickle.dumps(expected)
        file.seek(0), file.truncate()
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "sb3.pkl"))
    expected = VecNormalize.load(str(tmp_path / "sb3.pkl"), new)
    assert pickle.dumps(load_statistics(tmp_path / "model", new)) == pickle.dumps(expected)
    for each in (env, new):
        each.close()


def test_models_without_vec_normalize_have_no_statistics(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert "vecnormalize.pkl" not in archive.namelist()
    with pytest.raises(
        ValueError, match=r"model\.zip has no statistics for VecNormalize: .*VecNormalize\.load\(path, env\)"
    ):
        load_statistics(path, make_vec_env("CartPole-v1"))


def test_sb3_loads_models_with_statistics(tmp_path: Path) -> None:
    model = numbered(7)
    model.save(tmp_path / "model")
    data, params, variables = load_from_zip_file(tmp_path / "model")
    assert data is not None and data["num_timesteps"] == 7
    assert params.keys() == {"policy", "policy.optimizer"}
    assert not variables
    other = numbered(8)
    other.set_parameters(str(tmp_path / "model.zip"))
    assert same(other, model)


class OwnNormalize(VecNormalize):
    """A user's, with something that only cloudpickle can pickle."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.own: Callable[[], int] = lambda: 3


def test_classes_of_the_user(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1")
    A3C("MlpPolicy", OwnNormalize(env), n_workers=0).save(tmp_path / "model")
    loaded = load_statistics(tmp_path / "model", env)
    assert isinstance(loaded, OwnNormalize)
    assert loaded.own() == 3
    env.close()


@pytest.mark.parametrize("n_bytes", [1, 1000])
def test_damaged_statistics(n_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    numbered(1).save(path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("vecnormalize.pkl").header_offset + 100
    content = path.read_bytes()
    path.write_bytes(
        content[:offset] + bytes(255 - byte for byte in content[offset:][:n_bytes]) + content[offset + n_bytes :]
    )
    for use in (A3C.load, has_statistics, lambda path: load_statistics(path, make_vec_env("CartPole-v1"))):
        with pytest.raises(ValueError, match=r"model\.zip (can't be loaded|is not the file of a saved model)"):
            use(path)
    with pytest.raises(FileNotFoundError):
        has_statistics(tmp_path / "nothing")


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_truncated_file(path: Path) -> None:
    content = path.read_bytes()
    for length in np.linspace(0, len(content) - 1, 20, dtype=int):
        path.write_bytes(content[:length])
        # the members are zip files themselves: a file that is cut off after one looks like it
        with pytest.raises(ValueError, match=r"model\.zip (is not the file of a saved model, or it is damaged|.*has no)"):
            A3C.load(path)


def test_wrong_bytes(path: Path, model: A3C) -> None:
    """Either the loaded model is the saved one, or the error names the file."""
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    errors = []
    for _ in range(100):
        mutated = bytearray(content)
        for position in generator.integers(len(content), size=generator.integers(1, 4)):
            mutated[position] ^= generator.integers(1, 256)
        path.write_bytes(mutated)
        try:
            assert same(A3C.load(path), model)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(error.startswith(str(path)) for error in errors)


def test_files_that_are_no_model(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match=r"text\.zip is not the file of a saved model.*Use another checkpoint"):
        A3C.load(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as zip_file:
        zip_file.writestr("cat.png", b"")
    with pytest.raises(ValueError, match=r"it has no data, policy\.pth, policy\.optimizer\.pth"):
        A3C.load(tmp_path / "pictures.zip")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in whole.namelist():
            if name != "policy.optimizer.pth":
                part.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"part\.zip can't be loaded: it has no policy\.optimizer\.pth\."):
        A3C.load(str(tmp_path / "part"))
    with pytest.raises(FileNotFoundError):
        A3C.load(tmp_path / "nothing")


def test_models_of_other_algorithms(tmp_path: Path) -> None:
    A2C("MlpPolicy", "CartPole-v1").save(tmp_path / "a2c")
    with pytest.raises(ValueError, match=r"a2c\.zip was saved by another algorithm\. Load it with the class that saved it"):
        A3C.load(tmp_path / "a2c")
