"""The workers of a training on this machine: processes, or the one in this process."""

from collections.abc import Iterable

from sb3_a3c.envs.wrapper_state import begin_episodes
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.base import ParameterStore
from sb3_a3c.workers.assignment import Assignment
from sb3_a3c.workers.in_process import InProcessWorker
from sb3_a3c.workers.protocol import OnOneStore, Workers
from sb3_a3c.workers.worker_main import run_worker

#: Modules that a fork server imports once for all workers. torch's optimizers import torch._dynamo at their first step,
#: which takes seconds; cv2 and ale_py, slow to import too, are there for Atari.
PRELOAD = ("sb3_a3c.workers.worker_main", "stable_baselines3.common.vec_env", "torch._dynamo", "cv2", "ale_py")


class WorkerProcesses(OnOneStore, Supervisor):
    """:class:`~sb3_a3c.workers.protocol.Workers` in processes of this machine, which map the store's memory."""

    def __init__(
        self, assignment: Assignment, store: ParameterStore, start_method: str | None = None, timeout: float | None = None
    ) -> None:
        arguments = [(store, *assignment.arguments(worker)) for worker in range(assignment.n_workers)]
        OnOneStore.__init__(self, store)
        Supervisor.__init__(self, run_worker, arguments, start_method, PRELOAD, timeout)
        self.n_here = assignment.n_workers
        self._assignment = assignment

    def replace_all(self, workers: Iterable[int]) -> None:
        for worker in workers:
            self.replace(worker, (self._store, *self._assignment.arguments(worker)))


def workers_here(
    assignment: Assignment, store: ParameterStore, start_method: str | None = None, timeout: float | None = None
) -> Workers:
    """The workers of an assignment, in processes or in this one; :meth:`Workers.start` starts them."""
    if assignment.shares:
        return WorkerProcesses(assignment, store, start_method, timeout)
    return InProcessWorker(assignment.configs[0], begin_episodes(assignment.env, assignment.first_reset), store)
