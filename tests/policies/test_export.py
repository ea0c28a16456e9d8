"""One step of an LSTM policy, exported by torch, is that of ``predict``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from torch.jit import optimized_execution  # type: ignore[attr-defined]

from sb3_a3c import A3C, MlpLstmPolicy
from sb3_a3c.policies.lstm_policies import LstmActorCriticPolicy
from sb3_a3c.policies.sampling import to_env_actions
from tests.policies.test_lstm_policies import KINDS, VECTOR, make, sample_obs
from tests.toy_envs import Countdown

#: The LSTM policies of KINDS, and what else their step depends on.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "memoryless critic": ("cnn", dict(enable_critic_lstm=False)),
    "bfloat16": ("cnn", dict(features_extractor_kwargs=dict(dtype=th.bfloat16))),
    "dropout": ("mlp", dict(n_lstm_layers=2, lstm_kwargs=dict(dropout=0.5))),
    "gSDE, squashed": ("mlp-box", dict(use_sde=True, squash_output=True)),
}


def trace(module: th.nn.Module, example: tuple[Any, ...]) -> Callable[..., Any]:
    return th.jit.trace(module, example)  # type: ignore[no-untyped-call, no-any-return]


def documented_example() -> str:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"^```python\n((?:(?!```).)*class OnnxablePolicy.*?)^```", page, re.DOTALL | re.MULTILINE)
    return str(code)


def one_step(policy: LstmActorCriticPolicy) -> th.nn.Module:
    """The documentation's module."""
    names: dict[str, Any] = {}
    exec(documented_example().partition("\nmodel = ")[0], names)
    return names["OnnxablePolicy"](policy).eval()  # type: ignore[no-any-return]


def example_for(policy: LstmActorCriticPolicy, n_envs: int = 1) -> tuple[Any, ...]:
    obs = obs_as_tensor(sample_obs(policy.observation_space, n_envs), policy.device)
    return obs, *policy.initial_state(n_envs), th.ones(n_envs)


def assert_predicts(
    exported: Callable[..., Any], policy: LstmActorCriticPolicy, n_envs: int, tolerance: float = 1e-5
) -> None:
    """The exported function and ``predict`` take the same steps, with episodes that start in between."""
    state, expected_state = policy.initial_state(n_envs), None
    starts = np.ones(n_envs, dtype=bool)
    for step in range(6):
        obs = sample_obs(policy.observation_space, n_envs, seed=step)
        expected, expected_state = policy.predict(obs, expected_state, starts, deterministic=True)
        action, *new = exported(obs_as_tensor(obs, policy.device), *state, th.as_tensor(starts, dtype=th.float32))
        state = tuple(new)
        np.testing.assert_allclose(to_env_actions(policy, action.detach().numpy()), expected, tolerance, tolerance)
        for part, expected_part in zip(state, expected_state or (), strict=True):
            np.testing.assert_allclose(part.detach().numpy(), expected_part, tolerance, tolerance)
        starts = np.arange(n_envs) % 3 == step % 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchscript(variant: str) -> None:
    kind, kwargs = VARIANTS[variant]
    policy = make(kind, **kwargs)
    traced = trace(one_step(policy), example_for(policy))
    with optimized_execution(False):  # which would compile for seconds
        assert_predicts(traced, policy, n_envs=50, tolerance=1e-2 if variant == "bfloat16" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_of_forward(kind: str) -> None:
    class Forward(th.nn.Module):
        def forward(self, obs: Any, hidden: th.Tensor, cell: th.Tensor, starts: th.Tensor) -> Any:
            action, *_, state = policy(obs, (hidden, cell), starts, deterministic=True)
            return action, *state

    policy = make(kind)
    module = Forward()
    module.add_module("policy", policy)
    with optimized_execution(False):
        assert_predicts(trace(module, example_for(policy)), policy, n_envs=2)


@pytest.mark.parametrize(
    ("obs_space", "action_space"),
    [
        (spaces.Discrete(5), spaces.MultiDiscrete([3, 2])),
        (spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)),
        (spaces.MultiBinary(4), spaces.Discrete(3, start=2)),
    ],
)
def test_torchscript_of_other_spaces(obs_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    policy = MlpLstmPolicy(obs_space, action_space, lambda _: 1e-4, lstm_hidden_size=8)
    obs = th.as_tensor(np.array([obs_space.sample() for _ in range(3)]))
    state, starts = (th.randn(1, 3, 8), th.randn(1, 3, 8)), np.array([0.0, 1.0, 0.0])
    traced = trace(one_step(policy), (obs[:1], *policy.initial_state(1), th.ones(1)))
    action, *after = traced(obs, *state, th.as_tensor(starts))
    expected, expected_state = policy.predict(obs.numpy(), tuple(part.numpy() for part in state), starts, deterministic=True)
    np.testing.assert_array_equal(action.detach().numpy(), expected)
    for part, expected_part in zip(after, expected_state or (), strict=True):
        np.testing.assert_allclose(part.detach().numpy(), expected_part, 1e-5, 1e-6)


@pytest.mark.filterwarnings("ignore")  # the exporter's own: of `_flat_weights` in any LSTM, of names, of torch itself
@pytest.mark.parametrize("kind", ["mlp", "cnn", "multi"])
@pytest.mark.parametrize("n_envs", [1, 50])
def test_onnx(kind: str, n_envs: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    policy = make(kind)
    example = example_for(policy, n_envs=1 if n_envs == 1 else 2)
    names = [*(example[0] if isinstance(example[0], dict) else ["obs"]), "hidden", "cell", "episode_start"]
    n = th.export.Dim("n")
    obs_shapes = {key: {0: n} for key in example[0]} if isinstance(example[0], dict) else {0: n}
    shapes = None if n_envs == 1 else (obs_shapes, {1: n}, {1: n}, {0: n})
    th.onnx.export(
        one_step(policy),
        example,
        tmp_path / "model.onnx",
        input_names=names,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")

    def run(obs: Any, *others: th.Tensor) -> list[th.Tensor]:
        inputs = [*(obs.values() if isinstance(obs, dict) else [obs]), *others]
        fed = {name: value.detach().numpy() for name, value in zip(names, inputs, strict=True)}
        return [th.as_tensor(output) for output in session.run(None, fed)]

    assert_predicts(run, policy, n_envs, tolerance=1e-4)


def test_documented_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = A3C("MlpLstmPolicy", Countdown(), n_workers=0).learn(40)
    exec(documented_example().replace("\nmodel = ", "\n_ = "), {"model": model})
    assert_predicts(th.jit.load("model.pt"), model.policy, n_envs=2)  # type: ignore[arg-type, no-untyped-call]


@pytest.mark.parametrize("method", ["forward", "act", "predict_values", "get_distribution"])
def test_episode_starts_may_be_numbers(method: str) -> None:
    policy = make("mlp").eval()
    obs, state = th.as_tensor(sample_obs(VECTOR, 3)), (th.randn(1, 3, 16), th.randn(1, 3, 16))
    starts = th.tensor([True, False, True])
    found = []
    for given in (starts, starts.float(), starts.double(), starts.to(th.uint8)):
        th.manual_seed(0)
        output = getattr(policy, method)(obs, state, given)
        found.append(output[-1][0] if isinstance(output, tuple) else output)
    assert all(th.equal(found[0], other) for other in found[1:])


def test_distributions_are_validated_as_before_after_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", True)  # torch.compile sets it to False for good
    policy = make("mlp")
    trace(one_step(policy), example_for(policy))
    with pytest.raises(ValueError, match="Expected parameter logits"):
        policy(th.full((1, 3), th.nan), policy.initial_state(1), th.ones(1))
