"""Returns, advantages and the loss: by hand with gamma = 1/2, and by definition over random rollouts."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch as th

from sb3_a3c.actor_learner.loss import a3c_loss, advantages_and_returns, bootstrap_time_limits, gae, n_step_returns

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

NAN = float("nan")
SEEDS = pytest.mark.parametrize("seed", range(10))


def one_env(*steps: float) -> Floats:
    """A rollout of one environment, (n_steps, 1)"""
    return np.array(steps, dtype=np.float64)[:, None]


def ends(*steps: int) -> Bools:
    return np.array(steps, dtype=bool)[:, None]


def last(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def random_rollout(seed: int) -> tuple[Floats, Floats, Bools, Floats]:
    """Rewards, values, dones and last values of random sizes; integers, so that halving them is exact."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 12)), int(rng.integers(1, 5)))
    rewards, values = rng.integers(-8, 9, (2, *shape)).astype(np.float64)
    return rewards, values, rng.random(shape) < 0.3, rng.integers(-8, 9, shape[1]).astype(np.float64)


def td_errors(rewards: Floats, values: Floats, dones: Bools, last_values: Floats, gamma: float) -> Floats:
    """r_t + γV(s_{t+1}) - V(s_t), element by element."""
    errors = np.zeros_like(rewards)
    n_steps, n_envs = rewards.shape
    for t in range(n_steps):
        for env in range(n_envs):
            following = last_values[env] if t == n_steps - 1 else values[t + 1, env]
            errors[t, env] = rewards[t, env] + (0 if dones[t, env] else gamma * following) - values[t, env]
    return errors


def double_sum(terms: Floats, dones: Bools, discount: float) -> Floats:
    """The sum over k of discount^k * terms[t + k] until the episode ends."""
    sums = np.zeros_like(terms)
    n_steps, n_envs = terms.shape
    for env in range(n_envs):
        for t in range(n_steps):
            for k in range(n_steps - t):
                sums[t, env] += discount**k * terms[t + k, env]
                if dones[t + k, env]:
                    break
    return sums


def test_returns_by_hand() -> None:
    # three environments: no end; an end after the second step; an end after the last step, where the value is ignored
    rewards = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    dones = np.array([[False, False, False], [False, True, False], [False, False, True]])
    returns = n_step_returns(rewards, dones, last(8, 8, NAN), gamma=0.5)
    # 4 + 8/2 = 8, 2 + 8/2 = 6, 1 + 6/2 = 4; 2 and 1 + 2/2; 4, 2 + 4/2, 1 + 4/2
    assert returns.tolist() == [[4, 2, 3], [6, 2, 4], [8, 8, 4]]


def test_returns_do_not_leak_over_the_end_of_an_episode() -> None:
    returns = n_step_returns(one_env(1, 2, 4000), ends(0, 1, 0), last(NAN), gamma=0.5)
    assert returns[:2].tolist() == [[2], [2]]


@SEEDS
def test_returns_of_whole_episodes_are_discounted_sums(seed: int) -> None:
    rewards, _, dones, last_values = random_rollout(seed)
    dones[-1] = True
    returns = n_step_returns(rewards, dones, last_values * NAN, gamma=0.5)
    np.testing.assert_array_equal(returns, double_sum(rewards, dones, 0.5))


def test_a_time_limit_adds_the_discounted_value_of_the_last_state() -> None:
    rewards = bootstrap_time_limits(one_env(1, 2, 4), one_env(0, 6, 0), gamma=0.5)
    assert rewards.tolist() == [[1], [5], [4]]
    assert n_step_returns(rewards, ends(0, 1, 0), last(8), gamma=0.5).tolist() == [[3.5], [5], [8]]


def test_advantages_by_hand() -> None:
    rewards, values, dones, last_values = one_env(1, 2), one_env(2, 4), ends(0, 0), last(8)
    # TD errors: 1 + 4/2 - 2 = 1 and 2 + 8/2 - 4 = 2; with lambda 1/2: 1 + 2/4
    assert gae(rewards, values, dones, last_values, 0.5, 0.0).tolist() == [[1], [2]]
    assert gae(rewards, values, dones, last_values, 0.5, 0.5).tolist() == [[1.5], [2]]
    assert gae(rewards, values, dones, last_values, 0.5, 1.0).tolist() == [[2], [2]]
    advantages, returns = advantages_and_returns(rewards, values, dones, last_values, 0.5, 1.0)
    assert (advantages.tolist(), returns.tolist()) == ([[2], [2]], [[4], [6]])
    advantages, returns = advantages_and_returns(rewards, values, dones, last_values, 0.5, 0.5)
    assert (advantages.tolist(), returns.tolist()) == ([[1.5], [2]], [[3.5], [6]])


