"""Pickles environments for worker processes, with what cloudpickle needs to know of SB3's wrappers and monitor files."""

import contextlib
import inspect
import io
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
from gymnasium.utils import EzPickle
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_a3c.envs.pygame_objects import reduce_pygame
from sb3_a3c.errors import warn


def dump_env(env: Any, keep_writers: bool = True) -> tuple[bytes, tuple["Connection[Any, Any]", ...]]:
    """
    Pickle an environment or a ``VecEnv``.

    An ``EzPickle`` object, which others would rebuild from its constructor's arguments alone, keeps the attributes that it
    was given since then; a warning names those that can't be sent.

    :param keep_writers: whether a ``Monitor`` appends to its file; otherwise it has none
    :return: the pickle, and the connections left out of it: only multiprocessing can send these, at the start of a process
    :raises ValueError: if something in the environments can't be pickled
    """
    buffer = io.BytesIO()
    pickler = _EnvPickler(buffer, keep_writers=keep_writers)
    try:
        pickler.dump(env)
    except Exception as error:
        raise ValueError(
            f"The environments can't be sent to worker processes: pickling them raised {type(error).__name__}: {error}. "
            "If rendering or playing made that, take new environments: `model.set_env(make_vec_env(…))`. Otherwise use a "
            "SubprocVecEnv, whose environments need not be pickled, or n_workers=0 to train in this process."
        ) from error
    for warning in dict.fromkeys(pickler.warnings):
        warn(warning)
    return buffer.getvalue(), tuple(pickler.references)


def load_env(data: bytes, connections: Sequence["Connection[Any, Any]"] = ()) -> Any:
    """Unpickle what :func:`dump_env` returned."""
    return _EnvUnpickler(io.BytesIO(data), connections).load()


class _EnvPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """
    :param file: to write to
    :param owners: objects whose attributes are being compared: they are referred to, not pickled
    :param rebuilt: the attributes of ``EzPickle`` objects that were rebuilt for comparison, by how they are made
    :param keep_writers: as for :func:`dump_env`
    """

    def __init__(
        self,
        file: io.BytesIO,
        owners: Sequence[Any] = (),
        rebuilt: dict[Any, Any] | None = None,
        keep_writers: bool = True,
    ) -> None:
        super().__init__(file)
        self.references: list[Any] = []
        self.warnings: list[str] = []
        self._owners = owners
        self._keep_writers = keep_writers
        self._rebuilt = {} if rebuilt is None else rebuilt

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Connection) and all(obj is not owner for owner in self._owners):
            return None
        self.references.append(obj)
        return len(self.references) - 1

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            if not self._keep_writers:
                return type(None), ()
            return _reopen, (obj.file_handler.name, tuple(obj.logger.fieldnames))
        if isinstance(obj, VecEnvWrapper):  # its `class_attributes` can't be pickled
            state = {key: value for key, value in vars(obj).items() if key != "class_attributes"}
            return _rebuild_wrapper, (type(obj), state)
        if isinstance(obj, EzPickle) and not _pickles_itself(type(obj)):
            arguments = EzPickle.__getstate__(obj)
            return _rebuild_ez_pickle, (type(obj), arguments), self._set_attributes(obj, arguments), None, None, _update
        if (reduced := reduce_pygame(obj)) is not None:
            return reduced
        return super().reducer_override(obj)

    def _set_attributes(self, obj: EzPickle, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes that were set since the object was made. Warn about those that can't be sent."""
        mine, new = self._attributes(obj, obj), self._attributes_when_new(obj, arguments, 0)
        changed = {name for name, value in mine.items() if value != new.get(name)}
        cant_be_pickled = {name for name in changed if isinstance(mine[name], type)}
        # constructors may draw numbers, and take handles from libraries: those of this object mean nothing elsewhere.
        # Gymnasium's generator is the exception
        candidates = changed & new.keys() - cant_be_pickled - {"_np_random", "_np_random_seed"}
        also_new = self._attributes_when_new(obj, arguments, 1) if candidates else {}
        always_differ = {name for name in candidates if new[name] != also_new.get(name)}
        if lost := cant_be_pickled | always_differ:
            reasons = {"can't be pickled": cant_be_pickled, "differ whenever one is made": always_differ}
            self.warnings.append(
                f"Workers make each {type(obj).__name__} anew from its constructor's arguments (EzPickle) and set what was "
                "set in yours, but for "
                + " and ".join(f"{sorted(names)}, which {reason}" for reason, names in reasons.items() if names)
                + ". If `reset` does not set them, make them depend on the constructor's arguments, or use a SubprocVecEnv "
                "or n_workers=0."
            )
        return {name: value for name, value in vars(obj).items() if name in changed - lost}

    def _attributes_when_new(self, obj: EzPickle, arguments: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the attributes of the first or second object that is made with the same arguments."""
        data, references = self._dump(arguments, obj)
        key = type(obj), data, *map(id, references), number
        if key not in self._rebuilt:
            # with copies of the arguments: an environment among them is left alone
            new = _rebuild_ez_pickle(type(obj), _EnvUnpickler(io.BytesIO(data), references).load())
            self._rebuilt[key] = self._attributes(new, obj)
            with contextlib.suppress(Exception):
                new.close()
        return self._rebuilt[key]  # type: ignore[no-any-return]

    def _attributes(self, of: EzPickle, owner: EzPickle) -> dict[str, Any]:
        """Return each attribute pickled, to be compared; its type if that is impossible."""
        attributes: dict[str, Any] = {}
        for name, value in vars(of).items():
            try:
                attributes[name] = self._dump(value, of, owner)[0]
            except Exception:
                attributes[name] = type(value)
        return attributes

    def _dump(self, value: Any, *owners: Any) -> tuple[bytes, list[Any]]:
        buffer = io.BytesIO()
        pickler = _EnvPickler(buffer, [*self._owners, *owners], self._rebuilt)
        pickler.dump(value)
        return buffer.getvalue(), pickler.references


class _EnvUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, references: Sequence[Any]) -> None:
        super().__init__(file)
        self._references = references

    def persistent_load(self, pid: int) -> Any:
        return self._references[pid]


def _pickles_itself(kind: type[EzPickle]) -> bool:
    """Whether a class has changed how its objects are pickled."""
    names = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    return any(getattr(kind, name) is not getattr(EzPickle, name) for name in names)


def _rebuild_ez_pickle(kind: type[EzPickle], arguments: dict[str, Any]) -> Any:
    # not by `__setstate__`, which would make it refer to another
    return kind(*arguments["_ezpickle_args"], **arguments["_ezpickle_kwargs"])


def _update(obj: Any, attributes: dict[str, Any]) -> None:
    vars(obj).update(attributes)


def _reopen(filename: str, fieldnames: tuple[str, ...]) -> ResultsWriter:
    """Append to the monitor file, which a new ``Monitor`` would empty by default."""
    return ResultsWriter(filename, extra_keys=fieldnames[3:], override_existing=False)  # after r, l, t


def _rebuild_wrapper(kind: type[VecEnvWrapper], state: dict[str, Any]) -> VecEnvWrapper:
    wrapper = kind.__new__(kind)
    vars(wrapper).update(state, class_attributes=dict(inspect.getmembers(kind)))
    return wrapper
