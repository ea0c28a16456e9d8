"""
The activations of an LSTM that acting computed, kept for the backward pass through time.

Notation of Hochreiter & Schmidhuber (1997) and ``th.nn.LSTM``: gates i, f, g, o; cell c = f ⊙ c_{t-1} + i ⊙ g; output
h = o ⊙ tanh(c).
"""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_a3c.policies.torch_layers import LstmState


class LstmCache:
    """
    The activations of a standard LSTM over a rollout, recorded while acting and replayed once for each environment. Weights
    must stay the same between recording and the backward pass.
    """

    def __init__(self, lstm: nn.LSTM, n_steps: int, n_envs: int) -> None:
        self.n_recorded = 0
        self.layers = [_LayerCache(weights, n_steps, n_envs) for weights in lstm.all_weights]

    @staticmethod
    def bytes_per_transition(lstm: nn.LSTM) -> int:
        # of a layer: inputs; outputs and cells of the step before, four gates, the cells' tanh, outputs
        n_numbers = sum(w_ih.shape[1] + w_hh.shape[1] * (2 + 4 + 1 + 1) for w_ih, w_hh, *_ in lstm.all_weights)
        return n_numbers * lstm.all_weights[0][0].element_size()

    def record(self, features: th.Tensor, state: LstmState, episode_starts: th.Tensor) -> tuple[th.Tensor, LstmState]:
        """
        One step, without gradient: from features (n_envs, features_dim) and the state, which is zeroed first where
        ``episode_starts`` (n_envs,) is True, to outputs (n_envs, lstm_hidden_size) and the next state.
        """
        assert not th.is_grad_enabled()
        hidden, cell = [], []
        x = features
        for layer, h, c in zip(self.layers, *state, strict=True):
            x, c = layer.record(self.n_recorded, x, h, c, episode_starts[:, None])
            hidden.append(x)
            cell.append(c)
        self.n_recorded += 1
        # n_lstm_layers of (n_envs, H) -> (n_lstm_layers, n_envs, H)
        return x, (th.stack(hidden), th.stack(cell))

    def clear(self) -> None:
        self.n_recorded = 0

    def replay(self, features: th.Tensor | None, envs: slice) -> th.Tensor:
        """
        Outputs of n environments, (n_recorded * n, lstm_hidden_size), with gradient; ``features`` are the recorded ones,
        (n_recorded * n, features_dim), if their gradient is needed.
        """
        x: Any = features
        for layer in self.layers:
            steps = _Steps(layer, slice(0, self.n_recorded), envs)
            x = _LstmReplay.apply(steps, x, *layer.weights)  # type: ignore[no-untyped-call]
        return x  # type: ignore[no-any-return]


