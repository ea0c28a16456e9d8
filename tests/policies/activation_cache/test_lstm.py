"""An LSTM over rollouts; a cache's backward pass is that of the LSTM itself."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_a3c.policies.activation_cache.lstm import LstmCache
from sb3_a3c.policies.torch_layers import LstmState, is_simple, run_lstm

N_STEPS, N_ENVS, N_FEATURES, HIDDEN = 9, 5, 7, 6


class Acted:
    """An LSTM in double precision, random features and episode starts, and the cache of acting them out."""

    def __init__(self, **kwargs: Any) -> None:
        th.manual_seed(0)
        self.lstm = nn.LSTM(N_FEATURES, HIDDEN, **kwargs).double().eval()
        self.features = th.randn(N_STEPS, N_ENVS, N_FEATURES, dtype=th.float64)
        self.starts = th.rand(N_STEPS, N_ENVS) < 0.25
        shape = (self.lstm.num_layers, N_ENVS, HIDDEN)
        self.first_state: LstmState = tuple(th.randn(shape, dtype=th.float64) for _ in range(2))
        self.cache = LstmCache(self.lstm, N_STEPS, N_ENVS)
        self.outputs, self.states = self.act(0, N_STEPS)

    def act(self, begin: int, end: int) -> tuple[list[th.Tensor], list[LstmState]]:
        outputs, states = [], [self.first_state]
        with th.no_grad():
            for t in range(begin, end):
                output, state = self.cache.record(self.features[t], states[-1], self.starts[t])
                outputs.append(output.clone())
                states.append(state)
        return outputs, states

    def run(self, features: th.Tensor, envs: slice) -> tuple[th.Tensor, LstmState]:
        """Without a cache."""
        state = tuple(part[:, envs].contiguous() for part in self.first_state)
        return run_lstm(self.lstm, features, state, self.starts[:, envs])


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 3}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize("envs", [slice(0, 2), slice(2, 5), slice(0, 5)])
def test_a_replayed_tape_has_the_outputs_and_gradients_of_the_lstm(kwargs: dict[str, Any], envs: slice) -> None:
    acted = Acted(**kwargs)
    assert acted.starts.any()
    # (n_steps, n, F) -> (n_steps * n, F)
    features = [acted.features[:, envs].flatten(0, 1).requires_grad_() for _ in range(2)]
    replayed, (expected, state) = acted.cache.replay(features[0], envs), acted.run(features[1], envs)
    assert th.allclose(replayed, expected, rtol=1e-12)
    assert th.allclose(th.stack(acted.outputs)[:, envs].flatten(0, 1), expected, rtol=1e-12)
    for mine, last in zip(acted.states[-1], state, strict=True):
        assert th.allclose(mine[:, envs], last, rtol=1e-12)
    weights = th.randn_like(expected)
    gradients = [
        th.autograd.grad((outputs * weights).sum(), [inputs, *acted.lstm.parameters()])
        for outputs, inputs in zip((replayed, expected), features, strict=True)
    ]
    for found, reference in zip(*gradients, strict=True):
        assert th.allclose(found, reference, rtol=1e-10, atol=1e-14)
        assert found.stride() == reference.stride()  # fused Adam does not look at strides


def test_single_steps_without_gradient_are_those_of_the_lstm() -> None:
    acted = Acted(num_layers=2)
    state = acted.first_state
    for t in range(N_STEPS):
        with th.no_grad():
            output, state = run_lstm(acted.lstm, acted.features[t], state, acted.starts[t][None])
        assert th.allclose(output, acted.outputs[t], rtol=1e-12)
        for mine, recorded in zip(state, acted.states[t + 1], strict=True):
            assert th.allclose(mine, recorded, rtol=1e-12)


def test_a_rewound_tape_knows_only_what_is_recorded_then() -> None:
    acted = Acted()
    acted.cache.clear()
    outputs, _ = acted.act(N_STEPS - 2, N_STEPS)
    assert th.equal(acted.cache.replay(None, slice(0, N_ENVS)), th.cat(outputs))


def test_states_are_no_part_of_the_tape() -> None:
    acted = Acted()
    states = [[part.clone() for part in state] for state in acted.states]
    acted.cache.clear()
    acted.features += 1
    acted.act(0, N_STEPS)
    for before, now in zip(states, acted.states, strict=True):  # a rollout begins with a state of the last one
        for old, new in zip(before, now, strict=True):
            assert th.equal(old, new)


def test_what_is_frozen_gets_no_gradient_from_a_tape() -> None:
    acted = Acted()
    acted.lstm.weight_ih_l0.requires_grad_(False)
    acted.lstm.bias_hh_l0.requires_grad_(False)
    found = []
    for outputs in (
        acted.cache.replay(None, slice(0, N_ENVS)),
        acted.run(acted.features.flatten(0, 1), slice(0, N_ENVS))[0],
    ):
        acted.lstm.zero_grad()
        outputs.sum().backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in acted.lstm.parameters()])
    assert [gradient is None for gradient in found[0]] == [True, False, False, True]
    for mine, reference in zip(*found, strict=True):
        assert (mine is None) == (reference is None)
        assert mine is None or th.allclose(mine, reference, rtol=1e-10)


def test_what_a_step_of_an_environment_needs_is_counted_right() -> None:
    lstm = nn.LSTM(N_FEATURES, HIDDEN, 2)
    cache = LstmCache(lstm, 1, 1)
    tensors = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, th.Tensor)]
    assert sum(part.numel() for part in tensors if part.dtype != th.bool) == LstmCache.numbers_per_step(lstm)


@pytest.mark.parametrize("kwargs", [{"bidirectional": True}, {"num_layers": 2, "dropout": 0.5}])
def test_lstms_of_other_kinds_compute_single_steps_themselves(kwargs: dict[str, Any]) -> None:
    lstm = nn.LSTM(N_FEATURES, HIDDEN, **kwargs).eval()
    assert not is_simple(lstm)
    n_states = lstm.num_layers * (1 + lstm.bidirectional)
    state = (th.randn(n_states, N_ENVS, HIDDEN), th.randn(n_states, N_ENVS, HIDDEN))
    features = th.randn(N_ENVS, N_FEATURES)
    with th.no_grad():
        outputs, (hidden, cell) = run_lstm(lstm, features, state, th.zeros(1, N_ENVS, dtype=th.bool))
        expected, (expected_hidden, expected_cell) = lstm(features[None], state)
    for mine, reference in ((outputs, expected[0]), (hidden, expected_hidden), (cell, expected_cell)):
        assert th.equal(mine, reference)


def test_an_lstm_as_its_class_made_it_is_simple() -> None:
    assert is_simple(nn.LSTM(N_FEATURES, HIDDEN, 2, bias=False))
    assert not is_simple(nn.LSTM(N_FEATURES, HIDDEN, batch_first=True))
    assert not is_simple(nn.LSTM(N_FEATURES, HIDDEN, proj_size=4))
    hooked = nn.LSTM(N_FEATURES, HIDDEN)
    hooked.register_forward_hook(lambda module, inputs, output: None)
    assert not is_simple(hooked)
