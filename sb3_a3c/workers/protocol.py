"""
The messages between the main process and its workers, and what the collector asks of them::

    main process                                                       worker
      Ticket              learning rate; others' statistics ────────►   one more rollout may begin
      UpdateHyperparams   a callback has changed some ──────────────►   from its next rollout on
      EnvCall             a method of the environments ─────────────►   answered with what it returns, or raises
      Shutdown            learning is over ─────────────────────────►   FinalState, and the process ends
                                                                 ◄───   RolloutFinished, once a rollout
                                                                 ◄───   TrainingDone, after the last; then it only serves

A worker spends a ticket on each rollout. It gets some at its start, and one for each of its rollouts that callbacks have
seen. Without a ticket it waits, and serves meanwhile. So it runs ahead of the callbacks by a bounded number of rollouts, and
a call to the environments never waits for a callback. Schedules are evaluated in the main process, where they may read
anything.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.actor_learner.config import Hyperparams
from sb3_a3c.actor_learner.report import Report
from sb3_a3c.envs.normalize import Deltas
from sb3_a3c.envs.wrapper_state import WrapperCounts
from sb3_a3c.errors import WorkerDiedError
from sb3_a3c.store.base import ParameterStore


class Ticket(NamedTuple):
    """To a worker: it may begin one more rollout."""

    learning_rate: float  #: of that rollout
    deltas: Deltas  #: what other workers' ``VecNormalize`` saw


class UpdateHyperparams(NamedTuple):
    """To a worker: hyper-parameters that count from its next rollout on."""

    hyperparams: Hyperparams
    normalization: list[dict[str, Any]]  #: of ``envs.normalize.options``


class EnvCall(NamedTuple):
    """To a worker: call a method of its ``VecEnv``, and answer with what it returns."""

    method: str
    indices: list[int] | None  #: of the worker's own environments; None if the method takes none
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Shutdown(NamedTuple):
    """To a worker: send the final state and end."""


class RolloutFinished(NamedTuple):
    """From a worker: one rollout, and what its ``VecNormalize`` saw meanwhile."""

    report: Report
    deltas: Deltas


class TrainingDone(NamedTuple):
    """From a worker: no more rollouts will come. It still serves calls to its environments."""


class FinalState(NamedTuple):
    """From a worker: its final message."""

    deltas: Deltas
    counts: WrapperCounts  #: what the wrappers of its environments have counted


class Workers(Protocol):
    """
    What the collector asks of its workers: processes of this machine or of other hosts, or the one worker in this process.
    """

    @property
    def n_here(self) -> int:
        """Number of processes that need cores of this machine, beside this one."""

    @property
    def stops_at_goal(self) -> bool:
        """Whether workers know at once how many transitions all of them have reserved. If not, tickets are rationed."""

    @property
    def stop_seconds(self) -> float:
        """Seconds that a healthy worker has to send its final state."""

    def start(self) -> None:
        """Start all workers. If one can't be started, stop the others."""

    @property
    def ended(self) -> set[int]: ...

    @property
    def finished(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> None: ...

    def take(self) -> list[tuple[int, Any]]: ...

    def send(self, index: int, message: Any) -> None: ...

    def ask(self, requests: Mapping[int, Any], on_death: Callable[[WorkerDiedError], None]) -> dict[int, Any]: ...

    def replace_all(self, workers: Iterable[int]) -> None:
        """
        Let new workers run in the place of dead ones, with the assignment as it is now. They may start later; what is sent
        to them until then reaches them.
        """

    def load(self, policy: ActorCriticPolicy) -> None:
        """Let workers continue from the parameters and the optimizer state of a policy."""

    def sync(self, with_optimizer: bool = False) -> None:
        """Bring the parameters and counters of the store up to date, and on demand the state of its optimizer."""

    def pop_hint(self) -> str:
        """What keeps workers from working well, if that has just been found; else an empty text."""

    def pop_figures(self) -> Mapping[str, Any]:
        """Values for the logger since the last call."""

    def request_stop(self) -> None: ...

    def stop(self, hurry: threading.Event) -> None: ...


class OnOneStore:
    """The part of :class:`Workers` that is the same wherever they push to the collector's own store."""

    stops_at_goal = True
    stop_seconds = 2.0

    def __init__(self, store: ParameterStore) -> None:
        self._store = store

    def load(self, policy: ActorCriticPolicy) -> None:
        self._store.load_policy(policy)

    def sync(self, with_optimizer: bool = False) -> None:
        pass

    def pop_hint(self) -> str:
        return ""

    def pop_figures(self) -> Mapping[str, Any]:
        return {}
