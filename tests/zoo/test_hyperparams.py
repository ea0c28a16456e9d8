"""The file of hyper-parameters that comes with A3C: what each entry may say, and that it says where it is from."""

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
EACH = pytest.mark.parametrize("name", ENTRIES)

#: Keys that are not arguments of A3C: RL Zoo makes environments, wrappers and callbacks from them.
OF_RL_ZOO = {
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "normalize",
    "policy",
    "vec_env_wrapper",
}
#: What stands for an environment that has no entry of its own.
PLAYED_BY = {"atari": "PongNoFrameskip-v4", "default": "Acrobot-v1"}

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


@EACH
def test_an_entry_is_what_rl_zoo_reads(name: str) -> None:
    entry = ENTRIES[name]
    assert isinstance(entry, dict)
    arguments = inspect.signature(A3C.__init__).parameters.keys() - {"self", "env", "_init_setup_model"}
    assert entry.keys() <= arguments | OF_RL_ZOO
    assert {"policy", "n_timesteps"} <= entry.keys()
    assert entry["policy"] in A3C.policy_aliases
    assert entry["n_timesteps"] == int(entry["n_timesteps"]) > 0


@EACH
@pytest.mark.parametrize("key", ["policy_kwargs", "env_kwargs", "monitor_kwargs", "normalize"])
def test_nothing_is_to_be_evaluated(name: str, key: str) -> None:
    """RL Zoo calls `eval` on strings: ours are mappings of YAML."""
    assert isinstance(ENTRIES[name].get(key, {}), dict | bool if key == "normalize" else dict)


@EACH
def test_numbers_are_numbers(name: str) -> None:
    """`1e-3` is a string to YAML 1.1: it wants `!!float` or a dot. Schedules are strings."""
    for key, value in ENTRIES[name].items():
        if key == "learning_rate" and isinstance(value, str):
            assert re.fullmatch(r"lin_\d.*", value)
            assert float(value.removeprefix("lin_")) > 0
        elif isinstance(value, str):
            assert key in {"policy", "start_method", "env_wrapper", "vec_env_wrapper", "callback"}


@EACH
def test_no_worker_is_without_environment(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.get("n_envs", 1) >= (entry.get("n_workers") or 1)
    assert entry.get("n_envs", 1) >= 1


@EACH
def test_environments_exist(name: str) -> None:
    assert name in PLAYED_BY or name in gym.registry
    assert PLAYED_BY.get(name, name) in gym.registry


@EACH
def test_an_entry_says_what_it_reached(name: str) -> None:
    line = comment(name)
    assert bool(SCORE.match(line)) != bool(UNTUNED.match(line)), f"above {name}: {line!r}"


def test_atari_games_are_the_fast_ones() -> None:
    """Those that `make_ale_vec_env` makes, step for step."""
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
    options = ["--algo", "a3c", "--env", env, "-n", "3000", "--eval-freq", "-1", "-f", str(tmp_path)]
    command = [sys.executable, "-m", "sb3_a3c.zoo", "train", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    assert A3C.load(tmp_path / "a3c" / f"{env}_1" / f"{env}.zip").num_timesteps >= 3000
