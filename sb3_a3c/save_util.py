"""Files of saved models: they are written atomically, contain the ``VecNormalize``, and are checked before loading."""

import contextlib
import errno
import io
import json
import os
import pickle
import secrets
import stat
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor

from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy, LstmMultiInputActorCriticPolicy
from sb3_a3c.policies.torch_layers import EmbeddingExtractor

#: Members of a model's zip-file.
_MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")
#: Another member, if the model's environments have a ``VecNormalize``: that one, pickled. SB3's ``load`` ignores it.
_STATISTICS = "vecnormalize.pkl"
#: Another member: the version of this package that has saved the model.
_VERSION = "_sb3_a3c_version"
#: The version of models without that member.
_BEFORE = "0.1.0 or before"
#: The defaults of LSTM policies in that version.
_OLD_POLICY_KWARGS = dict(net_arch=[], lstm_hidden_size=256, normalize_values=False)

#: Errors of a file that can't be replaced, but perhaps written to: it is mounted itself, or its folder is read-only.
_IRREPLACEABLE = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}


def atomic_write(path: str | Path, content: bytes | memoryview) -> None:
    """
    Write a file atomically: after an error, a kill or a power failure there is the old file or the complete new one. An
    existing file keeps its owner and permissions. A file that can't be replaced is written in place, not atomically.

    :param path: the file; as in Stable-Baselines3, ``.zip`` is appended if it has no suffix, and its folder is created
    :param content: the content
    """
    path = Path(path)
    if path.suffix == "":
        path = Path(f"{path}.zip")
    path = path.resolve()  # a symbolic link is kept
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() or not path.exists():  # a device or pipe must not be replaced by a file
        try:
            _replace(path, content)
            return
        except OSError as error:
            if error.errno not in _IRREPLACEABLE:
                raise
    path.write_bytes(content)  # if this can't be done either, the error names the file


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and rename it to ``path``."""
    try:
        with path.open("r+b") as file:  # fails if the file is write-protected: renaming would ignore that
            old = os.fstat(file.fileno())
        mode = stat.S_IMODE(old.st_mode)
    except FileNotFoundError:
        old, mode = None, 0o666
    # random, as other threads and processes may write to the same path; O_EXCL does not follow a link
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # the umask applies
    try:
        with open(descriptor, "wb") as file:
            if old is not None and hasattr(os, "fchmod"):  # not on Windows
                new = os.fstat(descriptor)
                if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)  # else the file might be empty after a power failure
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def complete_archive(file: io.BytesIO, version: str, normalize: Any) -> None:
    """Add the version of this package to a model's zip-file, and a ``VecNormalize`` unless it is None."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(_VERSION, version)
        if normalize is not None:
            archive.writestr(_STATISTICS, cloudpickle.dumps(normalize))  # as SB3 pickles the other parts


def saved_version(path: str | Path | io.BufferedIOBase) -> str:
    """Return the version of this package that has saved a model; "0.1.0 or before" if the file does not tell."""
    with zipfile.ZipFile(_find(path)) as archive:
        return archive.read(_VERSION).decode() if _VERSION in archive.namelist() else _BEFORE


def old_policy_kwargs(path: str | Path | io.BufferedIOBase, custom_objects: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``policy_kwargs`` with which this version builds the LSTM policy of an old model; None for other models."""
    if saved_version(path) != _BEFORE:
        return None
    data, _, _ = load_from_zip_file(path, custom_objects=custom_objects)
    assert data is not None
    policy_class = data["policy_class"]
    if not issubclass(policy_class, LstmActorCriticPolicy):
        return None
    old: dict[str, Any] = dict(_OLD_POLICY_KWARGS)
    if issubclass(policy_class.default_features_extractor_class, EmbeddingExtractor):
        is_combined = issubclass(policy_class, LstmMultiInputActorCriticPolicy)
        old["features_extractor_class"] = CombinedExtractor if is_combined else FlattenExtractor
    return {**old, **data["policy_kwargs"]}


def read_statistics(path: str | Path | io.BufferedIOBase) -> Any:
    """Return the ``VecNormalize`` in a model's zip-file, without environments; None if there is none."""
    with zipfile.ZipFile(_find(path)) as archive:
        return pickle.loads(archive.read(_STATISTICS)) if _STATISTICS in archive.namelist() else None


def _find(path: str | Path | io.BufferedIOBase) -> Path | io.BufferedIOBase:
    """The file that SB3's ``load`` would read: with ``.zip`` appended if there is none without. An open file as it is."""
    if not isinstance(path, str | Path):
        return path
    return next((each for each in (Path(path), Path(f"{path}.zip")) if each.is_file()), Path(path))


def check_archive(path: str | Path | io.BufferedIOBase, own_argument: str | None = None) -> None:
    """
    Raise a ValueError if a file is not a saved model, is damaged, or is of another algorithm: one without the constructor
    argument ``own_argument`` (None: any algorithm). SB3 raises the error for a missing file.
    """
    advice = "Use another checkpoint, or the file that `save` has written."
    with contextlib.ExitStack() as stack:
        path = _find(path)
        if isinstance(path, Path):
            if not path.is_file():
                return
            file: io.BufferedIOBase = stack.enter_context(path.open("rb"))
        else:
            file = path
            stack.callback(file.seek, file.tell())
        try:
            archive = stack.enter_context(zipfile.ZipFile(file))
            damaged = archive.testzip()  # compares checksums
            attributes = json.loads(archive.read("data")) if damaged is None and "data" in archive.namelist() else {}
        except Exception as error:  # wrong bytes raise errors of many types
            raise ValueError(f"{path} is not the file of a saved model, or it is damaged ({error}). {advice}") from error
        missing = [name for name in _MEMBERS if name not in archive.namelist()]
    if damaged is not None or missing:
        what = f"{damaged!r} in it is damaged" if damaged is not None else f"it has no {', '.join(missing)}"
        raise ValueError(f"{path} can't be loaded: {what}. {advice}")
    if own_argument is not None and own_argument not in attributes:
        raise ValueError(f"{path} was saved by another algorithm. Load it with the class that saved it, such as A2C.load.")
