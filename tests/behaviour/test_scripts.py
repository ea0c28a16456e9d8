"""Scripts without an ``if __name__ == "__main__":`` guard, from a file, from standard input or a notebook's cell."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

class Doubled(gym.RewardWrapper):  # in __main__, so workers get it by value
    def reward(self, reward):
        return SCALE * reward

SCALE = 2.0
env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=Doubled)
rewards = []
def note(local_variables, _):
    rewards.extend(local_variables["rewards"])
    return True

model = A3C("MlpLstmPolicy", env, n_workers=2, start_method=START_METHOD, learning_rate=lambda progress: 1e-3 * progress)
model.learn(200, callback=note)
print("rewards", set(rewards), "timesteps", model.num_timesteps)
"""


@pytest.mark.parametrize(
    ("how", "start_method"),
    [
        pytest.param("file", "spawn", marks=pytest.mark.slow),
        ("stdin", "forkserver"),
        pytest.param("file", "forkserver", marks=pytest.mark.slow),
        pytest.param("cell", "forkserver", marks=pytest.mark.slow),
    ],
)
def test_no_main_guard_is_needed(how: str, start_method: str, tmp_path: Path) -> None:
    script = SCRIPT.replace("START_METHOD", repr(start_method))
    (tmp_path / "script.py").write_text(script)
    # with -c, __main__ has no file, like a notebook's
    arguments = {"file": ["script.py"], "stdin": ["-"], "cell": ["-c", script]}[how]
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        input=script if how == "stdin" else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    assert output.count("rewards") == 1  # the script ran once
    assert "rewards {np.float32(2.0)} timesteps 200" in output
