"""
What every store must do: these tests run against each implementation, by a factory of :data:`STORES`.

A push moves the shared parameters by exactly what torch's optimizer makes of the worker's gradient, and moves nothing else.
"""

import io
import math
import pickle
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_a3c.policies.pickling import dump_policy
from sb3_a3c.store import layout
from sb3_a3c.store.base import MergeableStore, ParameterStore
from sb3_a3c.store.shared_memory import NO_GOAL, SharedMemoryStore
from tests.cluster.one_host_store import OneHostStore
from tests.store.small_policy import assert_equal, cnn, copied, make_policy, random_gradients, set_gradients


class MakeStore(Protocol):
    def __call__(
        self, policy: ActorCriticPolicy, n_workers: int, total_steps: int = NO_GOAL, steps_before: int = 0
    ) -> ParameterStore: ...


class MakeMergeable(Protocol):
    def __call__(self, policy: ActorCriticPolicy, n_workers: int) -> MergeableStore: ...


#: Add a factory here to put another implementation under test, and another below if it may be the store of a host.
STORES: dict[str, MakeStore] = {"shared memory": SharedMemoryStore, "one host": OneHostStore}
MERGEABLE: dict[str, MakeMergeable] = {"shared memory": SharedMemoryStore}


@pytest.fixture(params=STORES)
def make_store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    yield from _closing(STORES[request.param])


@pytest.fixture(params=MERGEABLE)
def make_mergeable(request: pytest.FixtureRequest) -> Iterator[MakeMergeable]:
    yield from _closing(MERGEABLE[request.param])


def _closing(factory: Any) -> Iterator[Any]:
    """The factory; at the end what it has made is closed."""
    made: list[ParameterStore] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(factory(*args, **kwargs))
        return made[-1]

    yield make
    for store in made:
        store.close()


OPTIMIZERS: list[Any] = [
    pytest.param(th.optim.Adam, {}, 0.0, id="Adam"),
    pytest.param(th.optim.Adam, {"fused": True}, 1e-7, id="Adam-fused"),
    pytest.param(th.optim.Adam, {"amsgrad": True, "fused": True}, 1e-7, id="Adam-amsgrad-fused"),
    pytest.param(th.optim.Adam, {"amsgrad": True, "foreach": True}, 0.0, id="Adam-amsgrad-foreach"),
    pytest.param(th.optim.AdamW, {"weight_decay": 0.1}, 0.0, id="AdamW"),
    pytest.param(th.optim.RMSprop, {}, 0.0, id="RMSprop"),
    pytest.param(th.optim.RMSprop, {"centered": True, "momentum": 0.9}, 0.0, id="RMSprop-centered"),
    pytest.param(RMSpropTFLike, {"momentum": 0.5}, 0.0, id="RMSpropTFLike"),
    pytest.param(th.optim.SGD, {}, 0.0, id="SGD"),
    pytest.param(th.optim.SGD, {"momentum": 0.9}, 0.0, id="SGD-momentum"),
    pytest.param(th.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, 0.0, id="SGD-momentum-decay"),
    pytest.param(th.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}, 1e-7, id="SGD-nesterov-fused"),
    pytest.param(th.optim.Adagrad, {}, 0.0, id="Adagrad"),
    pytest.param(th.optim.NAdam, {}, 0.0, id="NAdam"),
]


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "tolerance", "channels_last"),
    [
        *(pytest.param(*optimizer.values, True, id=optimizer.id) for optimizer in OPTIMIZERS),
        pytest.param(th.optim.Adam, {"fused": True}, 1e-7, False, id="Adam-fused-contiguous"),
    ],
)
def test_pushes_of_two_workers_are_the_steps_of_one_private_optimizer(
    make_store: MakeStore,
    optimizer_class: type[th.optim.Optimizer],
    kwargs: dict[str, Any],
    tolerance: float,
    channels_last: bool,
) -> None:
    policy = make_policy(optimizer_class, kwargs, channels_last=channels_last)
    private = copied(policy)
    generator = th.Generator().manual_seed(0)
    for _ in range(2):  # the second time from moments that were saved and loaded
        store = make_store(policy, n_workers=2)
        replicas = [(worker_policy := copied(policy), store.replica(worker_policy, i)) for i in range(2)]
        for n_push in range(20):
            worker_policy, replica = replicas[n_push % 2]
            replica.pull()
            gradients = random_gradients(policy, generator)
            set_gradients(worker_policy, gradients)
            replica.push()
            for parameter, gradient in zip(private.parameters(), gradients, strict=True):
                parameter.grad = gradient
            private.optimizer.step()
        store.fetch_policy(policy)
        store.fetch_optimizer(policy)
        assert_equal(policy, private, tolerance)
        buffer = io.BytesIO()
        th.save((policy.state_dict(), policy.optimizer.state_dict()), buffer)
        buffer.seek(0)
        parameters, moments = th.load(buffer, weights_only=True)
        policy = make_policy(optimizer_class, kwargs, channels_last=channels_last)
        policy.load_state_dict(parameters)
        policy.optimizer.load_state_dict(moments)


