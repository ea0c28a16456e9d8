"""Programs as users write them: without a guard, from standard input, from a notebook's cell; and the Atari example."""

import subprocess
import sys
from pathlib import Path

import pytest
from stable_baselines3.common.monitor import load_results

from sb3_a3c import A3C

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_atari.py"

SCRIPT = """
import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from sb3_a3c import A3C

class Doubled(gym.RewardWrapper):  # lives in __main__, travels to the workers by value
    def reward(self, reward):
        return SCALE * reward

SCALE = 2.0
env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=Doubled)
rewards = []
def note(local_variables, _):
    rewards.extend(local_variables["rewards"])
    return True

model = A3C("MlpLstmPolicy", env, n_workers=2, learning_rate=lambda progress: 1e-3 * progress)
model.learn(200, callback=note)
print("rewards", set(rewards), "timesteps", model.num_timesteps)
"""


def run(command: list[str], folder: Path, stdin: str | None = None, timeout: int = 120) -> str:
    result = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("how", ["file", "stdin", "cell"])
def test_no_main_guard_is_needed(how: str, tmp_path: Path) -> None:
    if how == "file":
        (tmp_path / "script.py").write_text(SCRIPT)
        output = run([sys.executable, "script.py"], tmp_path)
    elif how == "stdin":
        output = run([sys.executable, "-"], tmp_path, stdin=SCRIPT)
    else:  # an interactive __main__ without a file, as a notebook's
        output = run([sys.executable, "-c", SCRIPT], tmp_path)
    assert output.count("rewards") == 1  # the script ran once
    assert "rewards {np.float32(2.0)} timesteps 200" in output.replace("200.0", "200")


def test_spawn_needs_no_main_guard_either(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("n_workers=2,", 'n_workers=2, start_method="spawn",'))
    assert run([sys.executable, "script.py"], tmp_path).count("rewards") == 1


def test_train_atari_trains_resumes_and_records(tmp_path: Path) -> None:
    options = ["--env", "PongNoFrameskip-v4", "--n-envs", "4", "--save-freq", "400", "--eval-freq", "100000", "--seed", "1"]
    command = [sys.executable, str(EXAMPLE), *options]
    folder = tmp_path / "logs" / "PongNoFrameskip-v4"

    output = run([*command, "--timesteps", "1000"], tmp_path)
    assert "%" in output  # the progress bar
    first = A3C.load(folder / "model.zip")
    assert 1000 <= first.num_timesteps <= 1080
    assert len(list(folder.glob("*.monitor.csv"))) == 4
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"a3c_400_steps.zip", "a3c_800_steps.zip"}
    assert list(folder.glob("A3C_*/events.*"))
    load_results(str(folder))

    run([*command, "--timesteps", "2000", "--resume"], tmp_path)
    second = A3C.load(folder / "model.zip")
    assert 2000 <= second.num_timesteps <= 2080
    assert second._n_updates > first._n_updates
    steps = [float(state["step"]) for state in second.policy.optimizer.state.values()]
    assert all(step > first._n_updates * 0.9 for step in steps)  # went on from the saved moments (Hogwild may lose a few)

    output = run([*command, "--record", "game.gif"], tmp_path)
    assert (tmp_path / "game.gif").stat().st_size > 10_000
    assert "steps in game.gif" in output


def test_train_atari_says_what_to_do_without_a_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--play"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "train one first" in result.stderr
