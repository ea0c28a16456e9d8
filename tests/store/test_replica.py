"""A worker's replica where an optimizer step, the shared parameters or a buffer are not finite."""

import math
import threading
import time
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c import DivergenceError, MlpLstmPolicy
from sb3_a3c.store import replica as replica_module
from sb3_a3c.store.finite import all_finite
from sb3_a3c.store.shared_memory import SharedMemoryStore


def make_policy(**kwargs: Any) -> ActorCriticPolicy:
    return MlpLstmPolicy(
        spaces.Box(-1, 1, (2,)), spaces.Discrete(2), lambda _: 1e-2, lstm_hidden_size=4, net_arch=[], **kwargs
    )


def set_gradients(policy: ActorCriticPolicy, value: float) -> None:
    for parameter in policy.parameters():
        parameter.grad = th.full_like(parameter, value)


def test_an_epsilon_of_zero_leaves_parameters_without_gradient_unchanged() -> None:
    policy = make_policy(optimizer_kwargs=dict(eps=0.0))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    before = [p.detach().clone() for p in policy.parameters()]
    set_gradients(policy, 1.0)
    next(iter(policy.parameters())).grad = th.zeros_like(next(iter(policy.parameters())))
    assert replica.push() is None
    assert store.n_updates == 0
    replica.pull()
    moved = [not th.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True)]
    assert moved == [False, *[True] * (len(before) - 1)]
    set_gradients(policy, 1.0)
    assert replica.push() == 0


def test_moments_computed_from_a_bad_parameter_are_reset() -> None:
    policy = make_policy(optimizer_kwargs=dict(weight_decay=0.1))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    name, parameter = next(iter(policy.named_parameters()))
    replica._shared_of[parameter].data[0, 0] = math.nan  # as another worker's step may do
    set_gradients(policy, 1.0)
    assert replica.push() is None
    replica.pull()
    set_gradients(policy, 1.0)
    assert replica.push() == 0
    assert all(all_finite([value]) for state in replica.optimizer.state.values() for value in state.values()), name


def test_buffers_that_overflow_are_not_shared_but_constants_may_be_infinite() -> None:
    policy = make_policy()
    policy.register_buffer("mask", th.tensor([0.0, -math.inf]))
    policy.register_buffer("running_mean", th.zeros(2))
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    set_gradients(policy, 1.0)
    assert replica.push() == 0
    buffer: Any = policy.running_mean
    buffer.fill_(math.inf)
    set_gradients(policy, 1.0)
    assert replica.push() is None
    replica.discard()
    assert buffer.tolist() == [0.0, 0.0]
    assert all(parameter.grad is None for parameter in policy.parameters())
    set_gradients(policy, 1.0)
    assert replica.push() == 0


def test_pull_waits_while_a_step_is_being_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, private = make_policy(), make_policy()
    store = SharedMemoryStore(policy, 1, share_memory=False)
    replica = store.replica(policy, 0)
    shared_parameter = next(iter(replica._shared_of.values())).data
    good, theirs = shared_parameter.clone(), next(iter(private.parameters())).detach().clone()
    shared_parameter[1:].fill_(math.nan)
    store.fetch_policy(private)  # does not wait: keeps its own values where the shared ones are not finite
    fetched = next(iter(private.parameters()))
    assert th.equal(fetched[:1], good[:1]) and th.equal(fetched[1:], theirs[1:])

    def undo() -> None:
        time.sleep(0.05)
        shared_parameter.copy_(good)

    thread = threading.Thread(target=undo)
    thread.start()
    replica.pull()
    thread.join()
    assert th.equal(next(iter(policy.parameters())), good)
    monkeypatch.setattr(replica_module, "MAX_COPIES", 3)
    shared_parameter.fill_(math.inf)
    with pytest.raises(DivergenceError, match="shared parameters are NaN or infinite"):
        replica.pull()
