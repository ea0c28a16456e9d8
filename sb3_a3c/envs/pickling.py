"""Pickles environments for worker processes, with what cloudpickle needs to know of SB3's wrappers and monitor files."""

import inspect
import io
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper


def dump_env(env: Any) -> tuple[bytes, tuple["Connection[Any, Any]", ...]]:
    """
    Pickle an environment or a ``VecEnv``.

    :return: the pickle, and the connections left out of it: only multiprocessing can send these, at the start of a process
    :raises ValueError: if something in the environments can't be pickled
    """
    buffer = io.BytesIO()
    pickler = _EnvPickler(buffer)
    try:
        pickler.dump(env)
    except Exception as error:
        raise ValueError(
            f"The environments can't be sent to worker processes: pickling them raised {type(error).__name__}: {error}. "
            "Use a SubprocVecEnv, whose environments need not be pickled, or n_workers=0 to train in this process."
        ) from error
    return buffer.getvalue(), tuple(pickler.connections)


def load_env(data: bytes, connections: Sequence["Connection[Any, Any]"] = ()) -> Any:
    """Unpickle what :func:`dump_env` returned."""
    return _EnvUnpickler(io.BytesIO(data), connections).load()


class _EnvPickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.connections: list[Connection[Any, Any]] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Connection):
            return None
        self.connections.append(obj)
        return len(self.connections) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            return _reopen, (obj.file_handler.name, tuple(obj.logger.fieldnames))
        if isinstance(obj, VecEnvWrapper):  # its `class_attributes` can't be pickled
            state = {key: value for key, value in vars(obj).items() if key != "class_attributes"}
            return _rebuild_wrapper, (type(obj), state)
        return super().reducer_override(obj)


class _EnvUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, connections: Sequence["Connection[Any, Any]"]) -> None:
        super().__init__(file)
        self._connections = connections

    def persistent_load(self, pid: int) -> "Connection[Any, Any]":
        return self._connections[pid]


def _reopen(filename: str, fieldnames: tuple[str, ...]) -> ResultsWriter:
    """Append to the monitor file, which a new ``Monitor`` would empty by default."""
    return ResultsWriter(filename, extra_keys=fieldnames[3:], override_existing=False)  # after r, l, t


def _rebuild_wrapper(kind: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = kind.__new__(kind)
    vars(wrapper).update(state, class_attributes=dict(inspect.getmembers(kind)))
    return wrapper
