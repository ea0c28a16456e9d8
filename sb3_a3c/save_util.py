"""Files of saved models: written whole or not at all, and looked at before anything is made of them."""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

#: What SB3 puts into a model's file.
_MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")


def write_whole(path: str | Path, save: Callable[[io.BytesIO], None]) -> None:
    """
    Write a file so that, whatever happens meanwhile, there is the old one or the new one and never half of one.

    :param path: the file; as in Stable-Baselines3 it becomes a ``.zip`` if it has no suffix, and its folder is made
    :param save: writes the content
    """
    path = Path(path)
    if path.suffix == "":
        path = Path(f"{path}.zip")
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    save(content)
    if path.exists() and not path.is_file():  # devices and pipes can't be exchanged for a file; folders raise
        path.write_bytes(content.getbuffer())
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or, after a power failure, the new name might stand for an empty file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_archive(path: str | Path | io.BufferedIOBase, own_argument: str) -> None:
    """
    :param path: of a saved model, as ``load`` takes it; what does not exist is left to Stable-Baselines3
    :param own_argument: a constructor argument that only this algorithm has
    :raises ValueError: if that is no file of a model, a damaged one, or one of another algorithm
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
            damaged = archive.testzip()  # compares check sums
            attributes = json.loads(archive.read("data")) if damaged is None and "data" in archive.namelist() else {}
        except Exception as error:  # of many kinds: whatever the bytes in a wrong place happen to mean
            raise ValueError(f"{path} is not the file of a saved model, or it is damaged ({error}). {advice}") from error
        missing = [name for name in _MEMBERS if name not in archive.namelist()]
    if damaged is not None or missing:
        what = f"{damaged!r} in it is damaged" if damaged is not None else f"it has no {', '.join(missing)}"
        raise ValueError(f"{path} can't be loaded: {what}. {advice}")
    if own_argument not in attributes:
        raise ValueError(f"{path} was saved by another algorithm. Load it with the class that saved it, such as A2C.load.")
