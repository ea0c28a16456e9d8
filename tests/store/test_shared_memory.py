"""The store: what a push does is exactly what torch's optimizer does, and nothing else moves."""

import copy
import io
import pickle
import time
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_a3c import A3C
from sb3_a3c.policies.lstm_policies import CnnLstmPolicy
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.layout import Counter
from sb3_a3c.store.optimizer_state import check_optimizer
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.workers.collector import PRELOAD

SPACE = spaces.Box(0, 255, (1, 36, 36), np.uint8)

OPTIMIZERS: list[Any] = [
    pytest.param(th.optim.Adam, {}, 0.0, id="Adam"),
    pytest.param(th.optim.Adam, {"fused": True}, 1e-7, id="Adam-fused"),
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


def make_policy(
    optimizer_class: type[th.optim.Optimizer] = th.optim.Adam, optimizer_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> CnnLstmPolicy:
    return CnnLstmPolicy(
        SPACE,
        spaces.Discrete(4),
        lambda _: 1e-2,
        lstm_hidden_size=8,
        optimizer_class=optimizer_class,
        optimizer_kwargs=optimizer_kwargs or {},
        **kwargs,
    )


def cnn(policy: ActorCriticPolicy) -> Any:
    return policy.features_extractor.cnn


def copied(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    policy_copy: ActorCriticPolicy = pickle.loads(cloudpickle.dumps(policy))  # as it travels to a worker
    return policy_copy


def random_gradients(policy: ActorCriticPolicy, generator: th.Generator) -> list[th.Tensor]:
    return [th.empty_like(p).copy_(th.randn(p.shape, generator=generator)) for p in policy.parameters()]


def set_gradients(policy: ActorCriticPolicy, gradients: list[th.Tensor]) -> None:
    for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()


def assert_equal(actual: ActorCriticPolicy, expected: ActorCriticPolicy, tolerance: float) -> None:
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance, name


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("optimizer_class", "kwargs", "tolerance"), OPTIMIZERS)
def test_pushes_of_two_workers_are_the_steps_of_one_private_optimizer(
    optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float, channels_last: bool
) -> None:
    policy = make_policy(optimizer_class, kwargs, channels_last=channels_last)
    private = copied(policy)
    generator = th.Generator().manual_seed(0)
    for _ in range(2):  # the second time from moments that were saved and loaded
        store = SharedMemoryStore(policy, n_workers=2)
        replicas = [(worker_policy := copied(policy), store.replica(worker_policy, i)) for i in range(2)]
        for n_push in range(50):
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
    optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], tolerance: float
) -> None:
    policy = make_policy(optimizer_class, kwargs)
    before = copied(policy)
    store = SharedMemoryStore(policy, n_workers=1)
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


