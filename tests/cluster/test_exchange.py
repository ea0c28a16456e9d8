"""The exchange between hosts: each step reaches each host once, whichever host dies when, and a host alone is exact."""

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c import MlpLstmPolicy, MlpPolicy
from sb3_a3c.cluster.exchange import Answer, Center, Contribution, HostEnd
from sb3_a3c.store.base import Bytes, Rows
from sb3_a3c.store.shared_memory import SharedMemoryStore
from tests.store.small_policy import assert_equal, copied, random_gradients, set_gradients


class Vector(th.nn.Module):
    """Stands in for a policy: a few numbers and module buffers; its optimizer subtracts gradients."""

    def __init__(self, n: int = 4, dtype: th.dtype = th.float32, n_statistics: int = 0) -> None:
        super().__init__()
        self.weight = th.nn.Parameter(th.zeros(n, dtype=dtype))
        for i in range(n_statistics):
            self.register_buffer(f"statistics_{i}", th.zeros(2))
        self.optimizer = th.optim.SGD(self.parameters(), lr=1.0)


def make_store(policy: Any, n_workers: int) -> SharedMemoryStore:
    return SharedMemoryStore(policy, n_workers, share_memory=False)


class Host:
    """A host of one worker. Its store is made from a policy that need not be as the center's is."""

    def __init__(self, center: Center, policy: Any, worker: int = 0, n_workers: int = 1) -> None:
        self.center, self.number = center, center.open([worker])
        self.store = make_store(policy, n_workers)
        self.end = HostEnd(self.store, [worker], center.answer(self.number))
        self.policy: Any = copied(policy)
        self.replica = self.store.replica(self.policy, worker)

    def push(self, gradients: list[th.Tensor]) -> int | None:
        set_gradients(self.policy, gradients)
        return self.replica.push()

    def contribute(self, with_state: bool = False) -> Contribution:
        return self.end.exchange(self.center.answer(self.number), with_state)

    def exchange(self, with_state: bool = False) -> int | None:
        return self.center.merge(self.number, self.contribute(with_state))


def make_hosts(policy: Any, n_hosts: int) -> tuple[SharedMemoryStore, Center, list[Host]]:
    store = make_store(policy, n_hosts)
    center = Center(store, n_hosts)
    return store, center, [Host(center, policy, worker, n_hosts) for worker in range(n_hosts)]


def fetched(store: SharedMemoryStore, policy: Any) -> Any:
    """A copy of the policy with the parameters, module buffers and optimizer state of the store."""
    policy = copied(policy)
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    return policy


# --- each step once --------------------------------------------------------------------------------------------------

N_HOSTS, N_STEPS, N_EVENTS = 3, 8, 16


class ArrayStore:
    """What an exchange needs of a store, for an array without optimizer; several times as fast as the one for training."""

    def __init__(self, policy: Any, n_workers: int) -> None:
        self.array = policy.weight.detach().numpy().copy()
        self.counters = [0] * n_workers

    @property
    def n_updates(self) -> int:
        return sum(self.counters)

    def load_policy(self, policy: Any) -> None:
        self.array[:] = policy.weight.detach().numpy()

    def values(self, known: Bytes | None = None) -> Bytes:
        values: Bytes = self.array.copy().view(np.uint8)
        return values

    def set_values(self, values: Bytes) -> None:
        self.array[:] = values.view(np.float32)

    def difference(self, known: Bytes) -> Bytes:
        difference: Bytes = (self.array - known.view(np.float32)).view(np.uint8)
        known[:] = self.array.view(np.uint8)
        return difference

    def add(self, difference: Bytes, known: Bytes) -> None:
        for array in (self.array, known.view(np.float32)):
            array += difference.view(np.float32)

    def state(self) -> Bytes:
        return np.zeros(0, dtype=np.uint8)

    def set_state(self, state: Bytes) -> None:
        pass

    def rows(self, workers: Sequence[int]) -> Rows:
        return np.array([[self.counters[worker]] for worker in workers])

    def set_rows(self, workers: Sequence[int], rows: Rows) -> None:
        for worker, (count,) in zip(workers, rows.tolist(), strict=True):
            self.counters[worker] = count

    def updates(self, workers: Sequence[int]) -> int:
        return sum(self.counters[worker] for worker in workers)


