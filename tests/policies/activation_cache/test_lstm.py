"""A replayed ``LstmCache`` has the outputs and gradients of the LSTM."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_a3c.policies.activation_cache.lstm import LstmCache
from sb3_a3c.policies.torch_layers import LstmState, run_lstm

N_STEPS, N_ENVS, N_FEATURES, HIDDEN = 9, 5, 7, 6
ALL_ENVS = slice(0, N_ENVS)


class Acted:
    """An LSTM in double precision, random features and episode starts, and the cache recorded on them."""

    def __init__(self, **kwargs: Any) -> None:
        th.manual_seed(0)
        self.lstm = nn.LSTM(N_FEATURES, HIDDEN, **kwargs).double().eval()
        self.features = th.randn(N_STEPS, N_ENVS, N_FEATURES, dtype=th.float64)
        self.starts = th.rand(N_STEPS, N_ENVS) < 0.25
        assert self.starts.any()
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


@pytest.mark.parametrize(
    ("kwargs", "envs"), [({}, slice(0, 2)), ({"num_layers": 3}, slice(2, 5)), ({"num_layers": 2, "bias": False}, ALL_ENVS)]
)
def test_replay_has_the_outputs_and_gradients_of_the_lstm(kwargs: dict[str, Any], envs: slice) -> None:
    acted = Acted(**kwargs)
    # (n_steps, n, F) -> (n_steps * n, F)
    features = [acted.features[:, envs].flatten(0, 1).requires_grad_() for _ in range(2)]
    replayed, (expected, state) = acted.cache.replay(features[0], envs), acted.run(features[1], envs)
    assert th.allclose(replayed, expected, rtol=1e-12)
    assert th.allclose(th.stack(acted.outputs)[:, envs].flatten(0, 1), expected, rtol=1e-12)
    for recorded, last in zip(acted.states[-1], state, strict=True):
        assert th.allclose(recorded[:, envs], last, rtol=1e-12)
    weights = th.randn_like(expected)
    gradients = [
        th.autograd.grad((outputs * weights).sum(), [inputs, *acted.lstm.parameters()])
        for outputs, inputs in zip((replayed, expected), features, strict=True)
    ]
    for found, reference in zip(*gradients, strict=True):
        assert th.allclose(found, reference, rtol=1e-10, atol=1e-14)
        assert found.stride() == reference.stride()  # fused Adam does not look at strides


def test_cleared_cache_replays_only_later_records() -> None:
    acted = Acted()
    acted.cache.clear()
    outputs, _ = acted.act(N_STEPS - 2, N_STEPS)
    assert th.equal(acted.cache.replay(None, ALL_ENVS), th.cat(outputs))


def test_later_records_leave_returned_states_as_they_are() -> None:
    acted = Acted()
    copies = [part.clone() for state in acted.states for part in state]
    acted.cache.clear()
    acted.features += 1
    acted.act(0, N_STEPS)
    # the next rollout begins with the last of these states
    assert all(th.equal(*pair) for pair in zip(copies, [part for state in acted.states for part in state], strict=True))


def test_frozen_weights_get_no_gradient() -> None:
    acted = Acted()
    acted.lstm.weight_ih_l0.requires_grad_(False)
    acted.lstm.bias_hh_l0.requires_grad_(False)
    found = []
    for outputs in (acted.cache.replay(None, ALL_ENVS), acted.run(acted.features.flatten(0, 1), ALL_ENVS)[0]):
        acted.lstm.zero_grad()
        outputs.sum().backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in acted.lstm.parameters()])
    for gradients in found:
        assert [gradient is None for gradient in gradients] == [True, False, False, True]
    for gradient, reference in list(zip(*found, strict=True))[1:3]:
        assert th.allclose(gradient, reference, rtol=1e-10)