def test_moments_with_other_strides_are_laid_out_anew() -> None:
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

    store = SharedMemoryStore(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    gradients = random_gradients(policy, th.Generator().manual_seed(1))
    set_gradients(worker_policy, gradients)
    replica.push()
    for parameter, gradient in zip(contiguous.parameters(), gradients, strict=True):
        parameter.grad = gradient.contiguous()
    contiguous.optimizer.step()
    store.fetch_policy(policy)
    assert_equal(policy, contiguous, 1e-7)


def test_moments_and_copies_have_their_parameters_strides() -> None:
    policy = make_policy()
    store = SharedMemoryStore(policy, n_workers=1)
    store.replica(worker_policy := copied(policy), 0)
    store.fetch_optimizer(policy)
    assert cnn(worker_policy)[0].weight.stride() == (9, 1, 3, 1)
    for private, parameter in zip(policy.parameters(), worker_policy.parameters(), strict=True):
        assert parameter.stride() == private.stride()
        for name in ("exp_avg", "exp_avg_sq"):
            assert policy.optimizer.state[private][name].stride() == private.stride()


def test_a_pull_sees_what_others_pushed_and_counts_it() -> None:
    policy = make_policy(th.optim.SGD)
    store = SharedMemoryStore(policy, n_workers=2)
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
    assert store._counters[:, Counter.UPDATES].tolist() == [2, 2]


def test_frozen_parameters_stay_and_get_no_state() -> None:
    policy = make_policy(th.optim.AdamW, {"weight_decay": 0.5})
    frozen = cnn(policy)[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    store = SharedMemoryStore(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    for parameter in worker_policy.parameters():
        parameter.grad = th.ones_like(parameter) if parameter.requires_grad else None
    replica.push()
    store.fetch_policy(policy)
    store.fetch_optimizer(policy)
    assert th.equal(frozen, before)
    assert frozen not in policy.optimizer.state
    assert not th.equal(policy.value_net.bias, th.zeros(1))


def test_parameter_groups_keep_their_options() -> None:
    policy = make_policy()
    heads = [*policy.value_net.parameters(), *policy.action_net.parameters()]
    trunk = [p for p in policy.parameters() if not any(p is head for head in heads)]
    policy.optimizer = th.optim.SGD([{"params": trunk, "lr": 0.0}, {"params": heads, "lr": 1.0}])
    before = copied(policy)
    store = SharedMemoryStore(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    set_gradients(worker_policy, [th.ones_like(p) for p in worker_policy.parameters()])
    replica.push()
    store.fetch_policy(policy)
    for (name, new), old in zip(policy.named_parameters(), before.parameters(), strict=True):
        moved = 1.0 if name.startswith(("value_net", "action_net")) else 0.0
        assert th.allclose(old - new, th.full_like(new, moved)), name


def test_module_buffers_are_shared_too() -> None:
    policy = make_policy()
    cnn(policy).append(th.nn.BatchNorm1d(int(policy.features_dim)))
    store = SharedMemoryStore(policy, n_workers=2)
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


def test_a_gradient_in_another_order_is_noticed() -> None:
    policy = make_policy(channels_last=True)
    replica = SharedMemoryStore(policy, n_workers=1).replica(worker_policy := copied(policy), 0)
    weight = cnn(worker_policy)[2].weight
    weight.grad = th.ones(weight.shape).contiguous()
    with pytest.raises(AssertionError):
        replica.push()


def test_a_parameter_without_gradient_is_left_alone() -> None:
    policy = make_policy(th.optim.AdamW, {"weight_decay": 0.5})
    store = SharedMemoryStore(policy, n_workers=1)
    replica = store.replica(worker_policy := copied(policy), 0)
    before = copied(policy)
    set_gradients(worker_policy, [th.ones_like(p) for p in policy.parameters()])
    cnn(worker_policy)[0].weight.grad = None
    replica.push()
    assert all(p.grad is None for p in worker_policy.parameters())  # the next one starts from nothing
    store.fetch_policy(policy)
    assert th.equal(cnn(policy)[0].weight, cnn(before)[0].weight)
    assert not th.equal(cnn(policy)[2].weight, cnn(before)[2].weight)


def test_an_optimizer_with_a_closure_is_refused() -> None:
    policy = make_policy()
    policy.optimizer = th.optim.LBFGS(policy.parameters())
    with pytest.raises(ValueError, match=r"LBFGS needs a closure.*Use an optimizer without a closure"):
        check_optimizer(policy.optimizer)


def push_ones(
    channel: WorkerChannel, store: SharedMemoryStore, policy: bytes, worker: int, n_pushes: int, go: th.Tensor
) -> None:
    th.set_num_threads(1)
    worker_policy: ActorCriticPolicy = pickle.loads(policy)
    replica = store.replica(worker_policy, worker)
    ones = [th.ones_like(p) for p in worker_policy.parameters()]
    channel.send("ready")
    while not go:
        pass  # start together
    for _ in range(n_pushes):
        replica.pull()
        for parameter, gradient in zip(worker_policy.parameters(), ones, strict=True):
            parameter.grad = gradient
        replica.push()


def test_free_running_workers_lose_few_updates_and_count_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    """Hogwild: two workers may overwrite each other's step. How often they do is printed; the counters never lie."""
    n_pushes = 200
    policy = make_policy(th.optim.SGD)
    policy.optimizer.param_groups[0]["lr"] = 1.0
    for parameter in policy.parameters():
        parameter.data.zero_()
    store = SharedMemoryStore(policy, n_workers=2)
    go = th.zeros(1).share_memory_()  # type: ignore[no-untyped-call]
    arguments = [(store, pickle.dumps(policy), worker, n_pushes, go) for worker in range(2)]
    supervisor = Supervisor(push_ones, arguments, preload=PRELOAD)
    try:
        supervisor.start()
        n_ready = 0
        while n_ready < 2:
            n_ready += len(supervisor.receive(timeout=60))
        go.fill_(1)
        while not supervisor.finished:
            supervisor.receive(timeout=60)
    finally:
        supervisor.stop()
    store.fetch_policy(policy)
    values = th.cat([p.detach().flatten() for p in policy.parameters()])
    lost = 2 * n_pushes + values  # each element moved by -1 for every push that was not lost
    assert store.n_updates == 2 * n_pushes
    assert store._counters[:, Counter.UPDATES].tolist() == [n_pushes, n_pushes]
    assert th.equal(lost, lost.round())
    assert float(lost.min()) >= 0
    assert float(lost.max()) <= n_pushes  # at worst one worker's pushes are all lost
    share = float(lost.mean()) / (2 * n_pushes)
    with capsys.disabled():
        worst = int(lost.max())
        print(f"\nlost updates of {2 * n_pushes}: mean {lost.mean():.2f} ({share:.2%}), worst parameter {worst}")


class RandomImages(gym.Env[Any, Any]):
    """Small images without meaning, and rewards for one of the actions."""

    observation_space = SPACE
    action_space = spaces.Discrete(4)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.observation(), float(action == 1), self.t == 7, False, {}

    def observation(self) -> Any:
        return self.np_random.integers(0, 256, SPACE.shape, dtype=np.uint8)


def recording(optimizer_class: type[th.optim.Optimizer], path: Path) -> type[th.optim.Optimizer]:
    """The optimizer; each of its steps leaves its gradients in a folder, under the time at which it was made."""

    class Recording(optimizer_class):  # type: ignore[misc, valid-type]
        folder = path

        def step(self) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            if any(p.grad.any() for p in parameters):  # not the step that only makes the state
                th.save([p.grad for p in parameters], self.folder / f"{time.monotonic_ns():020}.pt")
            super().step()

    return Recording


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "tolerance"),
    [
        pytest.param(th.optim.Adam, {}, 0.0, id="Adam"),
        pytest.param(th.optim.Adam, {"fused": True}, 1e-7, id="Adam-fused"),
        pytest.param(th.optim.RMSprop, {}, 0.0, id="RMSprop"),
        pytest.param(th.optim.SGD, {"momentum": 0.9}, 0.0, id="SGD-momentum"),
    ],
)
def test_two_worker_processes_move_the_parameters_by_exactly_the_optimizers_steps(
    optimizer_class: type[th.optim.Optimizer],
    kwargs: dict[str, Any],
    tolerance: float,
    channels_last: bool,
    tmp_path: Path,
) -> None:
    """50 pushes of two processes that take turns, replayed from their gradients; then 50 more, after save and load."""
    env = make_vec_env(RandomImages, n_envs=4)
    policy_kwargs: dict[str, Any] = dict(
        optimizer_class=recording(optimizer_class, tmp_path),
        optimizer_kwargs=kwargs,
        lstm_hidden_size=8,
        channels_last=channels_last,
    )
    settings: dict[str, Any] = dict(n_workers=2, take_turns=True, envs_per_update=1, n_steps=5, learning_rate=1e-2)
    model = A3C("CnnLstmPolicy", env, seed=0, policy_kwargs=policy_kwargs, **settings)
    private = copied(model.policy)
    optimizer = optimizer_class(private.parameters(), lr=1e-2, **kwargs)  # type: ignore[call-arg]
    for _ in range(2):
        model.learn(50 * 5)
        recorded = sorted(tmp_path.glob("*.pt"))
        assert len(recorded) == 50
        for path in recorded:
            for parameter, gradient in zip(private.parameters(), th.load(path), strict=True):
                assert parameter.stride() == gradient.stride() or 1 in parameter.shape
                parameter.grad = gradient
            optimizer.step()
            path.unlink()
        assert_equal(model.policy, private, tolerance)
        model.save(tmp_path / "model")
        model = A3C.load(tmp_path / "model", env=env)


def test_copying_a_policy_keeps_what_the_store_relies_on() -> None:
    """Strides and the frozen flag survive pickling, which is how policies travel to workers."""
    policy = make_policy()
    policy.value_net.bias.requires_grad_(False)
    clone = copied(policy)
    for a, b in zip(policy.parameters(), clone.parameters(), strict=True):
        assert a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad
    assert copy.copy(policy.optimizer).param_groups == policy.optimizer.param_groups
