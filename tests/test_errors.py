"""A3C's exceptions: base classes, and pickling."""

import pickle

import pytest

from sb3_a3c.errors import A3CError, DivergenceError, RemoteTraceback, WorkerDiedError


@pytest.mark.parametrize("kind", [WorkerDiedError, RemoteTraceback, DivergenceError])
def test_all_are_a3c_errors_and_can_be_pickled(kind: type[A3CError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(error) is kind
    assert isinstance(error, A3CError)
    assert "what happened" in str(error)


def test_builtin_base_classes() -> None:
    assert issubclass(DivergenceError, ValueError)  # RL Zoo prunes a trial on these
    assert issubclass(WorkerDiedError, RuntimeError)