class Stores:
    """The center's and the hosts', used for one training after another: to make them takes longer than a training."""

    def __init__(self, store_class: Any) -> None:
        self.zeros: Any = Vector(N_STEPS)
        self.center, *self.hosts = (store_class(self.zeros, N_HOSTS) for _ in range(1 + N_HOSTS))
        policies = [Vector(N_STEPS) for _ in range(N_STEPS)]
        for i, policy in enumerate(policies):
            policy.weight.data[i] = 1
        zero = self.center.values()
        self._steps = [store_class(policy, N_HOSTS).difference(zero.copy()) for policy in policies]
        self._nobodys = zero  # known values that no message is about

    def push(self, worker: int, step: int) -> None:
        """What a worker's push of a gradient does, but sooner."""
        store = self.hosts[worker]
        store.add(self._steps[step], self._nobodys)
        rows = store.rows([worker])
        rows[0, 0] += 1
        store.set_rows([worker], rows)


def has_steps(store: Any, steps: npt.NDArray[np.bool_]) -> bool:
    """Whether a store has each of these steps once, and no others."""
    return np.array_equal(store.values()[: 4 * N_STEPS].view(np.float32), steps)


class ModelHost:
    """A living host, and the steps that its store must have. Its messages are sent and received one by one."""

    def __init__(self, training: "Training", worker: int) -> None:
        self.training, self.worker = training, worker
        self.number = training.center.open([worker])
        self.begins_anew = True  #: with the next answer
        self.message: Any = None  #: that has been sent, and not been received yet
        self.steps: npt.NDArray[np.bool_]
        self.n_updates = training.n_updates[worker]
        answer, self.steps, _ = self.answer()
        self.end = HostEnd(training.stores.hosts[worker], [worker], answer)

    def push(self) -> None:
        if self.training.unused:
            step = self.training.unused.pop()
            self.training.stores.push(self.worker, step)
            self.steps[step] = True
            self.n_updates += 1

    def proceed(self) -> None:
        """Send the next message to this host, or let it or the center receive the one that is under way."""
        if self.message is None:
            self.message = self.answer()
        elif isinstance(self.message[0], Answer):
            answer, steps, replaces = self.message
            self.steps = steps.copy() if replaces else self.steps | steps
            self.message = self.end.exchange(answer), self.steps.copy(), self.n_updates
        else:
            self.merge()

    def answer(self) -> tuple[Answer, npt.NDArray[np.bool_], bool]:
        """The center's answer, the steps that it brings, and whether these replace the host's."""
        answer, replaces = self.training.center.answer(self.number), self.begins_anew
        assert (answer.state is not None) == replaces
        self.begins_anew = False
        return answer, self.training.steps.copy(), replaces

    def merge(self) -> None:
        contribution, steps, n_updates = self.message
        self.training.center.merge(self.number, contribution)
        if not self.begins_anew:  # else the center was loaded meanwhile
            self.training.steps |= steps
        self.training.n_updates[self.worker] = n_updates
        self.message = None