@pytest.mark.parametrize(("optimizer_class", "kwargs", "tolerance"), OPTIMIZERS)
def test_making_a_store_moves_nothing(
    make_store: MakeStore, optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float
) -> None:
    policy = make_policy(optimizer_class, kwargs)
    before = copied(policy)
    store = make_store(policy, n_workers=1)
    store.replica(copied(policy), 0)
    store.fetch_policy(policy)
    assert_equal(policy, before, 0.0)
    assert store.n_updates == 0
    store.fetch_optimizer(policy)
    for state in policy.optimizer.state.values():
        assert float(state.get("step", 0)) == 0
        for value in state.values():
            if isinstance(value, th.Tensor):
                assert not value.is_shared()  # type: ignore[no-untyped-call]
    assert not any(p.is_shared() for p in policy.parameters())  # type: ignore[no-untyped-call]


def test_moments_with_other_strides_are_laid_out_anew(make_store: MakeStore) -> None:
    """A state that was saved from a contiguous policy and loaded into one in channels_last keeps its strides."""
    contiguous = make_policy(channels_last=False)
    for parameter in contiguous.parameters():
        parameter.grad = th.randn_like(parameter)
    contiguous.optimizer.step()
    policy = make_policy(optimizer_kwargs={"fused": True}, channels_last=True)
    policy.load_state_dict(contiguous.state_dict())
    policy.optimizer.load_state_dict(contiguous.optimizer.state_dict())
    policy.optimizer.param_groups[0]["fused"] = True
    weight = cnn(policy)[2].weight
    assert policy.optimizer.state[weight]["exp_avg"].stride() != weight.stride()

    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    gradients = random_gradients(policy, th.Generator().manual_seed(1))
    set_gradients(worker_policy, gradients)
    replica.push()
    for parameter, gradient in zip(contiguous.parameters(), gradients, strict=True):
        parameter.grad = gradient.contiguous()
    contiguous.optimizer.step()
    store.fetch_policy(policy)
    assert_equal(policy, contiguous, 1e-7)


def test_a_pull_sees_what_others_pushed_and_counts_it(make_store: MakeStore) -> None:
    policy = make_policy(th.optim.SGD)
    store = make_store(policy, n_workers=2)
    policies = [copied(policy) for _ in range(2)]
    first, second = (store.replica(p, i) for i, p in enumerate(policies))
    ones = [th.ones_like(p) for p in policy.parameters()]
    set_gradients(policies[0], ones)
    assert first.push() == 0
    set_gradients(policies[0], ones)
    assert first.push() == 0  # its own pushes do not make a gradient stale
    assert second.push() == 2
    for mine, old in zip(policies[1].parameters(), policy.parameters(), strict=True):
        assert th.equal(mine, old)  # not pulled yet
    second.pull()
    for mine, old in zip(policies[1].parameters(), policy.parameters(), strict=True):
        assert float((old - mine - 0.02).detach().abs().max()) < 1e-6
    assert second.push() == 0
    assert store.n_updates == 4


