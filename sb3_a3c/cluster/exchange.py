"""
How the hosts of a training share what they learn, whatever carries their messages.

The workers of each host push to its own store, without a lock and without waiting. Every few hundredths of a second the host
and the center exchange values (parameters and module buffers)::

    center                                      host
    answer: difference = store - known
            known += difference
             ── difference, if another host ─►  exchange: store += difference, known += difference
                has changed the values
                                                          difference = store - known
                                                          known += difference
             ◄─ difference, if workers ───────
                have pushed
    merge: store += difference, known += difference

``known`` is the sum of all messages, of both directions, so both ends agree on it, and ``store - known`` is what the sender
has and the receiver lacks: every step reaches every host once. Differences travel in bfloat16, which halves the messages.
What rounding leaves over, here and in the additions, is in the sender's next difference, so it does not make the stores
drift apart. A host that has all workers sends its values instead, as they are: it is exact to the bit.

Both ends take part in one exchange at a time. If a message is lost, they no longer agree on ``known``: the center must
:meth:`~Center.leave` the host, which loses the steps since its last merged message. To come back it is opened anew.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.store.base import Bytes, MergeableStore, Rows


@dataclass(frozen=True)
class Answer:
    """From the center to a host."""

    rows: Rows  #: counters of all workers
    difference: Bytes | None  #: of the values, if another host has changed them
    values: Bytes | None  #: at the start and after a load: then they and the state replace what the host has
    state: Bytes | None  #: the optimizer's


@dataclass(frozen=True)
class Contribution:
    """From a host to the center."""

    rows: Rows  #: counters of the host's workers
    difference: Bytes | None  #: of the values, if workers have pushed; it includes every push that ``rows`` count
    values: Bytes | None  #: instead of the difference, from a host that has all workers
    state: Bytes | None  #: the optimizer's, if it was asked for


class HostEnd:
    """
    A host's end of the exchange.

    :param store: the host's; it has counters of all workers of the training
    :param workers: those that push to this store
    :param start: the center's first answer
    """

    def __init__(self, store: MergeableStore, workers: Sequence[int], start: Answer) -> None:
        self._store, self._workers = store, list(workers)
        everyone = range(len(start.rows))
        self._others = [worker for worker in everyone if worker not in self._workers]
        store.set_rows(everyone, start.rows)
        self._n_sent = store.updates(self._workers)
        self._known = self._replace(start)

    def exchange(self, answer: Answer, with_state: bool = False) -> Contribution:
        """Take in what other hosts have learned; return what this one has learned since its last contribution."""
        self._receive(answer)
        # in this order: pushes are counted once they are done, so what is sent includes all that `rows` count
        rows, n_updates = self._store.rows(self._workers), self._store.updates(self._workers)
        difference = values = None
        if n_updates != self._n_sent:
            if self._others:
                difference = self._store.difference(self._known)
            else:
                values = self._known = self._store.values(self._known)
            self._n_sent = n_updates
        return Contribution(rows, difference, values, self._store.state() if with_state else None)

    def _receive(self, answer: Answer) -> None:
        if answer.values is not None:
            self._known = self._replace(answer)
        elif answer.difference is not None:
            self._store.add(answer.difference, self._known)
        self._store.set_rows(self._others, answer.rows[self._others])  # last, so that no staleness is underestimated

    def _replace(self, answer: Answer) -> Bytes:
        """Begin with the center's values and optimizer state. What the host has not contributed is dropped."""
        assert answer.values is not None and answer.state is not None
        values = answer.values.copy()  # each end adds differences to its own
        self._store.set_values(values)
        self._store.set_state(_writable(answer.state))
        return values


class _Host:
    """What the center knows of a host."""

    def __init__(self, workers: Sequence[int], n_updates: int) -> None:
        self.workers = list(workers)
        self.n_updates_before = n_updates  # by these workers, when the host was opened
        self.must_begin_anew = True  # with the next answer; until then what it sends is dropped
        self.known: Bytes  # sum of all messages, of both directions
        self.version = -1  # of the center's values that the host has, but for rounding
        self.n_others_seen = [0, 0]  # updates by other hosts, up to the answer before the last one, and up to this one
        self.state_before: Bytes  # of the optimizer, when it was last merged
        self.state: Bytes | None = None  # received last


