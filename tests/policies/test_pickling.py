"""A policy travels to a worker with its parametrizations and the hooks of its parameters, and computes the same there."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.nn.utils import parametrizations, parametrize

from sb3_a3c import CnnLstmPolicy, MlpLstmPolicy, MlpPolicy
from sb3_a3c.policies.interface import as_recurrent
from sb3_a3c.policies.pickling import dump_policy

VECTOR, IMAGE = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (1, 36, 36), np.uint8)


class Doubled(th.nn.Module):
    def forward(self, weight: th.Tensor) -> th.Tensor:
        return 2 * weight


def several(layer: th.nn.Module) -> None:
    """Two on one weight, one on another."""
    parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())


def make(where: str, **kwargs: Any) -> Any:
    th.manual_seed(0)
    cls: Any = {"cnn": CnnLstmPolicy, "lstm": MlpLstmPolicy, "mlp": MlpPolicy}[where]
    kwargs = kwargs if where == "mlp" else {"lstm_hidden_size": 8, **kwargs}
    return cls(IMAGE if where == "cnn" else VECTOR, spaces.Discrete(4), lambda _: 1e-2, **kwargs)


def layer_of(policy: Any, where: str) -> Any:
    layers = {
        "cnn": lambda: policy.features_extractor.cnn[2],
        "lstm": lambda: policy.lstm,
        "mlp": lambda: policy.mlp_extractor.policy_net[0],
    }
    return layers[where]()


def compute(policy: Any) -> list[th.Tensor]:
    """Two times in train mode: values, log-probabilities, all gradients, then all buffers."""
    generator, found = th.Generator().manual_seed(1), []
    recurrent = as_recurrent(policy)
    policy.set_training_mode(True)
    for _ in range(2):
        obs = th.rand((6, *policy.observation_space.shape), generator=generator)
        actions, starts = th.arange(6) % 4, th.zeros(3, 2, dtype=th.bool)
        policy.zero_grad()
        values, log_prob, _ = recurrent.evaluate_actions(obs, actions, recurrent.initial_state(2), starts)
        th.autograd.backward(values.sum() + log_prob.sum())
        found += [values, log_prob, *(p.grad for p in policy.parameters()), *policy.buffers()]
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("where", "edit"),
    [
        *[
            pytest.param(where, edit, id=f"{where}-{edit.__name__}")
            for where in ("mlp", "cnn")
            for edit in (
                parametrizations.spectral_norm,
                parametrizations.weight_norm,
                parametrizations.orthogonal,
                several,
            )
        ],
        pytest.param("mlp", th.nn.utils.spectral_norm, id="mlp-hook-spectral_norm"),
        pytest.param("mlp", th.nn.utils.weight_norm, id="mlp-hook-weight_norm"),
        pytest.param("lstm", lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l0"), id="lstm-weight_norm"),
        pytest.param("lstm", lambda lstm: parametrizations.spectral_norm(lstm, "weight_ih_l0"), id="lstm-spectral_norm"),
    ],
)
def test_a_normalised_layer_computes_the_same_after_pickling(where: str, edit: Callable[[Any], object]) -> None:
    policy = make(where)
    before = compute(policy)
    edit(layer_of(policy, where))
    policy.optimizer = th.optim.Adam(policy.parameters())
    compute(policy)  # leaves results of the autograd graph in some modules
    copy = pickle.loads(dump_policy(policy))
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in policy.named_parameters()]
    assert [p.stride() for p in copy.parameters()] == [p.stride() for p in policy.parameters()]
    assert copy.optimizer.param_groups[0]["params"] == list(copy.parameters())
    expected, actual = compute(policy), compute(copy)
    assert all(th.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(before) != len(expected) or not th.equal(before[1], expected[1])  # the edit counts
    assert pickle.loads(dump_policy(copy)).state_dict().keys() == policy.state_dict().keys()  # and once more


def test_torchs_cache_of_parametrizations_works_after_pickling() -> None:
    layer = parametrizations.weight_norm(layer_of(policy := make("mlp"), "mlp"))
    copy = layer_of(pickle.loads(dump_policy(policy)), "mlp")
    assert parametrize.is_parametrized(copy, "weight") and not parametrize.is_parametrized(copy, "bias")
    assert parametrize.type_before_parametrizations(copy) is th.nn.Linear
    assert th.equal(copy.weight, layer.weight)
    with parametrize.cached():
        assert copy.weight is copy.weight


def test_hooks_of_parameters_work_after_pickling() -> None:
    policy = make("mlp")
    calls: list[str] = []
    policy.value_net.bias.register_hook(lambda gradient: 3 * gradient)
    policy.value_net.bias.register_hook(lambda gradient: gradient + 1)
    policy.action_net.bias.register_hook(lambda gradient: gradient.clamp(max=policy.action_net.bias.shape[0]))  # a cycle
    policy.value_net.weight.register_hook(lambda gradient: 5 * gradient)
    policy.value_net.weight.requires_grad_(False)
    copy = pickle.loads(dump_policy(policy))
    copy.value_net.bias.register_post_accumulate_grad_hook(lambda parameter: calls.append("here"))
    again = pickle.loads(dump_policy(copy))
    obs = th.ones(1, 3)
    for tested in [policy, copy, again]:
        values, *_ = tested.evaluate_actions(obs, th.zeros(1))
        values.sum().backward()
        assert tested.value_net.bias.grad.tolist() == [4.0]  # 3 * 1 + 1
        weight: Any = tested.value_net.weight
        assert [weight.requires_grad, weight.grad] == [False, None]
        weight.requires_grad_()
        tested.evaluate_actions(obs, th.zeros(1))[0].sum().backward()
        latent = tested.mlp_extractor.forward_critic(obs)
        assert th.equal(weight.grad, 5 * latent)
    assert calls == ["here"] * 2


def compile_all(policy: Any) -> Any:
    return th.compile(policy, backend="eager")


def compile_in_place(policy: Any) -> Any:
    policy.compile(backend="eager")
    return policy


def compile_a_part(policy: Any) -> Any:
    policy.mlp_extractor = th.compile(policy.mlp_extractor, backend="eager")
    return policy


@pytest.mark.parametrize("where", ["mlp", "lstm"])
@pytest.mark.parametrize("compile_it", [compile_all, compile_in_place, compile_a_part])
def test_a_compiled_policy_is_the_original_one_after_pickling(where: str, compile_it: Callable[[Any], Any]) -> None:
    policy, original = make(where, net_arch=[4]), make(where, net_arch=[4])
    with pytest.warns(UserWarning, match="compiled"):
        copy = pickle.loads(dump_policy(compile_it(policy)))
    assert type(copy) is type(original) and type(copy.mlp_extractor) is type(original.mlp_extractor)
    assert copy._compiled_call_impl is None
    assert list(copy.state_dict()) == list(original.state_dict())
    assert all(th.equal(a, b) for a, b in zip(compute(copy), compute(original), strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_can_not_be_pickled_is_named() -> None:
    policy = make("mlp")
    policy.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot pickle '_thread.lock' object.*`__getstate__`"):
        dump_policy(policy)
    policy = make("mlp")
    policy.value_net = th.jit.script(policy.value_net)
    with pytest.raises(ValueError, match="scripted modules"):
        dump_policy(policy)