def test_frozen_parameters_stay_and_get_no_state(make_store: MakeStore) -> None:
    policy = make_policy(th.optim.AdamW, {"weight_decay": 0.5})
    frozen = cnn(policy)[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    for parameter in worker_policy.parameters():
        parameter.grad = th.ones_like(parameter) if parameter.requires_grad else None
    replica.push()
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    assert th.equal(frozen, before)
    assert frozen not in policy.optimizer.state
    assert not th.equal(policy.value_net.bias, th.zeros(1))


# torch's fused SGD can't take a step where some parameters have no momentum yet
@pytest.mark.parametrize(("optimizer_class", "kwargs", "tolerance"), [o for o in OPTIMIZERS if o.id != "SGD-nesterov-fused"])
def test_a_layer_that_is_frozen_and_another_that_is_let_learn_meanwhile(
    make_store: MakeStore, optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float
) -> None:
    policy = make_policy(optimizer_class, kwargs)
    never, layers = policy.value_net.bias, (cnn(policy)[0], policy.lstm)
    never.requires_grad_(False)
    layers[0].requires_grad_(False)
    private, generator = copied(policy), th.Generator().manual_seed(0)
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    for n_push in range(9):
        if n_push % 3 == 0:  # first one layer is frozen, then the other, then the first again
            layers[n_push // 3 % 2].requires_grad_(False)
            layers[(n_push // 3 + 1) % 2].requires_grad_(True)
            replica.set_trainable([parameter.requires_grad for parameter in policy.parameters()])
        replica.pull()
        gradients = random_gradients(policy, generator)
        for (name, mine), theirs, g in zip(worker_policy.named_parameters(), private.parameters(), gradients, strict=True):
            assert mine.requires_grad == policy.get_parameter(name).requires_grad
            mine.grad, theirs.grad = (g.clone(), g.clone()) if mine.requires_grad else (None, None)
        replica.push()
        private.optimizer.step()
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    assert_equal(policy, private, tolerance)
    for mine, theirs in zip(policy.parameters(), private.parameters(), strict=True):
        state = private.optimizer.state.get(theirs, {})
        assert policy.optimizer.state.get(mine, {}).keys() == state.keys() or not any(map(th.is_tensor, state.values()))
        for key, value in state.items():
            if isinstance(value, th.Tensor):
                assert th.allclose(policy.optimizer.state[mine][key], value, atol=10 * tolerance), key
    assert (never in policy.optimizer.state) == (private.value_net.bias in private.optimizer.state)


def test_a_normalised_layer_is_pushed_as_a_private_one(make_store: MakeStore) -> None:
    policy = make_policy()
    th.nn.utils.parametrizations.spectral_norm(cnn(policy)[2])
    th.nn.utils.parametrizations.weight_norm(policy.value_net)
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=1e-2)
    private = pickle.loads(dump_policy(policy))
    store = make_store(policy, n_workers=2)
    policies = [pickle.loads(dump_policy(policy)) for _ in range(2)]
    replicas = [store.replica(worker_policy, i) for i, worker_policy in enumerate(policies)]
    state, starts = policy.initial_state(2), th.zeros(1, 2, dtype=th.bool)
    for n_push in range(6):
        replicas[n_push % 2].pull()
        for learning in (policies[n_push % 2], private):
            learning.optimizer.zero_grad()
            learning.set_training_mode(True)
            obs = th.full((2, 1, 36, 36), 20.0 * n_push)
            values, log_prob, _ = learning.evaluate_actions(obs, th.zeros(2), state, starts)
            (values.sum() + log_prob.sum()).backward()
        replicas[n_push % 2].push()
        private.optimizer.step()
    store.fetch_policy(policy)
    assert_equal(policy, private, 0.0)
    for (name, mine), theirs in zip(policy.named_buffers(), private.buffers(), strict=True):
        assert th.equal(mine, theirs), name


def test_parameter_groups_keep_their_options(make_store: MakeStore) -> None:
    policy = make_policy()
    heads = [*policy.value_net.parameters(), *policy.action_net.parameters()]
    trunk = [p for p in policy.parameters() if not any(p is head for head in heads)]
    policy.optimizer = th.optim.SGD([{"params": trunk, "lr": 0.0}, {"params": heads, "lr": 1.0}])
    before = copied(policy)
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, [th.ones_like(p) for p in worker_policy.parameters()])
    replica.push()
    store.fetch_policy(policy)
    for (name, new), old in zip(policy.named_parameters(), before.parameters(), strict=True):
        moved = 1.0 if name.startswith(("value_net", "action_net")) else 0.0
        assert th.allclose(old - new, th.full_like(new, moved)), name


def test_module_buffers_are_shared_too(make_store: MakeStore) -> None:
    policy = make_policy()
    cnn(policy).append(th.nn.BatchNorm1d(int(policy.features_dim), affine=False))
    store = make_store(policy, n_workers=2)
    policies = [copied(policy) for _ in range(2)]
    replicas = [store.replica(p, i) for i, p in enumerate(policies)]
    cnn(policies[0])[-1].running_mean.fill_(3.0)
    cnn(policies[0])[-1].num_batches_tracked.fill_(7)
    replicas[0].push()
    replicas[1].pull()
    store.fetch_policy(policy)
    for seen in (policies[1], policy):
        assert float(cnn(seen)[-1].running_mean.mean()) == 3.0
        assert int(cnn(seen)[-1].num_batches_tracked) == 7


def test_a_parameter_without_gradient_is_left_alone(make_store: MakeStore) -> None:
    policy = make_policy(th.optim.AdamW, {"weight_decay": 0.5})
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    before = copied(policy)
    set_gradients(worker_policy, [th.ones_like(p) for p in policy.parameters()])
    cnn(worker_policy)[0].weight.grad = None
    replica.push()
    assert all(p.grad is None for p in worker_policy.parameters())  # the next one starts from nothing
    store.fetch_policy(policy)
    assert th.equal(cnn(policy)[0].weight, cnn(before)[0].weight)
    assert not th.equal(cnn(policy)[2].weight, cnn(before)[2].weight)


def test_a_rollout_is_reserved_until_the_goal_is_reached(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=2, total_steps=100, steps_before=20)
    first, second = (store.replica(copied(policy), worker) for worker in range(2))
    assert first.reserve(30) and second.reserve(40)
    assert first.reserve(30)  # the goal is exceeded by this rollout
    assert not first.reserve(1) and not second.reserve(1)


def test_what_a_dead_worker_had_reserved_is_released(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=2, total_steps=100)
    first, second = (store.replica(copied(policy), worker) for worker in range(2))
    assert first.reserve(40) and first.reserve(40) and second.reserve(20)
    assert not second.reserve(20)
    store.release(0, 40)  # of two rollouts it has reported one
    assert second.reserve(20) and second.reserve(20)
    assert not second.reserve(20)


def test_workers_take_turns_in_their_order(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=3)
    replicas = [store.replica(copied(policy), worker) for worker in range(3)]
    seen = []
    for _ in range(7):
        (worker,) = [worker for worker, replica in enumerate(replicas) if replica.is_my_turn()]
        replicas[worker].end_turn()
        seen.append(worker)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    replicas[1].leave_turns()
    assert [replicas[0].is_my_turn(), replicas[2].is_my_turn()] == [False, True]
    replicas[2].end_turn()
    assert [replicas[0].is_my_turn(), replicas[2].is_my_turn()] == [True, False]


def test_the_successor_of_a_worker_that_had_left_takes_turns_again(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=2)
    first, second = (store.replica(copied(policy), worker) for worker in range(2))
    for replica in (first, second, first):
        replica.end_turn()
    second.leave_turns()
    store.release(1, 0)  # it has died after that
    assert [first.is_my_turn(), second.is_my_turn()] == [True, False]
    first.end_turn()
    assert [first.is_my_turn(), second.is_my_turn()] == [False, True]
    first.leave_turns()
    second.leave_turns()
    store.release(1, 0)
    assert second.is_my_turn()


def test_parameters_moments_and_buffers_are_replaced_while_workers_run(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, random_gradients(policy, th.Generator().manual_seed(0)))
    replica.push()
    other = make_policy()
    set_gradients(other, random_gradients(other, th.Generator().manual_seed(1)))
    other.optimizer.step()
    store.load_policy(other)
    replica.pull()
    assert_equal(worker_policy, other, 0.0)
    gradients = random_gradients(policy, th.Generator().manual_seed(2))
    set_gradients(worker_policy, gradients)
    replica.push()
    set_gradients(other, gradients)
    other.optimizer.step()
    store.fetch_policy(policy)
    assert_equal(policy, other, 0.0)


def test_a_learning_rate_is_the_workers_own(make_store: MakeStore) -> None:
    policy = make_policy(th.optim.SGD)
    store = make_store(policy, n_workers=2)
    policies = [copied(policy) for _ in range(2)]
    replicas = [store.replica(worker_policy, worker) for worker, worker_policy in enumerate(policies)]
    for group in replicas[0].optimizer.param_groups:
        group["lr"] = 0.5
    before = copied(policy)
    for replica, worker_policy, moved in zip(replicas, policies, (0.5, 0.51), strict=True):
        set_gradients(worker_policy, [th.ones_like(p) for p in worker_policy.parameters()])
        replica.push()
        store.fetch_policy(policy)
        for new, old in zip(policy.parameters(), before.parameters(), strict=True):
            assert th.allclose(old - new, th.full_like(new, moved), atol=1e-6)


def test_a_discarded_gradient_is_not_pushed(make_store: MakeStore) -> None:
    policy = make_policy(th.optim.SGD)
    cnn(policy).append(th.nn.BatchNorm1d(int(policy.features_dim), affine=False))
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, [th.ones_like(p) for p in policy.parameters()])
    cnn(worker_policy)[-1].running_mean.fill_(3.0)
    replica.discard()
    assert all(p.grad is None for p in worker_policy.parameters())
    assert float(cnn(worker_policy)[-1].running_mean.abs().max()) == 0.0
    replica.push()
    before = copied(policy)
    store.fetch_policy(policy)
    assert_equal(policy, before, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_makes_parameters_non_finite_is_undone_and_not_counted(bad: float, make_store: MakeStore) -> None:
    policy = make_policy(th.optim.SGD)
    store = make_store(policy, n_workers=1)
    if isinstance(store, OneHostStore):
        pytest.skip("The other parameters' part of the step is exchanged with the next one that is counted.")
    replica = store.replica(worker_policy := copied(policy), 0)
    before = copied(policy)
    set_gradients(worker_policy, [th.ones_like(p) for p in policy.parameters()])
    worker_policy.value_net.bias.grad = th.full_like(worker_policy.value_net.bias, bad)
    assert replica.push() is None
    assert store.n_updates == 0
    replica.pull()
    store.fetch_policy(policy)
    assert_equal(worker_policy, policy, 0.0)
    assert th.equal(policy.value_net.bias, before.value_net.bias)
    set_gradients(worker_policy, [th.ones_like(p) for p in policy.parameters()])
    assert replica.push() == 0


def test_what_was_fetched_stays_when_the_store_is_closed(make_store: MakeStore) -> None:
    policy = make_policy()
    store = make_store(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, random_gradients(policy, th.Generator().manual_seed(0)))
    replica.push()
    replica.pull()
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    store.close()
    assert_equal(policy, worker_policy, 0.0)
    assert all(float(state["step"]) == 1 for state in policy.optimizer.state.values())


def policy_with_all_kinds_of_tensors() -> ActorCriticPolicy:
    """Of two precisions, of integers, frozen and infinite, and module buffers."""
    policy = make_policy(channels_last=True)
    policy.value_net.double()
    policy.action_net.bfloat16()
    policy.register_parameter("mask", th.nn.Parameter(th.tensor([0.0, -math.inf]), requires_grad=False))
    policy.register_parameter("table", th.nn.Parameter(th.tensor([3, 2**60 + 1]), requires_grad=False))
    cnn(policy).append(th.nn.BatchNorm1d(int(policy.features_dim), affine=False))
    policy.optimizer = th.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    return policy


def moved(policy: ActorCriticPolicy, distance: float) -> ActorCriticPolicy:
    policy = copied(policy)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += distance
    return policy


def fetched(store: ParameterStore, policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy = copied(policy)
    for tensor in (*policy.parameters(), *policy.buffers()):
        tensor.data.zero_()
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    return policy


def assert_identical(actual: ActorCriticPolicy, expected: ActorCriticPolicy) -> None:
    """Parameters, module buffers and optimizer state are the same to the bit, and in the same order in memory."""
    for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert th.equal(a, b) and a.stride() == b.stride(), name
    assert_states_identical(actual, expected)


def assert_states_identical(actual: ActorCriticPolicy, expected: ActorCriticPolicy) -> None:
    for mine, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        a, b = (policy.optimizer.state.get(p, {}) for policy, p in ((actual, mine), (expected, theirs)))
        assert a.keys() == b.keys()
        assert all(th.equal(a[key], b[key]) for key in a if isinstance(a[key], th.Tensor))


def test_values_travel_to_another_store(make_mergeable: MakeMergeable) -> None:
    policy = policy_with_all_kinds_of_tensors()
    source, target = make_mergeable(policy, 1), make_mergeable(moved(policy, 1.0), 1)
    cnn(policy)[-1].running_mean.fill_(3.0)
    source.load_policy(policy)
    values = source.values()
    source.load_policy(moved(policy, 2.0))  # values are a copy
    target.set_values(values)
    assert_identical(fetched(target, policy), policy)


@pytest.mark.parametrize("piece_size", [layout._PIECE, 3])
def test_the_difference_of_values_is_added(
    piece_size: int, make_mergeable: MakeMergeable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_PIECE", piece_size)
    policy = policy_with_all_kinds_of_tensors()
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(th.randint(-64, 64, parameter.shape) / 8)  # so that sums are exact
    sender, store = make_mergeable(policy, 1), make_mergeable(moved(policy, 2.0), 1)
    known = sender.values()
    receivers_known = known.copy()
    sender.load_policy(changed := moved(policy, 0.5))
    store.add(sender.difference(known), receivers_known)
    assert_identical(fetched(store, policy), moved(policy, 2.5))
    assert np.array_equal(known, sender.values()) and np.array_equal(receivers_known, known)
    # what can't be added is replaced where it has changed
    for each in (policy, changed):
        each.get_parameter("table").data[0] = 4
        each.get_parameter("mask").data[0] = 0.5
        cnn(each)[-1].running_mean.fill_(3.0)
    sender.load_policy(changed)
    store.add(sender.difference(known), receivers_known)
    expected = moved(policy, 2.5)
    assert_identical(fetched(store, policy), expected)
    assert np.array_equal(known, sender.values()) and np.array_equal(receivers_known, known)
    cnn(expected)[-1].num_batches_tracked.fill_(7)
    store.load_policy(expected)
    store.add(sender.difference(known), receivers_known)  # nothing has changed there
    assert_identical(fetched(store, policy), expected)


def test_a_difference_is_rounded_and_the_next_one_has_what_is_left_over(make_mergeable: MakeMergeable) -> None:
    policy = make_policy()
    policy.value_net.bias.data[:] = 0.0
    sender, store = make_mergeable(policy, 1), make_mergeable(policy, 1)
    known = sender.values()
    receivers_known = known.copy()
    for change in (1e-30, 1 + 2**-9 + 2**-17, -3.0):
        policy.value_net.bias.data[:] += change
        sender.load_policy(policy)
        for n_bits in (8, 16, 24):  # bfloat16 has 8 bits of which the first is always 1
            difference = sender.difference(known)
            assert len(difference) < 0.6 * len(known)
            store.add(difference, receivers_known)
            assert np.array_equal(receivers_known, known)
            missing = fetched(store, policy).value_net.bias - policy.value_net.bias
            assert abs(missing.item()) <= 2.0**-n_bits * abs(change)
        assert np.array_equal(known, sender.values())
        assert_equal(fetched(store, policy), policy, 0.0)


def test_values_of_a_step_that_is_being_undone_are_those_of_before(make_mergeable: MakeMergeable) -> None:
    policy = policy_with_all_kinds_of_tensors()
    store, other = make_mergeable(policy, 1), make_mergeable(policy, 1)
    known = store.values()
    broken, expected = moved(policy, 1.0), moved(policy, 1.0)
    with th.no_grad():
        for each, value in ((broken, math.nan), (expected, policy.value_net.bias)):
            each.value_net.bias.copy_(th.as_tensor(value))
        for each, value in ((broken, math.inf), (expected, cnn(policy)[0].weight[1, 0, 1, 1])):
            cnn(each)[0].weight[1, 0, 1, 1] = value
    store.load_policy(broken)
    values = store.values(known)
    other.add(store.difference(known), known.copy())
    store.set_values(values)
    assert_identical(fetched(store, policy), expected)
    assert_identical(fetched(other, policy), expected)


@pytest.mark.parametrize(("optimizer_class", "kwargs", "tolerance"), OPTIMIZERS)
def test_an_optimizers_state_travels_and_that_of_one_host_is_exact(
    make_mergeable: MakeMergeable, optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float
) -> None:
    policy, generator = make_policy(optimizer_class, kwargs), th.Generator().manual_seed(0)
    center, host = make_mergeable(policy, 1), make_mergeable(policy, 1)
    began = host.state()
    replica = host.replica(worker_policy := copied(policy), 0)
    for _ in range(3):
        set_gradients(worker_policy, random_gradients(policy, generator))
        replica.push()
    idle = make_mergeable(policy, 1)
    center.merge_states([(0, began, idle.state()), (3, began, host.state())])
    center.merge_states([(0, began, idle.state())])
    assert_states_identical(expected := fetched(center, policy), fetched(host, policy))
    assert bool(expected.optimizer.state) == (optimizer_class is not th.optim.SGD or bool(kwargs))
    idle.set_state(host.state())
    assert_states_identical(fetched(idle, policy), fetched(host, policy))


@pytest.mark.parametrize(("optimizer_class", "kwargs", "tolerance"), OPTIMIZERS)
def test_a_merged_state_can_be_learned_with(
    make_mergeable: MakeMergeable, optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float
) -> None:
    """Weights that differ by much, so that a mean that is rounded carelessly makes a squared moment negative."""
    policy, generator = make_policy(optimizer_class, kwargs), th.Generator().manual_seed(0)
    center = make_mergeable(policy, 1)
    states = []
    for size, weight in ((1.0, 1), (1e-6, 10**7), (0.0, 10**7)):
        host = make_mergeable(policy, 1)
        began = host.state()
        replica = host.replica(worker_policy := copied(policy), 0)
        set_gradients(worker_policy, [size * gradient for gradient in random_gradients(policy, generator)])
        replica.push()
        states.append((weight, began, host.state()))
    center.merge_states(states)
    for state in fetched(center, policy).optimizer.state.values():
        assert float(state.get("step", 0)) in (0, 3)  # RMSpropTFLike and SGD count elsewhere or not at all
        assert all(float(state[key].min()) >= 0 for key in ("exp_avg_sq", "square_avg") if key in state)
    replica = center.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, random_gradients(policy, generator))
    assert replica.push() == 0


def test_counters_of_other_hosts_are_replaced(make_mergeable: MakeMergeable) -> None:
    policy = make_policy()
    here, there = make_mergeable(policy, 3), make_mergeable(policy, 3)
    replicas = [here.replica(copied(policy), 0), *(there.replica(copied(policy), worker) for worker in (1, 2))]
    for replica, n_pushes in zip(replicas, (1, 2, 4), strict=True):
        for _ in range(n_pushes):
            replica.push()
    rows = there.rows([2, 1])
    here.set_rows([2, 1], rows)
    rows[:] = 0  # a copy
    assert [here.updates([worker]) for worker in range(3)] == [1, 2, 4]
    assert (here.updates([0, 2]), here.n_updates) == (5, 7)
    assert (there.rows([1, 2]) == here.rows([1, 2])).all()
    assert there.n_updates == 6
    assert replicas[0].push() == 6  # their updates make its gradient stale
