"""The search space of RL Zoo's ``-optimize`` for A3C."""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params


def sample_a3c_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for A3C hyperparams, in RL Zoo's convention. Those that are not sampled stay as in the file; ``policy_kwargs``
    are replaced. The trial's user attribute "recurrent" says whether the policy has an LSTM of this package.
    """
    trial.suggest_int("n_steps_pow", 2, 7)
    trial.suggest_int("envs_per_update_pow", 0, max(n_envs.bit_length() - 1, 0))
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    one_minus_gae_lambda = trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.3, log=True)
    trial.suggest_float("learning_rate", 1e-5, 5e-3, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("vf_coef", 0.1, 1.0)
    # the loss is summed over the steps of a rollout, so norms are larger than A2C's
    trial.suggest_float("max_grad_norm", 0.5, 40.0, log=True)
    trial.suggest_categorical("normalize_advantage", [False, True])
    trial.suggest_categorical("net_arch", ["tiny", "small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])
    if trial.user_attrs["recurrent"]:
        trial.suggest_int("lstm_hidden_size_pow", 4, 8)
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("gae_lambda", 1 - one_minus_gae_lambda)
    return convert_a3c_params(trial.params)


def convert_a3c_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Convert a trial's values, as Optuna stores them, to keyword arguments for A3C."""
    hyperparams = convert_onpolicy_params(sampled_params)
    hyperparams["envs_per_update"] = 2 ** hyperparams.pop("envs_per_update_pow")
    if "lstm_hidden_size_pow" in hyperparams:
        hyperparams["policy_kwargs"]["lstm_hidden_size"] = 2 ** hyperparams.pop("lstm_hidden_size_pow")
    return hyperparams
