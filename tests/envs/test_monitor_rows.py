"""Shares without monitor files, whose rows the main process writes."""

from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from sb3_a3c.envs.monitor_rows import MonitorRows
from sb3_a3c.envs.sharding import split_env
from sb3_a3c.envs.wrapper_state import FirstReset
from tests.toy_envs import Countdown


@pytest.mark.parametrize("kind", ["Monitor", "VecMonitor"])
def test_the_users_files_get_the_rows_of_all_shares(kind: str, tmp_path: Path) -> None:
    def single(i: int) -> Any:
        env = Countdown([3 + i])
        return Monitor(env, str(tmp_path / str(i)), info_keywords=("number",)) if kind == "Monitor" else env

    env: VecEnv = DummyVecEnv([lambda i=i: single(i) for i in range(3)])  # type: ignore[misc]
    if kind == "VecMonitor":
        env = VecMonitor(env, str(tmp_path / "all"))
    indices = [(0, 1), (2,)]
    rows = MonitorRows(env)
    expected = []
    for mine, share in zip(indices, split_env(env, indices, FirstReset((1, 2, 3), ({},) * 3), False), strict=True):
        theirs = share.open()
        theirs.reset()
        for _ in range(8):
            _, _, _, infos = theirs.step([0] * len(mine))  # type: ignore[arg-type]
            expected += [info["episode"]["r"] for info in infos if "episode" in info]
            rows.write(mine, [infos])
        theirs.close()
    env.close()
    written = load_results(str(tmp_path))
    assert sorted(written["r"]) == sorted(expected) == [3, 3, 4, 4, 5]
    assert (kind == "Monitor") == ("number" in written)