class _LayerCache:
    """The cache of one layer. Weights are as in ``th.nn.LSTM.all_weights``: two matrices and, optionally, two biases."""

    def __init__(self, weights: Sequence[th.Tensor], n_steps: int, n_envs: int) -> None:
        self.weights = weights
        n_inputs, n_units = weights[0].shape[1], weights[1].shape[1]
        zeros = weights[0].detach().new_zeros
        self.inputs = zeros(n_steps, n_envs, n_inputs)
        self.outputs_before = zeros(n_steps, n_envs, n_units)  #: of the step before; 0 where an episode starts
        self.cells_before = zeros(n_steps, n_envs, n_units)  #: likewise
        self.gates = zeros(n_steps, 4, n_envs, n_units)  #: i, f, g, o
        self.cell_tanhs = zeros(n_steps, n_envs, n_units)
        self.outputs = zeros(n_steps, n_envs, n_units)
        self.episode_starts = zeros(n_steps, n_envs, 1, dtype=th.bool)

    def record(
        self, t: int, x: th.Tensor, output: th.Tensor, cell: th.Tensor, starts: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """Inputs (n_envs, n_inputs), state twice (n_envs, n_units), starts (n_envs, 1) -> twice (n_envs, n_units)."""
        assert x.shape == self.inputs[t].shape
        self.episode_starts[t] = starts
        x = self.inputs[t].copy_(x)
        output_before = self.outputs_before[t].copy_(output.masked_fill(starts, 0.0))
        cell_before = self.cells_before[t].copy_(cell.masked_fill(starts, 0.0))
        gates = _add_products(self.gates[t].zero_(), x, self.weights[0])
        for bias in self.weights[2:]:
            gates += bias.view(4, 1, -1)  # (4 * H,) -> (4, 1, H)
        i, f, g, o = _add_products(gates, output_before, self.weights[1])
        gates[:2].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        cell = th.addcmul(i * g, f, cell_before)
        return th.mul(o, th.tanh(cell, out=self.cell_tanhs[t]), out=self.outputs[t]), cell


def _add_products(gates: th.Tensor, x: th.Tensor, matrix: th.Tensor) -> th.Tensor:
    """
    Add to (4, n, H) the products of (n, n_inputs) and (4 * H, n_inputs). With few rows the time goes into reading the
    matrix from memory, which is faster as one product for each gate.
    """
    of_gates = matrix.view(4, -1, matrix.shape[1])  # (4 * H, n_inputs) -> (4, H, n_inputs)
    return gates.baddbmm_(x.expand(4, *x.shape), of_gates.transpose(1, 2))


class _Steps:
    """The recorded steps of some environments in one layer."""

    def __init__(self, layer: _LayerCache, steps: slice, envs: slice) -> None:
        self.inputs = layer.inputs[steps, envs]
        self.outputs_before = layer.outputs_before[steps, envs]
        self.cells_before = layer.cells_before[steps, envs]
        self.gates = layer.gates[steps, :, envs]
        self.cell_tanhs = layer.cell_tanhs[steps, envs]
        self.outputs = layer.outputs[steps, envs]
        self.continues = layer.episode_starts[steps, envs].logical_not().to(self.outputs.dtype)

    def gradient_of_gates(self, of_outputs: th.Tensor, w_hh: th.Tensor) -> th.Tensor:
        """
        Backpropagate through time.

        :param of_outputs: gradient of the outputs, (n_steps, n_envs, H)
        :param w_hh: (4 * H, H)
        :return: gradient of the gates before their sigmoid or tanh, (n_steps, n_envs, 4, H)
        """
        i, f, g, o = self.gates.unbind(1)
        tanh = self.cell_tanhs
        # ∂c/∂(i, f, g) and ∂h/∂o before the nonlinearities, ∂h/∂c, and ∂c/∂c_{t-1}: of all steps at once
        slopes = th.stack([i * (1 - i) * g, f * (1 - f) * self.cells_before, (1 - g * g) * i, o * (1 - o) * tanh], 2)
        output_by_cell, cell_by_cell = o * (1 - tanh * tanh), f * self.continues
        of_gates = th.empty_like(slopes)
        of_output, of_cell = of_outputs[-1], th.zeros_like(of_outputs[-1])
        for t in reversed(range(len(slopes))):
            of_cell = th.addcmul(of_cell, of_output, output_by_cell[t])
            th.mul(slopes[t, :, :3], of_cell[:, None], out=of_gates[t, :, :3])
            th.mul(slopes[t, :, 3], of_output, out=of_gates[t, :, 3])
            if t > 0:
                of_cell = of_cell * cell_by_cell[t]
                # (n_envs, 4, H) -> (n_envs, 4 * H) -> (n_envs, H)
                of_output = th.addcmul(of_outputs[t - 1], of_gates[t].flatten(1) @ w_hh, self.continues[t])
        return of_gates


class _LstmReplay(th.autograd.Function):
    """From a layer's features and weights to its recorded outputs."""

    @staticmethod
    def forward(ctx: Any, steps: _Steps, features: th.Tensor | None, *weights: th.Tensor) -> th.Tensor:
        ctx.steps = steps
        ctx.weights = weights
        return steps.outputs.flatten(0, 1)  # (n_steps, n_envs, H) -> (n_steps * n_envs, H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        steps: _Steps = ctx.steps
        w_ih, w_hh, *biases = ctx.weights
        # (n_steps * n_envs, H) -> (n_steps, n_envs, H) -> (n_steps, n_envs, 4, H) -> (n_steps * n_envs, 4 * H)
        of_gates = steps.gradient_of_gates(gradient.view(steps.outputs.shape), w_hh).flatten(0, 1).flatten(1)
        of_features = of_gates @ w_ih if ctx.needs_input_grad[1] else None
        of_w_ih = of_gates.t() @ steps.inputs.flatten(0, 1)
        of_w_hh = of_gates.t() @ steps.outputs_before.flatten(0, 1)
        return None, of_features, of_w_ih, of_w_hh, *(of_gates.sum(0) for _ in biases)
