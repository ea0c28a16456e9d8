"""The store in shared memory: the order of tensors in it, and real processes on it. ``test_contract`` has the rest."""

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_a3c import A3C
from sb3_a3c.processes.channel import WorkerChannel
from sb3_a3c.processes.supervisor import Supervisor
from sb3_a3c.store.layout import Counter
from sb3_a3c.store.optimizer_state import check_optimizer
from sb3_a3c.store.shared_memory import SharedMemoryStore
from sb3_a3c.workers.worker_processes import PRELOAD
from tests.store.small_policy import SPACE, assert_equal, cnn, copied, make_policy


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


def test_a_gradient_in_another_order_is_noticed() -> None:
    policy = make_policy(channels_last=True)
    replica = SharedMemoryStore(policy, n_workers=1).replica(worker_policy := copied(policy), 0)
    weight = cnn(worker_policy)[2].weight
    weight.grad = th.ones(weight.shape).contiguous()
    with pytest.raises(AssertionError):
        replica.push()


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


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "tolerance", "channels_last"),
    [
        pytest.param(th.optim.Adam, {}, 0.0, True, id="Adam"),
        pytest.param(th.optim.Adam, {"fused": True}, 1e-7, True, id="Adam-fused"),
        pytest.param(th.optim.Adam, {"fused": True}, 1e-7, False, id="Adam-fused-contiguous"),
        pytest.param(th.optim.RMSprop, {}, 0.0, True, id="RMSprop"),
        pytest.param(th.optim.SGD, {"momentum": 0.9}, 0.0, True, id="SGD-momentum"),
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
