"""cloudpickle for environments, with the few classes of Stable-Baselines3 that it can't pickle by itself."""

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
    buffer = io.BytesIO()
    pickler = _EnvPickler(buffer)
    try:
        pickler.dump(env)
    except Exception as error:
        raise ValueError(
            f"The environments can't be sent to worker processes: pickling them raised {type(error).__name__}: {error}. "
            "Give them no open files, locks or windows before training, or use n_workers=0 to train in this process."
        ) from error
    return buffer.getvalue(), tuple(pickler.connections)


class _EnvPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, and the few things of Stable-Baselines3 that can't be pickled as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.connections: list[Connection[Any, Any]] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Connections can only travel at the start of a process, by multiprocessing's own pickler."""
        if not isinstance(obj, Connection):
            return None
        self.connections.append(obj)
        return len(self.connections) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            return _reopen, (obj.file_handler.name, tuple(obj.logger.fieldnames))
        if isinstance(obj, VecEnvWrapper):
            state = {key: value for key, value in obj.__dict__.items() if key != "class_attributes"}
            return rebuild_wrapper, (type(obj), state)
        return super().reducer_override(obj)


class EnvUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, connections: Sequence["Connection[Any, Any]"]) -> None:
        super().__init__(file)
        self.connections = connections

    def persistent_load(self, pid: int) -> "Connection[Any, Any]":
        return self.connections[pid]


def _reopen(filename: str, fieldnames: tuple[str, ...]) -> ResultsWriter:
    """The monitor file goes on where it is: making the environment anew would empty it."""
    return ResultsWriter(filename, extra_keys=fieldnames[3:], override_existing=False)


def rebuild_wrapper(kind: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = kind.__new__(kind)
    vars(wrapper).update(state, class_attributes=dict(inspect.getmembers(kind)))
    return wrapper
