"""Which worker may begin how many rollouts. ``protocol`` says what a ticket is."""

from collections.abc import Iterable

from sb3_a3c.workers.assignment import Assignment


class Tickets:
    """
    Counts the tickets and the transitions of all workers; at first some tickets are due to each.

    :param steps_before: transitions made in earlier trainings
    """

    def __init__(self, assignment: Assignment, steps_before: int) -> None:
        self._assignment, self._steps_before = assignment, steps_before
        self.n_reported = [0] * assignment.n_workers  #: transitions of each
        self._n_out = [0] * assignment.n_workers  # whose rollouts have not been reported
        self._given_up: set[int] = set()  # workers that get no more
        n_tickets = [assignment.n_tickets(worker) for worker in range(assignment.n_workers)]
        #: workers that get a ticket next; at first in rounds, as workers that keep pace begin their rollouts
        self.due = [worker for number in range(max(n_tickets)) for worker, n in enumerate(n_tickets) if number < n]

    def send(self, worker: int) -> bool:
        """Count one that is sent to a worker. Return whether there is this worker."""
        self._n_out[worker] += worker not in self._given_up
        return worker not in self._given_up

    def consume(self, worker: int) -> None:
        """Callbacks have seen one of its rollouts."""
        if worker not in self._given_up:
            self.due.append(worker)

    def use_up(self, worker: int, n_transitions: int) -> None:
        """A rollout has been reported."""
        self._n_out[worker] -= 1
        self.n_reported[worker] += n_transitions

    def renew(self, worker: int, n_waiting: int) -> None:
        """Replace those of a dead worker, of whose rollouts ``n_waiting`` are not consumed, by its successor's."""
        self._drop([worker])
        self.due += [worker] * (self._assignment.n_tickets(worker) - n_waiting)

    def give_up(self, workers: Iterable[int]) -> None:
        """Dead workers get no successors."""
        self._given_up.update(workers)
        self._drop(workers)

    def _drop(self, workers: Iterable[int]) -> None:
        dead = set(workers)
        self.due = [worker for worker in self.due if worker not in dead]
        for worker in dead:
            self._n_out[worker] = 0

    @property
    def n_done(self) -> int:
        """Transitions reported so far, with those of earlier trainings."""
        return self._steps_before + sum(self.n_reported)

    def n_begun(self, n_steps: int) -> int:
        """Transitions so far, with those of the rollouts for which tickets are out."""
        out = zip(self._assignment.env_indices, self._n_out, strict=True)
        return self.n_done + sum(n_steps * len(indices) * n for indices, n in out)
