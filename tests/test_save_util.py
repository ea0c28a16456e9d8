"""Files of saved models are written atomically, and a damaged one raises a ValueError."""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C

from sb3_a3c import A3C, save_util
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


def test_open_files(model: A3C) -> None:
    file = io.BytesIO()
    file.write(b"before")
    file.seek(0)
    model.save(file)
    file.seek(3)
    assert same(A3C.load(file), model)


def test_permissions_are_those_of_new_files(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


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


@pytest.mark.parametrize("where", ["in the content", "on the disk", "at the end"])
def test_error_leaves_the_old_file(where: str, path: Path, model: A3C, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    if where == "in the content":
        monkeypatch.setattr(A3C, "_excluded_save_params", fail)
    else:
        monkeypatch.setattr("os.fsync" if where == "on the disk" else "pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert names(path.parent) == ["model.zip"]


SAVER = """
import runpy, sys  # the module alone: the package would take seconds to import

atomic_write = runpy.run_path(sys.argv[2])["atomic_write"]
for i in range(1, 10**9):
    atomic_write(sys.argv[1], lambda file: file.write(b"%020d" % i * 100_000))
    print(i, flush=True)
"""


def test_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    generator = np.random.default_rng()
    for _ in range(10):
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
        atomic_write(tmp_path / "model", lambda file: None)
    assert names(tmp_path) == ["model.zip"]


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
