"""The store of a training on a cluster of one host, for the contract tests."""

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c.cluster.exchange import Center, HostEnd
from sb3_a3c.store.base import Replica
from sb3_a3c.store.shared_memory import SharedMemoryStore


class OneHostStore:
    """Workers push to the host's store; all else goes through the center, after an exchange."""

    def __init__(self, policy: ActorCriticPolicy, n_workers: int, *args: Any, **kwargs: Any) -> None:
        self._host = SharedMemoryStore(policy, n_workers, *args, **kwargs)
        self._store = SharedMemoryStore(policy, n_workers, share_memory=False)
        self._center = Center(self._store, n_workers)
        self._number = self._center.open(range(n_workers))
        self._end = HostEnd(self._host, range(n_workers), self._center.answer(self._number))

    def _exchange(self, with_state: bool = False) -> None:
        answer = self._center.answer(self._number)
        self._center.merge(self._number, self._end.exchange(answer, with_state))

    @property
    def n_updates(self) -> int:
        self._exchange()
        return self._store.n_updates

    def replica(self, policy: ActorCriticPolicy, worker: int) -> Replica:
        return self._host.replica(policy, worker)

    def load_policy(self, policy: ActorCriticPolicy) -> None:
        self._center.load(policy)
        self._exchange()

    def fetch_policy(self, policy: ActorCriticPolicy) -> None:
        self._exchange()
        self._store.fetch_policy(policy)

    def fetch_optimizer(self, policy: ActorCriticPolicy) -> None:
        self._exchange(with_state=True)
        self._center.merge_states()
        self._store.fetch_optimizer(policy)

    def release(self, worker: int, n_transitions: int) -> None:
        self._host.release(worker, n_transitions)

    def close(self) -> None:
        self._host.close()
        self._store.close()
