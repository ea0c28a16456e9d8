"""Which worker may begin how many rollouts. ``protocol`` says what a ticket is."""

from collections.abc import Iterable

from sb3_a3c.workers.assignment import Assignment


class Tickets:
    """Counts the tickets of all workers; at first some are due to each."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._n_out = [0] * assignment.n_workers  # whose rollouts have not been reported
        n_tickets = [assignment.n_tickets(worker) for worker in range(assignment.n_workers)]
        #: workers that get a ticket next; at first in rounds, as workers that keep pace begin their rollouts
        self.due = [worker for number in range(max(n_tickets)) for worker, n in enumerate(n_tickets) if number < n]

    def send(self, worker: int) -> None:
        self._n_out[worker] += 1

    def use_up(self, worker: int) -> None:
        """A rollout has been reported."""
        self._n_out[worker] -= 1

    def renew(self, worker: int, n_waiting: int) -> None:
        """Replace those of a dead worker, of whose rollouts ``n_waiting`` are not consumed, by its successor's."""
        self.drop([worker])
        self.due += [worker] * (self._assignment.n_tickets(worker) - n_waiting)

    def drop(self, workers: Iterable[int]) -> None:
        """Take the tickets of dead workers away."""
        dead = set(workers)
        self.due = [worker for worker in self.due if worker not in dead]
        for worker in dead:
            self._n_out[worker] = 0

    def n_transitions(self, n_steps: int) -> int:
        """Transitions of the rollouts for which tickets are out."""
        return sum(n_steps * len(indices) * n for indices, n in zip(self._assignment.env_indices, self._n_out, strict=True))