class Training:
    """Random pushes, messages, deaths and loads."""

    def __init__(self, stores: Stores, seed: int) -> None:
        self.stores, self.random = stores, random.Random(seed)
        self.steps = np.zeros(N_STEPS, dtype=bool)  #: that the center must have
        self.n_updates = [0] * N_HOSTS  #: that it must have counted
        self.unused = list(range(N_STEPS))
        self.too_late: list[tuple[int, Contribution]] = []  #: messages of hosts that the center has given up
        stores.center.set_rows(range(N_HOSTS), np.zeros_like(stores.center.rows(range(N_HOSTS))))
        self.center = Center(stores.center, N_HOSTS)
        self.center.load(stores.zeros)
        self.hosts: list[ModelHost | None] = [ModelHost(self, worker) for worker in range(N_HOSTS)]
        self.n_loads = 0

    def event(self) -> None:
        worker = self.random.randrange(N_HOSTS)
        host, kind = self.hosts[worker], self.random.random()
        if kind < 0.03:
            self.load()
        elif kind < 0.06 and self.too_late:
            self.center.merge(*self.too_late.pop())
        elif host is None:
            self.hosts[worker] = ModelHost(self, worker)
        elif kind < 0.13:
            self.die(worker, host)
        elif kind < 0.5:
            host.push()
        else:
            host.proceed()

    def load(self) -> None:
        self.center.load(self.stores.zeros)
        self.n_loads += 1
        self.steps[:] = False
        for host in self.hosts:
            if host is not None:
                host.begins_anew = True

    def die(self, worker: int, host: ModelHost) -> None:
        if host.message is not None and isinstance(host.message[0], Contribution):  # it may still arrive, or too late
            if self.random.random() < 0.5:
                host.merge()
            else:
                self.too_late.append((host.number, host.message[0]))
        self.center.leave(host.number)
        self.hosts[worker] = None

    def check(self) -> None:
        assert has_steps(self.stores.center, self.steps)
        assert [self.stores.center.updates([worker]) for worker in range(N_HOSTS)] == self.n_updates
        assert self.n_loads or sum(self.n_updates) == self.steps.sum()
        for host in self.hosts:
            if host is not None:
                assert has_steps(self.stores.hosts[host.worker], host.steps)


@pytest.mark.parametrize(("store_class", "n_trainings"), [(ArrayStore, 3000), (SharedMemoryStore, 100)])
def test_each_step_reaches_the_center_and_all_hosts_exactly_once(store_class: Any, n_trainings: int) -> None:
    """In random trainings of three hosts. Each step adds 1 to an element of its own."""
    stores = Stores(store_class)
    n_pushed = n_merged = n_late = 0
    for seed in range(n_trainings):
        training = Training(stores, seed)
        for _ in range(N_EVENTS):
            training.event()
        training.check()
        for late in training.too_late:
            training.center.merge(*late)
        living = [host for host in training.hosts if host is not None]
        for host in living:  # what is under way arrives; then an exchange more brings all that hosts have to the center …
            while host.message is not None or host.begins_anew:
                host.proceed()
            for _ in range(3):
                host.proceed()
        for host in living:  # … and another answer brings it to all hosts
            host.proceed()
            host.proceed()
            assert np.array_equal(host.steps, training.steps)
        training.check()
        n_pushed += N_STEPS - len(training.unused)
        n_merged += int(training.steps.sum())
        n_late += len(training.too_late)
    assert 0.3 < n_merged / n_pushed < 0.8  # deaths and loads lose steps
    assert n_late > n_trainings / 20


# --- one host --------------------------------------------------------------------------------------------------------


def make_policy(policy_class: type[ActorCriticPolicy], **kwargs: Any) -> ActorCriticPolicy:
    return policy_class(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), lambda _: 1e-3, **kwargs)


