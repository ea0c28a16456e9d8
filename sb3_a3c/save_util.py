"""Files of saved models: written atomically, and checked before they are loaded."""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

#: Members of a model's zip-file.
_MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")


def atomic_write(path: str | Path, save: Callable[[io.BytesIO], None]) -> None:
    """
    Write a file atomically: after an error, a kill or a power failure there is the old file or the complete new one.

    :param path: the file; as in Stable-Baselines3, ``.zip`` is appended if it has no suffix, and its folder is created
    :param save: writes the content to a buffer
    """
    path = Path(path)
    if path.suffix == "":
        path = Path(f"{path}.zip")
    path = path.resolve()  # a symbolic link is kept
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    save(content)
    if path.exists() and not path.is_file():  # a device or pipe must not be replaced by a file; a folder raises
        path.write_bytes(content.getbuffer())
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # else the file might be empty after a power failure
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_archive(path: str | Path | io.BufferedIOBase, own_argument: str) -> None:
    """
    Raise a ValueError if a file is not a saved model, is damaged, or is of another algorithm: one without the constructor
    argument ``own_argument``. SB3 raises the error for a missing file.
    """
    advice = "Use another checkpoint, or the file that `save` has written."
    with contextlib.ExitStack() as stack:
        if isinstance(path, str | Path):
            existing = [each for each in (Path(path), Path(f"{path}.zip")) if each.is_file()]
            if not existing:
                return
            path = existing[0]
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
    if own_argument not in attributes:
        raise ValueError(f"{path} was saved by another algorithm. Load it with the class that saved it, such as A2C.load.")
