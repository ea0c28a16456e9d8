"""
Returns, advantages and the objective of A3C: pure functions over one rollout.

The source is Algorithm S3 of the paper (Mnih et al. 2016, arXiv:1602.01783, supplementary material). Its lines, and
where each is:

=================================================================  ===============================================
``R = 0 for terminal s_t, V(s_t; θ'_v) otherwise``                 ``last_values``, ``dones`` of :func:`n_step_returns`
``for i ∈ {t-1, …, t_start}: R ← r_i + γR``                        :func:`n_step_returns`
``R - V(s_i; θ'_v)``                                               :func:`advantages_and_returns`
``dθ ← dθ + ∇_θ' log π(a_i|s_i; θ')(R - V(s_i; θ'_v))``            ``policy_loss`` of :func:`a3c_loss`
``dθ_v ← dθ_v + ∂(R - V(s_i; θ'_v))² / ∂θ'_v``                     ``value_loss`` of :func:`a3c_loss`
``β∇_θ' H(π(s_t; θ'))`` (section 4, below the algorithm)           ``entropy`` of :func:`a3c_loss`
=================================================================  ===============================================

Arrays over a rollout have the shape (n_steps, n_envs). ``dones[t]`` says that step t ended an episode, so what follows
it belongs to the next one and must not leak back.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]


def _discounted_sums(terms: FloatArray, dones: BoolArray, last: FloatArray, discount: float) -> FloatArray:
    """``y[t] = terms[t] + discount * y[t + 1]``, where ``y[n_steps] = last`` and an episode's end cuts the sum."""
    sums = np.empty_like(terms)
    running = last
    for t in reversed(range(len(terms))):
        running = terms[t] + discount * np.where(dones[t], 0.0, running).astype(terms.dtype)
        sums[t] = running
    return sums


def bootstrap_time_limits(rewards: FloatArray, terminal_values: FloatArray, gamma: float) -> FloatArray:
    """
    Time limits are not terminal states: where one cut an episode, add the discounted value of the state reached
    (Pardo et al. 2018, arXiv:1712.00378, section 3).

    :param terminal_values: (n_steps, n_envs), V of the last observation where a time limit ended the episode, else 0
    """
    assert rewards.shape == terminal_values.shape, (rewards.shape, terminal_values.shape)
    return rewards + gamma * terminal_values


def n_step_returns(rewards: FloatArray, dones: BoolArray, last_values: FloatArray, gamma: float) -> FloatArray:
    """
    Discounted returns, bootstrapped from the value of the state after the rollout (Algorithm S3, ``R ← r_i + γR``).
    With ``dones[-1]`` true everywhere these are REINFORCE's Monte-Carlo returns.

    :param last_values: (n_envs,), V of the state after the last step; ignored where that step ended an episode
    """
    assert rewards.ndim == 2 and rewards.shape == dones.shape, (rewards.shape, dones.shape)
    assert last_values.shape == rewards.shape[1:], (last_values.shape, rewards.shape)
    return _discounted_sums(rewards, dones, last_values, gamma)


def gae(
    rewards: FloatArray, values: FloatArray, dones: BoolArray, last_values: FloatArray, gamma: float, gae_lambda: float
) -> FloatArray:
    """
    Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, equation 16): the sums, discounted by
    ``gamma * gae_lambda``, of the TD errors ``r_t + γV(s_{t+1}) - V(s_t)``.

    :param values: (n_steps, n_envs), V of the states acted in
    :param last_values: (n_envs,), V of the state after the last step; ignored where that step ended an episode
    :param gae_lambda: 0 gives the one-step TD error, 1 gives ``n_step_returns - values``
    """
    assert rewards.ndim == 2 and rewards.shape == values.shape == dones.shape, (rewards.shape, values.shape, dones.shape)
    assert last_values.shape == rewards.shape[1:], (last_values.shape, rewards.shape)
    next_values = np.concatenate([values[1:], last_values[None]])
    td_errors = rewards + gamma * np.where(dones, 0.0, next_values).astype(rewards.dtype) - values
    return _discounted_sums(td_errors, dones, np.zeros_like(last_values), gamma * gae_lambda)


def advantages_and_returns(
    rewards: FloatArray, values: FloatArray, dones: BoolArray, last_values: FloatArray, gamma: float, gae_lambda: float
) -> tuple[FloatArray, FloatArray]:
    """
    The actor's advantages and the critic's targets; exactly Algorithm S3's when ``gae_lambda`` is 1. Parameters as in
    :func:`gae`.
    """
    if gae_lambda == 1.0:
        returns = n_step_returns(rewards, dones, last_values, gamma)
        return returns - values, returns
    advantages = gae(rewards, values, dones, last_values, gamma, gae_lambda)
    return advantages, advantages + values


class LossTerms(NamedTuple):
    """The objective and its parts: scalars, summed over time and averaged over environments."""

    loss: th.Tensor
    policy_loss: th.Tensor
    value_loss: th.Tensor
    entropy: th.Tensor


def a3c_loss(
    values: th.Tensor,
    log_prob: th.Tensor,
    entropy: th.Tensor | None,
    returns: th.Tensor,
    advantages: th.Tensor,
    ent_coef: float,
    vf_coef: float,
) -> LossTerms:
    """
    ``policy_loss + vf_coef * value_loss - ent_coef * entropy``: the policy gradient, half the squared error of the critic
    and the entropy bonus, summed over time as in the paper and averaged over environments.

    :param values: (n_steps, n_envs), V(s_t), with gradient
    :param log_prob: (n_steps, n_envs), log π(a_t | s_t), with gradient
    :param entropy: (n_steps, n_envs), H(π(s_t)), with gradient; None where the distribution has no analytical entropy,
        which is then estimated by ``-log_prob``
    :param returns: (n_steps, n_envs), the critic's targets
    :param ent_coef: β of the paper
    """
    if entropy is None:
        entropy = -log_prob
    shape = returns.shape
    assert returns.ndim == 2, shape
    assert values.shape == log_prob.shape == entropy.shape == advantages.shape == shape
    assert not returns.requires_grad and not advantages.requires_grad, "the targets are constants"

    policy_loss = -(advantages * log_prob).sum(dim=0).mean()
    value_loss = 0.5 * (returns - values).pow(2).sum(dim=0).mean()
    total_entropy = entropy.sum(dim=0).mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * total_entropy
    return LossTerms(loss, policy_loss, value_loss, total_entropy)
