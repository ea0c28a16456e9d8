"""
The gradient of a worker against a per-step loop over autograd, on Pong.

The loop is written from the paper alone: it uses nothing of ``actor_learner.loss``, goes through a rollout one step and one
environment at a time, and computes the LSTM cell from its equations.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_atari_env

from sb3_a3c import A3C
from sb3_a3c.actor_learner.acting import Rollout
from sb3_a3c.actor_learner.actor_learner import ActorLearner
from sb3_a3c.actor_learner.loss import LossTerms

N_ENVS, N_STEPS, GAMMA, ENT_COEF, VF_COEF = 2, 20, 0.99, 0.003, 0.5


class EndsOften(gym.Wrapper[Any, Any, Any, Any]):
    """Ends episodes after 7, 18, 29, … steps, alternately by a time limit and in a terminal state."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.n_steps = self.n_episodes = 0

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.n_steps += 1
        if self.n_steps % 11 == 7:
            self.n_episodes += 1
            terminated, truncated = self.n_episodes % 2 == 0, self.n_episodes % 2 == 1
        return obs, float(reward) + 0.1 * (self.n_steps % 3), terminated, truncated, info


def features(policy: Any, obs: np.ndarray, dtype: th.dtype) -> th.Tensor:
    """One observation (1, 84, 84) -> (features,)"""
    x = (th.from_numpy(np.ascontiguousarray(obs)).float() / 255).to(dtype)[None]
    for layer in policy.features_extractor.cnn:
        x = layer(x)
    return x[0]


def lstm_cell(lstm: Any, x: th.Tensor, h: th.Tensor, c: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The equations of an LSTM cell, on vectors."""
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
    i, f, g, o = gates.chunk(4)
    c = th.sigmoid(f) * c + th.sigmoid(i) * th.tanh(g)
    return th.sigmoid(o) * th.tanh(c), c


def loss_of_one_environment(policy: Any, rollout: Rollout, env: int, dtype: th.dtype) -> th.Tensor:
    obs = rollout.obs
    assert isinstance(obs, np.ndarray)
    h, c = (part[0, env].detach() for part in rollout.first_state)
    log_probs, entropies, values, cut_values = [], [], [], []
    for t in range(N_STEPS):
        if rollout.episode_starts[t, env]:
            h, c = th.zeros_like(h), th.zeros_like(c)
        h, c = lstm_cell(policy.lstm, features(policy, obs[t, env], dtype), h, c)
        logits = policy.action_net.weight @ h + policy.action_net.bias
        log_pi = logits - th.logsumexp(logits, 0)
        log_probs.append(log_pi[int(rollout.actions[t, env])])
        entropies.append(-(log_pi.exp() * log_pi).sum())
        values.append((policy.value_net.weight @ h + policy.value_net.bias)[0])
        info = rollout.infos[t][env]
        if rollout.dones[t, env] and info["TimeLimit.truncated"]:
            last = lstm_cell(policy.lstm, features(policy, info["terminal_observation"], dtype), h, c)[0]
            cut_values.append((policy.value_net.weight @ last + policy.value_net.bias)[0].item())
        else:
            cut_values.append(0.0)
    last = lstm_cell(policy.lstm, features(policy, rollout.last_obs[env], dtype), h, c)[0]  # type: ignore[index]
    ret = (policy.value_net.weight @ last + policy.value_net.bias)[0].item()
    loss = th.zeros((), dtype=dtype)
    for t in reversed(range(N_STEPS)):
        if rollout.dones[t, env]:
            ret = cut_values[t]
        ret = float(rollout.rewards[t, env]) + GAMMA * ret
        advantage = ret - values[t].item()
        loss = loss - log_probs[t] * advantage + VF_COEF * 0.5 * (ret - values[t]) ** 2 - ENT_COEF * entropies[t]
    return loss


@pytest.fixture
def learner(request: pytest.FixtureRequest) -> ActorLearner:
    """A worker whose policy has the precision of the test's parameter."""
    env = make_atari_env("PongNoFrameskip-v4", n_envs=N_ENVS, seed=3, wrapper_kwargs={"noop_max": 5})
    env.envs = [EndsOften(single) for single in env.envs]  # type: ignore[attr-defined]
    model = A3C("CnnLstmPolicy", env, n_workers=0, seed=3, envs_per_update=N_ENVS, gamma=GAMMA, vf_coef=VF_COEF)
    with th.no_grad():  # a head like that of a trained policy: the initial one is nearly uniform
        next(model.policy.action_net.parameters()).mul_(100)
    model.policy = model.policy.to(request.param)
    learners = []
    init = ActorLearner.__init__

    def init_and_record(self: ActorLearner, *args: Any) -> None:
        init(self, *args)
        learners.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActorLearner, "__init__", init_and_record)
        model.learn(1)
    return learners[0]


@pytest.mark.parametrize(("learner", "bound"), [(th.float64, 1e-9), (th.float32, 1e-4)], indirect=["learner"])
def test_gradient(
    learner: ActorLearner, bound: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: list[dict[str, th.Tensor]] = []
    parameters = dict(learner.policy.named_parameters())
    compute = ActorLearner._compute_gradient

    def compute_and_record(self: ActorLearner, *args: Any) -> LossTerms:
        terms = compute(self, *args)
        recorded.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        return terms

    monkeypatch.setattr(ActorLearner, "_compute_gradient", compute_and_record)
    monkeypatch.setattr(learner, "should_stop", lambda: False)
    worst, n_ends_inside = 0.0, 0
    for _ in range(4):
        learner.replica.pull()
        rollout = learner._act()
        assert rollout is not None
        n_ends_inside += int(rollout.dones[:-1].sum())
        dtype = parameters["value_net.weight"].dtype
        losses = [loss_of_one_environment(learner.policy, rollout, env, dtype) for env in range(N_ENVS)]
        expected = th.autograd.grad(sum(losses) / N_ENVS, list(parameters.values()))  # type: ignore[arg-type]
        learner._learn(rollout)  # also takes a step, so that each rollout has other parameters
        for name, reference in zip(parameters, expected, strict=True):
            error = float((recorded[-1][name] - reference).norm() / reference.norm())
            worst = max(worst, error)
            assert error <= bound, (name, error)
    assert n_ends_inside >= 10
    with capsys.disabled():
        print(f"\nlargest relative L2 error of a parameter's gradient: {worst:.1e} ({n_ends_inside} ends in mid-rollout)")
