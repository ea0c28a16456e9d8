"""The hyperparameters that come with A3C: each entry is one that RL Zoo and A3C accept, and says what it has reached."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401
import yaml  # type: ignore[import-untyped]
from rl_zoo3 import create_test_env

from sb3_a3c import A3C
from sb3_a3c.atari import make_ale_vec_env
from sb3_a3c.zoo.experiment_manager import HYPERPARAMS

TEXT = HYPERPARAMS.read_text()
ENTRIES: dict[str, Any] = yaml.safe_load(TEXT)

#: Keys that are not arguments of A3C: RL Zoo makes environments, wrappers and callbacks from them.
OF_RL_ZOO = {"callback", "env_kwargs", "env_wrapper", "frame_stack", "monitor_kwargs", "n_envs", "n_timesteps", "normalize"}
OF_RL_ZOO |= {"policy", "vec_env_wrapper"}
#: An environment for each entry that is not named after one.
PLAYED_BY = {"atari": "PongNoFrameskip-v4", "default": "Acrobot-v1"}

#: Environments that the lowest gymnasium that setup.cfg admits does not have.
NEWER = {"CliffWalking-v1", "CliffWalkingSlippery-v1"}

SCORE = re.compile(r"# Score: -?[\d,]+(\.\d+)? .*\b[\d,]+(\.\d+)?[kM]? steps\b")
UNTUNED = re.compile(r"# Untuned\b")


def comment(name: str) -> str:
    """The line above an entry."""
    lines = TEXT.splitlines()
    (number,) = (number for number, line in enumerate(lines) if re.match(rf"['\"]?{re.escape(name)}['\"]?:", line))
    return lines[number - 1] if number else ""


UNTUNED_ENTRIES = [name for name in ENTRIES if not SCORE.match(comment(name))]


def test_the_file_is_a_mapping_without_duplicates() -> None:
    names = re.findall(r"^['\"]?([^\s#'\":]+)['\"]?:", TEXT, flags=re.MULTILINE)  # YAML would keep the last of the same name
    assert names == list(ENTRIES)
    assert names


@pytest.mark.parametrize("name", ENTRIES)
def test_entry(name: str) -> None:
    entry = ENTRIES[name]
    arguments = inspect.signature(A3C.__init__).parameters.keys() - {"self", "env", "_init_setup_model"}
    assert entry.keys() <= arguments | OF_RL_ZOO
    assert PLAYED_BY.get(name, name) in gym.registry or name in NEWER
    assert entry["policy"] in A3C.policy_aliases
    assert entry["n_timesteps"] == int(entry["n_timesteps"]) > 0
    assert entry.get("n_envs", 1) >= (entry.get("n_workers") or 1)
    # RL Zoo calls `eval` on strings
    assert isinstance(entry.get("normalize", {}), dict | bool)
    assert all(isinstance(entry.get(key, {}), dict) for key in ("policy_kwargs", "env_kwargs", "monitor_kwargs"))
    # YAML 1.1 takes `1e-3` for a string: it needs `!!float` or a dot
    strings = {key: value for key, value in entry.items() if isinstance(value, str)}
    assert strings.keys() <= {"policy", "start_method", "env_wrapper", "vec_env_wrapper", "callback", "learning_rate"}
    assert float(strings.get("learning_rate", "lin_1").removeprefix("lin_")) > 0
    line = comment(name)
    assert bool(SCORE.match(line)) != bool(UNTUNED.match(line)), f"above {name}: {line!r}"


def test_atari_games_are_those_of_make_ale_vec_env() -> None:
    entry = ENTRIES["atari"]
    arguments: Any = dict(n_envs=1, seed=3)
    ours: Any = create_test_env(
        "PongNoFrameskip-v4",
        **arguments,
        should_render=False,
        hyperparams={"env_wrapper": entry["env_wrapper"]},
        env_kwargs=entry["env_kwargs"],
    )
    fast: Any = make_ale_vec_env("PongNoFrameskip-v4", **arguments)
    assert np.array_equal(ours.reset(), fast.reset())
    generator = np.random.default_rng(0)
    for _ in range(300):
        action = generator.integers(6, size=1)
        (obs, *rest, info), (fast_obs, *fast_rest, fast_info) = ours.step(action), fast.step(action)
        assert np.array_equal(obs, fast_obs)
        assert rest == fast_rest
        assert info[0].keys() == fast_info[0].keys()
    ours.close()
    fast.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", UNTUNED_ENTRIES)
def test_untuned_entries_train(name: str, tmp_path: Path) -> None:
    env = PLAYED_BY.get(name, name)
    if env not in gym.registry:
        pytest.skip(f"this gymnasium has no {env}")
    options = ["--env", env, "-n", "3000", "--eval-freq", "-1", "-f", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_a3c.zoo", "train", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    assert A3C.load(tmp_path / "a3c" / f"{env}_1" / f"{env}.zip").num_timesteps >= 3000
