"""Arguments of LSTM policies that are impossible, most of them of sb3-contrib's recurrent policies."""

from collections.abc import Mapping
from typing import Any


def impossible(kwargs: Mapping[str, Any]) -> list[str]:
    """For each of the constructor's arguments that asks for something impossible, what to use instead."""
    shared_lstm, enable_critic_lstm = kwargs.get("shared_lstm"), kwargs.get("enable_critic_lstm")
    errors = []
    if enable_critic_lstm or (shared_lstm is not None and not shared_lstm and enable_critic_lstm is None):
        errors.append(
            "`enable_critic_lstm=True`, which is RecurrentPPO's default without `shared_lstm=True`, is not possible: "
            "A3C's critic has no LSTM of its own. Leave both out, or use `shared_lstm=True` alone, for one LSTM that "
            "learns from actor and critic; or `enable_critic_lstm=False` alone for a critic without memory."
        )
    if not kwargs.get("share_features_extractor", True):
        errors.append(
            "`share_features_extractor=False` is not possible with an LSTM: actor and critic share what comes before "
            "it. Leave it out, and use e.g. `net_arch=dict(pi=[64], vf=[64])` for separate layers after the LSTM."
        )
    lstm_kwargs = kwargs.get("lstm_kwargs") or {}
    wrong = [f"`{name}`" for name in ("bidirectional", "batch_first", "proj_size") if lstm_kwargs.get(name)]
    if wrong:
        errors.append(f"lstm_kwargs: {', '.join(wrong)}: not possible in a policy that acts step by step; leave it out.")
    if kwargs.get("forget_gate_bias") and not lstm_kwargs.get("bias", True):
        errors.append("`forget_gate_bias` is not possible in an LSTM without biases, `lstm_kwargs=dict(bias=False)`.")
    return errors