def test_advantages_do_not_leak_over_the_end_of_an_episode() -> None:
    rewards, values = one_env(1, 2, 4), one_env(2, 4, NAN)
    # TD errors of the first episode: 1 + 4/2 - 2 = 1 and 2 - 4 = -2; with lambda 1/2: 1 - 2/4
    advantages = gae(rewards, values, ends(0, 1, 0), last(NAN), 0.5, 0.5)
    assert advantages[:2].tolist() == [[0.5], [-2]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_advantages_ignore_the_last_value_of_a_terminal_state(gae_lambda: float) -> None:
    advantages = gae(one_env(1, 2), one_env(2, 4), ends(0, 1), last(NAN), 0.5, gae_lambda)
    assert advantages.tolist() == [[1 - gae_lambda], [-2]]


@SEEDS
def test_advantages_are_the_double_sum_of_the_definition(seed: int) -> None:
    rollout = random_rollout(seed)
    dones = rollout[2]
    exact = gae(*rollout, 0.5, 0.25)
    np.testing.assert_array_equal(exact, double_sum(td_errors(*rollout, 0.5), dones, 0.125))
    usual = gae(*rollout, 0.99, 0.95)
    np.testing.assert_allclose(usual, double_sum(td_errors(*rollout, 0.99), dones, 0.99 * 0.95), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.5, 1.0])
def test_inputs_are_left_alone_and_precision_is_kept(gae_lambda: float) -> None:
    rewards, values, dones, last_values = random_rollout(seed=1)
    inputs = rewards.astype(np.float32), values.astype(np.float32), dones, last_values.astype(np.float32)
    copies = tuple(array.copy() for array in inputs)
    outputs = advantages_and_returns(*inputs, 0.99, gae_lambda)
    assert [array.dtype for array in outputs] == [np.float32, np.float32]
    assert bootstrap_time_limits(inputs[0], inputs[1], 0.99).dtype == np.float32
    for array, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def tensors() -> dict[str, Any]:
    """2 steps of 2 environments; rows are steps"""
    return {
        "values": th.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
        "log_prob": th.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True),
        "entropy": th.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True),
        "returns": th.tensor([[2.0, 2.0], [1.0, 5.0]]),
        "advantages": th.tensor([[1.0, -1.0], [2.0, 0.0]]),
    }


def test_loss_by_hand() -> None:
    terms = a3c_loss(**tensors(), ent_coef=0.25, vf_coef=0.5)
    # -(1·-1 + 2·-3) = 7 and -(-1·-2 + 0·-4) = -2, on average 2.5
    assert terms.policy_loss.item() == 2.5
    # (1² + 2²) / 2 and (0² + 1²) / 2, on average 1.5
    assert terms.value_loss.item() == 1.5
    # 1 + 3 and 2 + 4
    assert terms.entropy.item() == 5
    # 2.5 + 1.5 / 2 - 5 / 4
    assert terms.loss.item() == 2
    assert all(term.shape == () for term in terms)


def test_gradients_by_hand() -> None:
    given = tensors()
    a3c_loss(**given, ent_coef=0.25, vf_coef=0.5).loss.backward()  # type: ignore[no-untyped-call]
    # each is divided by the number of environments, 2, and not by the number of steps
    assert given["log_prob"].grad.tolist() == [[-0.5, 0.5], [-1, 0]]  # -advantage / 2
    assert given["values"].grad.tolist() == [[-0.25, 0], [0.5, -0.25]]  # vf_coef · (value - return) / 2
    assert given["entropy"].grad.tolist() == [[-0.125, -0.125], [-0.125, -0.125]]  # -ent_coef / 2


def test_loss_is_summed_over_time_and_averaged_over_environments() -> None:
    once = tensors()
    twice_as_long = {name: tensor.repeat(2, 1) for name, tensor in once.items()}
    twice_as_wide = {name: tensor.repeat(1, 2) for name, tensor in once.items()}
    for term, longer, wider in zip(
        *(a3c_loss(**given, ent_coef=0.25, vf_coef=0.5) for given in (once, twice_as_long, twice_as_wide)), strict=True
    ):
        assert longer.item() == 2 * term.item()
        assert wider.item() == term.item()


def test_entropy_is_estimated_by_minus_the_log_probability() -> None:
    given = tensors()
    given["entropy"] = None
    terms = a3c_loss(**given, ent_coef=0.25, vf_coef=0.5)
    # 1 + 3 and 2 + 4
    assert terms.entropy.item() == 5
    assert terms.loss.item() == 2
    terms.loss.backward()  # type: ignore[no-untyped-call]
    assert given["log_prob"].grad.tolist() == [[-0.375, 0.625], [-0.875, 0.125]]  # (-advantage + ent_coef) / 2