@pytest.mark.parametrize(("policy_class", "kwargs"), [(MlpPolicy, {}), (MlpLstmPolicy, {"lstm_hidden_size": 16})])
def test_one_host_is_exact_to_the_bit(policy_class: type[ActorCriticPolicy], kwargs: dict[str, Any]) -> None:
    """6,000 steps of an environment are 300 updates. At some of them the model is saved; one is not finite."""
    policy = make_policy(policy_class, optimizer_kwargs={"fused": True}, net_arch=[16, 16], **kwargs)
    generator = th.Generator().manual_seed(0)
    set_gradients(policy, random_gradients(policy, generator))
    policy.optimizer.step()  # so that moments are there to continue from
    plain = make_store(policy, 1)
    replica = plain.replica(plain_policy := copied(policy), 0)
    store, center, (host,) = make_hosts(policy, 1)
    some_gradients = [random_gradients(policy, generator) for _ in range(40)]
    when = random.Random(0)
    for n_update in range(300):
        gradients = some_gradients[n_update % 40]
        if n_update == 100:
            gradients = [gradient * float("nan") for gradient in gradients]
        set_gradients(plain_policy, gradients)
        replica.push()
        host.push(gradients)
        if when.random() < 0.3:
            contribution = host.end.exchange(answer := center.answer(host.number), with_state=when.random() < 0.1)
            assert answer.values is None and answer.difference is None
            assert center.merge(host.number, contribution) == 0
            center.merge_states()
        replica.pull()
        host.replica.pull()
    host.exchange(with_state=True)
    center.merge_states()
    result, expected = fetched(store, policy), fetched(plain, policy)
    assert store.n_updates == 299
    assert_equal(result, expected, 0.0)
    for a, b in zip(result.parameters(), expected.parameters(), strict=True):
        assert float(result.optimizer.state[a]["step"]) == 301  # torch counts the one that was undone, too
        for key, value in expected.optimizer.state[b].items():
            assert th.equal(result.optimizer.state[a][key], value), key


# --- several hosts ---------------------------------------------------------------------------------------------------


def ones(n: float = 1.0) -> list[th.Tensor]:
    """The gradient that makes ``Vector`` subtract n."""
    return [th.full((4,), float(n))]


def weight(store: SharedMemoryStore) -> float:
    """The number that all elements of a ``Vector`` are."""
    (number,) = set(fetched(store, Vector()).weight.tolist())
    return float(number)


def exchange_leftovers(hosts: list[Host]) -> None:
    """Let all hosts have what others have, with what the rounding of differences to 8 bits has left over of 24."""
    for _ in range(3):
        for host in hosts:
            host.push([th.zeros_like(parameter) for parameter in host.policy.parameters()])
            host.exchange()
    for host in hosts:
        host.exchange()


def test_rounding_is_bounded_and_stores_do_not_drift_apart() -> None:
    policy, generator, when = Vector(500), th.Generator().manual_seed(0), random.Random(0)
    policy.weight.data.copy_(th.randn(500, generator=generator))
    store, _, hosts = make_hosts(policy, 3)
    exact, largest = policy.weight.detach().double(), 0.0
    for _ in range(600):
        gradient = 0.01 * th.randn(500, generator=generator)
        exact = exact - gradient.double()
        largest = max(largest, float(exact.abs().max()))
        host = when.choice(hosts)
        host.push([gradient])
        if when.random() < 0.5:
            host.exchange()
    exchange_leftovers(hosts)
    total = fetched(store, policy).weight.detach()
    spacing = 2.0 ** np.floor(np.log2(largest)) * th.finfo(th.float32).eps
    # each push and each of two additions in about 300 exchanges was rounded once, with an error of half a spacing at most:
    # such errors add up as the steps of a random walk, and 5 standard deviations of their sum are
    assert float((total - exact).abs().max()) < 5 * spacing * ((600 + 2 * 300) / 12) ** 0.5
    for host in hosts:
        assert float((fetched(host.store, policy).weight.detach() - total).abs().max()) <= spacing