class Center:
    """
    The center's end of all exchanges. It is not thread-safe. If its process dies, another one may take over the store with
    a ``Center`` of its own, on which all hosts are opened anew.

    :param store: the center's, to which no worker pushes; it has counters of all workers
    """

    def __init__(self, store: MergeableStore, n_workers: int) -> None:
        self._store, self._all_workers = store, range(n_workers)
        self._version = 0  # of the store's values
        self._hosts: dict[int, _Host] = {}
        self._numbers = itertools.count()

    def open(self, workers: Sequence[int]) -> int:
        """
        Let a host take part.

        :param workers: the host's, which no other host has
        :return: a number that stands for this host until it leaves, and is not used again
        """
        number = next(self._numbers)
        self._hosts[number] = _Host(workers, self._store.updates(workers))
        return number

    def answer(self, number: int) -> Answer:
        """What the host is to be sent now; the first one opens its :class:`HostEnd`."""
        host = self._hosts[number]
        rows, difference, values, state = self._store.rows(self._all_workers), None, None, None
        host.n_others_seen = [host.n_others_seen[1], self._n_others(host)]
        if host.must_begin_anew:
            values = host.known = self._store.values()
            state = host.state_before = self._store.state()
            host.must_begin_anew = False
        elif host.version != self._version:
            difference = self._store.difference(host.known)
        host.version = self._version
        return Answer(rows, difference, values, state)

    def merge(self, number: int, contribution: Contribution) -> int | None:
        """
        Take in what a host has learned. Does nothing if it has left.

        :return: the staleness of its values, which is the number of updates by other hosts that were merged since the answer
            before the last one, with which it began to make these steps; None if it has sent none
        """
        host = self._hosts.get(number)
        if host is None:
            return None
        staleness = None
        if not host.must_begin_anew:
            if contribution.difference is not None or contribution.values is not None:
                self._merge_values(host, contribution)
                staleness = self._n_others(host) - host.n_others_seen[0]
            if contribution.state is not None:
                host.state = _writable(contribution.state)
        # after the values: should this process die between the two, an update was made that is not counted
        self._store.set_rows(host.workers, contribution.rows)
        return staleness

    def leave(self, number: int) -> None:
        """Forget a host. What it had not contributed is lost, and not counted."""
        self._hosts.pop(number, None)

    def load(self, policy: ActorCriticPolicy) -> None:
        """Let all hosts continue from the parameters, module buffers and optimizer state of a policy."""
        self._store.load_policy(policy)
        for host in self._hosts.values():
            host.must_begin_anew, host.state = True, None

    def merge_states(self) -> None:
        """
        Set the center's optimizer state to the mean of those that hosts have sent last, weighted by the numbers of their
        updates, so that it can be saved. Hosts keep their own.
        """
        states = []
        for host in self._hosts.values():
            if host.state is not None:
                n_updates = self._store.updates(host.workers) - host.n_updates_before
                states.append((n_updates, host.state_before, host.state))
                host.state_before = host.state  # so that its steps are not added again
        self._store.merge_states(states)

    def _n_others(self, host: _Host) -> int:
        """Updates by other hosts."""
        return self._store.n_updates - self._store.updates(host.workers)

    def _merge_values(self, host: _Host, contribution: Contribution) -> None:
        if contribution.values is not None:  # from a host that has all workers: there is no other
            self._store.set_values(_writable(contribution.values))
        elif contribution.difference is not None:
            self._store.add(contribution.difference, host.known)
        if host.version == self._version:
            host.version += 1  # the host has these values
        self._version += 1


def _writable(received: Bytes) -> Bytes:
    """Arrays out of Ray's object store are read-only, which torch can't express, and would occupy it for as long as kept."""
    return np.require(received, requirements="W")
