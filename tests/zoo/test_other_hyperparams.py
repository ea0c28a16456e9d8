"""Entries of RL Zoo's own files for A2C and RecurrentPPO train A3C, once what the errors name has been replaced."""

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3
import yaml  # type: ignore[import-untyped]
from rl_zoo3 import ALGOS
from rl_zoo3 import train as train_module

from sb3_a3c import A3C
from sb3_a3c.zoo.experiment_manager import A3CExperiment

OF_RL_ZOO = Path(rl_zoo3.__file__).parent / "hyperparams"


def leave_out_arguments(entry: dict[str, Any], error: str) -> None:
    for name in re.findall(r"`(\w+)`", error):
        del entry[name]


def leave_out_critic_lstm(entry: dict[str, Any], error: str) -> None:
    assert "enable_critic_lstm=True," in entry["policy_kwargs"]
    entry["policy_kwargs"] = entry["policy_kwargs"].replace("enable_critic_lstm=True,", "")


#: What the user types, for each error.
ADVICE: list[tuple[str, Callable[[dict[str, Any], str], None]]] = [
    (r"A3C has no (`\w+`(, )?)+\. Leave them out of .*\.yml and of -params\.", leave_out_arguments),
    (r"`enable_critic_lstm=True`, .* is not possible: .* Leave both out,", leave_out_critic_lstm),
]
pytestmark = [
    # Box2D's bindings, compiled by SWIG, crash where their warnings are errors
    pytest.mark.filterwarnings("ignore:builtin type [Ss]wig:DeprecationWarning"),
    # RL Zoo leaves the environments open if the model can't be made
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
PPO, CRITIC = "A3C has no `batch_size`, `clip_range`, `n_epochs`.", "`enable_critic_lstm=True`,"


@pytest.mark.parametrize(
    ("file", "name", "env", "expected"),
    [
        ("a2c", "CartPole-v1", "CartPole-v1", []),
        ("a2c", "LunarLander-v3", "LunarLander-v3", []),
        ("a2c", "LunarLanderContinuous-v3", "LunarLanderContinuous-v3", []),
        ("ppo_lstm", "CartPoleNoVel-v1", "CartPoleNoVel-v1", [PPO, CRITIC]),
        pytest.param("a2c", "atari", "PongNoFrameskip-v4", [], marks=pytest.mark.slow),
        # whole rollouts of 1,024 images and of 16,384 steps
        pytest.param("ppo_lstm", "atari", "PongNoFrameskip-v4", [PPO], marks=pytest.mark.slow),
        pytest.param(
            *("ppo_lstm", "LunarLanderNoVel-v2", "LunarLanderNoVel-v3", ["A3C has no `batch_size`, `n_epochs`.", CRITIC]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_entry(file: str, name: str, env: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / f"{file}.yml"
    options = [
        "--algo",
        "a3c",
        "--env",
        env,
        "--conf-file",
        str(config),
        "-f",
        str(tmp_path),
        "-n",
        "40",
        "--eval-freq",
        "-1",
    ]
    monkeypatch.setitem(ALGOS, "a3c", A3C)
    monkeypatch.setattr(train_module, "ExperimentManager", A3CExperiment)
    monkeypatch.setattr(sys, "argv", ["train", *options, "-params", "n_workers:0"])
    entry = yaml.safe_load((OF_RL_ZOO / f"{file}.yml").read_text())[name]
    errors: list[str] = []
    while True:
        config.write_text(yaml.dump({"atari" if name == "atari" else env: entry}))
        try:
            train_module.train()
            break
        except ValueError as error:
            message = str(error)
        gc.collect()
        (replace,) = (replace for pattern, replace in ADVICE if re.match(pattern, message))
        replace(entry, message.split("Leave")[0])
        errors.append(message)
    assert [error[: len(start)] for error, start in zip(errors, expected, strict=True)] == expected
    (model,) = (tmp_path / "a3c").glob(f"{env}_*/{env}.zip")
    assert A3C.load(model).num_timesteps >= 40
