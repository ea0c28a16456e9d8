"""Entries of RL Zoo's own files for A2C and RecurrentPPO train A3C, once what the errors name has been replaced."""

import gc
import re
import sys
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


def follow(entry: dict[str, Any], error: str) -> set[str]:
    """Change an entry as the lines of an error say. Return the arguments that it names."""
    names = set()
    for line in error.splitlines()[1:]:
        if "`enable_critic_lstm=True`, " in line and "Leave both out" in line:
            assert "enable_critic_lstm=True," in entry["policy_kwargs"]
            entry["policy_kwargs"] = entry["policy_kwargs"].replace("enable_critic_lstm=True,", "")
            names.add("enable_critic_lstm")
        else:
            (name,) = re.findall(r"^`(\w+)`: leave it out", line)
            del entry[name]
            names.add(name)
    return names


pytestmark = [
    # entries for A2C have its default
    pytest.mark.filterwarnings("ignore:`max_grad_norm=0.5`:UserWarning"),
    # Box2D's bindings, compiled by SWIG, crash where their warnings are errors
    pytest.mark.filterwarnings("ignore:builtin type [Ss]wig:DeprecationWarning"),
    # RL Zoo leaves the environments open if the model can't be made
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
PPO = {"batch_size", "clip_range", "n_epochs"}


@pytest.mark.parametrize(
    ("file", "name", "env", "expected"),
    [
        ("a2c", "CartPole-v1", "CartPole-v1", set()),
        ("a2c", "LunarLander-v3", "LunarLander-v3", set()),
        ("a2c", "LunarLanderContinuous-v3", "LunarLanderContinuous-v3", set()),
        ("ppo_lstm", "CartPoleNoVel-v1", "CartPoleNoVel-v1", PPO | {"enable_critic_lstm"}),
        pytest.param("a2c", "atari", "PongNoFrameskip-v4", set(), marks=pytest.mark.slow),
        # whole rollouts of 1,024 images and of 16,384 steps
        pytest.param("ppo_lstm", "atari", "PongNoFrameskip-v4", PPO, marks=pytest.mark.slow),
        pytest.param(
            *("ppo_lstm", "LunarLanderNoVel-v2", "LunarLanderNoVel-v3", {"batch_size", "n_epochs", "enable_critic_lstm"}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_entry(file: str, name: str, env: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def run() -> None:
        config.write_text(yaml.dump({"atari" if name == "atari" else env: entry}))
        train_module.train()

    entry = yaml.safe_load((OF_RL_ZOO / f"{file}.yml").read_text())[name]
    if expected:
        with pytest.raises(ValueError, match=r"^These arguments are not possible in A3C:") as caught:
            run()
        assert follow(entry, str(caught.value)) == expected
        del caught
        gc.collect()  # here, where the files that RL Zoo has left open are forgiven
    run()
    (model,) = (tmp_path / "a3c").glob(f"{env}_*/{env}.zip")
    assert A3C.load(model).num_timesteps >= 40
