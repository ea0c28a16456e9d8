"""What a training says of itself before its first step."""

import re
from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_a3c import A3C
from sb3_a3c.workers import assignment

HOW = ". One environment is not asynchronous: use A3C(…, n_workers=k), or make_vec_env(…, n_envs=k)"


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "n_cores", lambda: 3)


def first_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = re.findall(r"^A3C .*$", capsys.readouterr().out, re.MULTILINE)
    return str(line)


@pytest.mark.parametrize(
    ("n_envs", "kwargs", "expected"),
    [
        # each worker pushes twice in 20 steps of 8 environments: 2 / 160 of 1,000 timesteps
        (
            16,
            {"n_workers": 2},
            "A3C starts 2 workers on 3 cores, with 8 environments each: 12.5 updates per 1,000 timesteps",
        ),
        (
            5,
            {"n_workers": 2, "envs_per_update": 2},
            "A3C starts 2 workers on 3 cores, with 2 or 3 environments each: 30 updates",
        ),
        (3, {}, "A3C starts 3 workers on 3 cores, with 1 environment each: 50 updates"),
        (4, {"n_workers": 1, "n_steps": 10}, "A3C starts 1 worker on 3 cores, with 4 environments: 25 updates"),
        (1, {}, f"A3C starts 1 worker on 3 cores, with 1 environment: 50 updates per 1,000 timesteps{HOW}"),
        (4, {"n_workers": 0}, "A3C trains in this process (n_workers=0), with 4 environments: 12.5 updates"),
    ],
)
def test_one_line_before_the_first_step(
    n_envs: int, kwargs: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=n_envs), **kwargs, verbose=1)
    model.learn(1, log_interval=1000)
    assert first_line(capsys).startswith(expected)
    model.verbose = 0
    model.learn(1, log_interval=1000)
    assert "A3C" not in capsys.readouterr().out


def test_that_line_counts_the_updates(capsys: pytest.CaptureFixture[str]) -> None:
    env = make_vec_env("CartPole-v1", n_envs=5)
    # in turns, as workers with 3 and 2 environments make different numbers of updates per timestep
    model = A3C("MlpPolicy", env, envs_per_update=2, n_workers=2, take_turns=True, verbose=1)
    model.learn(1000, log_interval=1000)
    (told,) = re.findall(r"(\d+) updates", first_line(capsys))
    assert model._n_updates == pytest.approx(int(told) * model.num_timesteps / 1000, abs=2)


@pytest.mark.parametrize(
    ("kwargs", "differ"),
    [
        ({"n_workers": 2, "seed": 0}, True),
        ({"n_workers": 2}, False),
        ({"n_workers": 1, "seed": 0}, False),
        ({"n_workers": 2, "seed": 0, "take_turns": True}, False),
    ],
)
def test_runs_with_one_seed_differ(kwargs: dict[str, Any], differ: bool, capsys: pytest.CaptureFixture[str]) -> None:
    A3C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), verbose=1, **kwargs).learn(1, log_interval=1000)
    text = "two runs with seed=0 differ. Those with n_workers=1, or take_turns=True and no VecNormalize, are identical."
    assert capsys.readouterr().out.count(text) == differ