def test_pushes_during_an_exchange() -> None:
    """Hogwild: of two writes at once one may be lost, but then it is lost in all stores, and the counts are exact."""
    n_pushes, n_elements = 300, 20_000
    policy = Vector(n_elements)
    store, _, (busy, other) = make_hosts(policy, 2)

    def push() -> None:
        for _ in range(n_pushes):
            busy.push([th.full((n_elements,), -1.0)])

    thread = threading.Thread(target=push)
    thread.start()
    n_others = 0
    while thread.is_alive():
        other.push([th.full((n_elements,), -1024.0)])
        n_others += 1
        for host in (other, busy):
            host.exchange()
    thread.join()
    exchange_leftovers([busy, other])
    result = fetched(store, policy).weight.detach()
    assert all(th.equal(fetched(host.store, policy).weight, result) for host in (busy, other))
    assert [store.updates([0]), store.updates([1])] == [n_pushes + 3, n_others + 3]
    assert th.equal(result, result.round())
    assert float((result % 1024).max()) <= n_pushes
    assert n_others / 2 < float((result // 1024).mean()) <= float((result // 1024).max()) <= n_others


def test_an_addition_that_a_push_overwrites_is_taken_back_everywhere() -> None:
    store, _, (first, second) = make_hosts(Vector(), 2)
    second.push(ones(-8))
    second.exchange()
    before = first.store.values()
    first.contribute()  # adds 8, but a push that has read the number before writes it after that
    first.store.set_values(before)
    first.push(ones(-1))
    for host in (first, second, first):
        host.exchange()
    assert [weight(s) for s in (store, first.store, second.store)] == [1, 1, 1]


def test_a_host_that_dies_loses_what_it_had_not_contributed_and_comes_back_from_the_center() -> None:
    store, center, (first, second) = make_hosts(Vector(), 2)
    first.push(ones(-1))
    first.exchange()
    first.push(ones(-2))
    too_late = first.contribute()
    center.leave(first.number)
    second.push(ones(-4))
    second.exchange()
    assert center.merge(first.number, too_late) is None
    assert weight(store) == weight(second.store) == 5
    assert store.n_updates == 2
    first = Host(center, Vector(), 0, 2)
    assert weight(first.store) == 5
    assert first.store.rows(range(2)).tolist() == store.rows(range(2)).tolist()
    first.push(ones(-8))
    assert first.exchange() == 0
    second.exchange()
    assert weight(store) == weight(second.store) == 13
    assert [store.updates([0]), store.updates([1])] == [2, 1]


def test_another_center_takes_over_the_store() -> None:
    store, _, (host,) = make_hosts(Vector(), 1)
    host.push(ones())
    host.exchange()
    host.push(ones())
    host = Host(Center(store, 1), Vector())  # the center's process has died
    host.push(ones())
    host.exchange()
    assert weight(store) == weight(host.store) == -2
    assert store.n_updates == 2


def test_what_has_not_changed_does_not_travel() -> None:
    _, center, (first, second) = make_hosts(Vector(), 2)
    assert first.contribute().difference is None
    first.push(ones())
    contribution = first.contribute(with_state=True)
    assert contribution.difference is not None and contribution.state is not None
    center.merge(first.number, contribution)
    assert center.answer(first.number).difference is None
    contribution = first.contribute()
    assert contribution.difference is None and contribution.state is None
    answer = center.answer(second.number)
    assert answer.difference is not None and answer.values is None and answer.state is None
    assert second.end.exchange(answer).difference is None  # the center has it from the first host
    assert weight(second.store) == -1


def read_only(message: Any) -> Any:
    """A message as it arrives: a copy, of arrays that can't be written to."""
    arrays = {name: None if array is None else array.copy() for name, array in vars(message).items()}
    for array in arrays.values():
        if array is not None:
            array.setflags(write=False)
    return type(message)(**arrays)


def test_messages_may_be_read_only() -> None:
    """As the arrays that Ray hands out are. For torch that is worth a warning."""
    store = make_store(Vector(), 2)
    center, ends, replicas = Center(store, 2), {}, []
    for worker in range(2):
        policy: Any = Vector()
        host_store = make_store(policy, 2)
        number = center.open([worker])
        ends[number] = HostEnd(host_store, [worker], read_only(center.answer(number)))
        replicas.append(host_store.replica(policy, worker))
        policy.weight.grad = th.ones(4)
    th.set_warn_always(True)
    try:
        for _ in range(2):
            for (number, end), replica in zip(ends.items(), replicas, strict=True):
                replica.push()
                center.merge(number, read_only(end.exchange(read_only(center.answer(number)), with_state=True)))
        center.merge_states()
    finally:
        th.set_warn_always(False)
    assert weight(store) == -2  # each worker's second push had no gradient


def test_counters_of_all_workers_reach_all_hosts() -> None:
    policy: Any = Vector()
    store = SharedMemoryStore(policy, 2, share_memory=False)
    center = Center(store, 2)
    ends, replicas, stores = [], [], []
    for worker in range(2):
        stores.append(SharedMemoryStore(policy, 2, total_steps=100, share_memory=False))
        number = center.open([worker])
        ends.append((number, HostEnd(stores[-1], [worker], center.answer(number))))
        replicas.append(stores[-1].replica(copied(policy), worker))

    def exchange_all() -> None:
        for number, end in [*ends, *ends]:
            center.merge(number, end.exchange(center.answer(number)))

    assert replicas[0].reserve(60) and replicas[1].reserve(40)
    assert replicas[0].reserve(10)  # does not know of the other one's yet
    exchange_all()
    assert not replicas[0].reserve(1) and not replicas[1].reserve(1)
    stores[1].release(1, 0)
    exchange_all()
    assert replicas[0].reserve(30)
    replicas[0].push()
    replicas[1].push()
    exchange_all()
    assert [s.n_updates for s in (store, *stores)] == [2, 2, 2]
    assert replicas[1].push() == 1  # the other host's update arrived after its last pull
    replicas[1].pull()
    assert replicas[1].push() == 0


def test_staleness_is_what_others_did_since_the_answer_with_which_the_steps_began() -> None:
    _, center, (first, second) = make_hosts(Vector(), 2)
    assert first.exchange() is None  # nothing was pushed
    first.push(ones())
    contribution = first.contribute()
    for _ in range(3):
        second.push(ones())
    assert second.exchange() == 0
    assert center.merge(first.number, contribution) == 3
    first.push(ones())  # before it has the other's three
    assert first.exchange() == 3
    second.push(ones())  # before it has the other's two
    assert second.exchange() == 2
    second.push(ones())
    assert second.exchange() == 0
    first.push(ones())
    assert first.exchange() == 2


def test_the_last_host_that_changed_module_buffers_wins() -> None:
    policy: Any = Vector(n_statistics=2)
    store, _, (first, second) = make_hosts(policy, 2)

    def statistics(store: SharedMemoryStore) -> list[list[float]]:
        return [buffer.tolist() for buffer in fetched(store, policy).buffers()]

    first.policy.statistics_0.fill_(1)
    first.push(ones())
    first.exchange()
    second.push(ones())  # of the buffers it knows the old values only, and has not changed them
    second.exchange()
    assert statistics(store) == statistics(second.store) == [[1, 1], [0, 0]]
    second.replica.pull()
    second.policy.statistics_0.fill_(2)
    second.policy.statistics_1.fill_(3)
    second.push(ones())
    second.exchange()
    assert statistics(store) == [[2, 2], [3, 3]]
    first.exchange()
    assert statistics(first.store) == [[2, 2], [3, 3]]


def test_a_step_that_is_being_undone_is_not_sent() -> None:
    store, _, (first, second) = make_hosts(Vector(), 2)
    first.push(ones())
    first.exchange()
    first.push(ones())
    broken = fetched(first.store, Vector())
    broken.weight.data[1] = th.nan
    first.store.load_policy(broken)
    second.push(ones(8))
    second.exchange()
    first.exchange()
    assert fetched(store, Vector()).weight.tolist() == [-10, -9, -10, -10]
    mended = fetched(first.store, Vector())
    mended.weight.data.fill_(-10)
    first.store.load_policy(mended)
    first.push(ones())
    first.exchange()
    second.exchange()
    assert weight(store) == weight(second.store) == -11


# --- load and save ---------------------------------------------------------------------------------------------------


def adam_policy() -> ActorCriticPolicy:
    return make_policy(MlpPolicy, net_arch=[4])


def moments(policy: ActorCriticPolicy) -> list[dict[str, th.Tensor]]:
    return [policy.optimizer.state[parameter] for parameter in policy.parameters()]


def test_a_loaded_policy_replaces_what_all_hosts_have() -> None:
    policy, other, generator = adam_policy(), adam_policy(), th.Generator().manual_seed(0)
    for _ in range(3):
        set_gradients(other, random_gradients(other, generator))
        other.optimizer.step()
    store, center, hosts = make_hosts(policy, 2)
    for host in hosts:
        host.push(random_gradients(policy, generator))
        host.exchange(with_state=True)
        host.push(random_gradients(policy, generator))
    under_way = [host.contribute(with_state=True) for host in hosts]
    center.load(other)
    center.merge_states()
    for host, contribution in zip(hosts, under_way, strict=True):
        assert center.merge(host.number, contribution) is None
        host.push(random_gradients(policy, generator))  # to the old parameters: lost too
        host.exchange(with_state=True)
    center.merge_states()
    assert store.n_updates == 6  # but all were made
    for each in (store, *(host.store for host in hosts)):
        result = fetched(each, policy)
        assert_equal(result, other, 0.0)
        for actual, expected in zip(moments(result), moments(other), strict=True):
            assert all(th.equal(actual[key], expected[key]) for key in expected)


def test_saved_moments_are_the_mean_weighted_by_updates_and_steps_add_up() -> None:
    policy, generator = adam_policy(), th.Generator().manual_seed(0)
    for _ in range(10):
        set_gradients(policy, random_gradients(policy, generator))
        policy.optimizer.step()
    store, center, hosts = make_hosts(policy, 5)

    def push(host: Host, n: int) -> None:
        for _ in range(n):
            host.push(random_gradients(policy, generator))

    def save_and_check(n_steps: int, weights: Sequence[int]) -> None:
        for host in hosts:
            host.exchange(with_state=True)
        center.merge_states()
        center.merge_states()  # changes nothing
        saved = moments(fetched(store, policy))
        theirs = [moments(fetched(host.store, policy)) for host in hosts]
        for actual, *sent in zip(saved, *theirs, strict=True):
            assert float(actual["step"]) == n_steps
            for key in ("exp_avg", "exp_avg_sq"):
                mean = sum(w * state[key].double() for w, state in zip(weights, sent, strict=True)) / sum(weights)
                assert th.allclose(actual[key].double(), mean, rtol=1e-5, atol=1e-8), key

    dead = hosts.pop()
    push(dead, 9)
    dead.exchange(with_state=True)
    center.leave(dead.number)
    for host, n in zip(hosts, (1, 2, 5, 0), strict=True):
        push(host, n)
    save_and_check(10 + 8, (1, 2, 5, 0))
    push(hosts[0], 4)
    save_and_check(10 + 12, (5, 2, 5, 0))
    assert [float(moments(fetched(host.store, policy))[0]["step"]) for host in hosts] == [15, 12, 15, 10]
    hosts.append(Host(center, policy, 4, 5))  # continues from what was merged last; its predecessor's updates don't count
    for a, b in zip(moments(fetched(hosts[-1].store, policy)), moments(fetched(store, policy)), strict=True):
        assert all(th.equal(a[key], b[key]) for key in b)
    push(hosts[-1], 1)
    save_and_check(10 + 13, (5, 2, 5, 0, 1))


def test_there_is_nothing_to_merge() -> None:
    policy = adam_policy()
    store, center, hosts = make_hosts(policy, 2)
    before = store.state()
    center.merge_states()
    for host in hosts:
        host.exchange(with_state=True)
    center.merge_states()  # none has made an update
    assert np.array_equal(store.state(), before)
