"""Stable-Baselines3's callbacks: in this process, with workers, and with workers on a SubprocVecEnv."""

import csv
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_a3c import A3C

N_ENVS, N_STEPS = 4, 5  # two workers report 10 transitions at a time, so the last row may be incomplete
PER_UPDATE = 2 * N_STEPS  # transitions that an update learns from

# SB3 warns if the evaluation environment is no SubprocVecEnv when the training environment is one
OTHER_TYPE_FOR_EVALUATION = pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type:UserWarning")


@dataclass(frozen=True)
class Setup:
    """Four CartPoles, and the number of workers that train on them."""

    n_workers: int
    env: VecEnv
    folder: Path  #: of the monitor files

    def model(self, **kwargs: Any) -> A3C:
        return A3C("MlpPolicy", self.env, envs_per_update=2, n_workers=self.n_workers, **{"n_steps": N_STEPS, **kwargs})

    def episodes(self) -> Counter[tuple[float, ...]]:
        """Return, length and time of all episodes in the monitor files."""
        found: Counter[tuple[float, ...]] = Counter()
        for path in self.folder.glob("*.monitor.csv"):
            with path.open() as file:
                found.update(tuple(map(float, row)) for row in itertools.islice(csv.reader(file), 2, None))
        return found


@pytest.fixture(scope="module")
def subproc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VecEnv, Path]]:
    """Shared by all tests of this file, because its processes take seconds to start."""
    folder = tmp_path_factory.mktemp("subproc")
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, monitor_dir=str(folder), vec_env_cls=SubprocVecEnv)
    yield env, folder
    env.close()


ALL_SETUPS = pytest.mark.parametrize("setup", ["in-process", "workers", "subproc"], indirect=True)


@pytest.fixture(params=["in-process", "workers"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Setup]:
    if request.param == "subproc":
        yield Setup(2, *request.getfixturevalue("subproc"))
        return
    folder = tmp_path / "monitor"
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, monitor_dir=str(folder))
    yield Setup(0 if request.param == "in-process" else 2, env, folder)
    env.close()


class Recorder(BaseCallback):
    """Notes what it sees; returns False at call number ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.events = ""  # S(...)(...)E: training starts, rollouts with their steps, training ends
        self.timesteps: list[int] = []
        self.n_dones: list[int] = []
        self.episodes: Counter[tuple[float, ...]] = Counter()

    def _on_training_start(self) -> None:
        self.events += "S"

    def _on_rollout_start(self) -> None:
        self.events += "("

    def _on_step(self) -> bool:
        self.events += "."
        self.timesteps.append(self.num_timesteps)
        self.n_dones.append(int(np.sum(self.locals["dones"])))
        ended = [info["episode"] for info in self.locals["infos"] if "episode" in info]
        self.episodes.update((e["r"], e["l"], e["t"]) for e in ended)
        return self.n_calls != self.stop_at

    def _on_rollout_end(self) -> None:
        self.events += ")"

    def _on_training_end(self) -> None:
        self.events += "E"


def weights(model: Any) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def episodes_of(model: A3C) -> Counter[tuple[float, ...]]:
    """Return, length and time of all episodes that the model has counted."""
    assert model.ep_info_buffer is not None
    return Counter((e["r"], e["l"], e["t"]) for e in model.ep_info_buffer)


# --- calls and counts -----------------------------------------------------------------------------------------------


@ALL_SETUPS
def test_calls_timesteps_updates_and_episodes_are_counted_exactly(setup: Setup) -> None:
    recorder = Recorder()
    model = setup.model(stats_window_size=10_000)
    before = setup.episodes()
    model.learn(1002, recorder)  # two workers: 101 reports, and half a row at the end
    assert 1002 <= model.num_timesteps < 1002 + PER_UPDATE * 2
    assert recorder.n_calls == model.num_timesteps // N_ENVS
    assert recorder.timesteps == [N_ENVS * (call + 1) for call in range(recorder.n_calls)]
    assert model._n_updates * PER_UPDATE == model.num_timesteps
    # every rollout has n_steps calls but the last, which waits for the workers to finish
    assert re.fullmatch(rf"S(\(\.{{{N_STEPS}}}\))+\(\.+\)E", recorder.events), recorder.events

    # each episode of the monitor files was counted, and all but those in an incomplete last row were seen
    played = setup.episodes() - before
    assert played.total() > 20
    assert played == episodes_of(model)
    assert recorder.episodes <= played
    assert (played - recorder.episodes).total() <= model.num_timesteps % N_ENVS
    assert sum(recorder.n_dones) == recorder.episodes.total()

    # a second call of learn continues counting, a third one resets
    n_first, n_updates, recorder = model.num_timesteps, model._n_updates, Recorder()
    model.learn(402, recorder, reset_num_timesteps=False)
    n_new = model.num_timesteps - n_first
    assert 402 <= n_new < 402 + PER_UPDATE * 2
    assert recorder.timesteps == [n_first + N_ENVS * (call + 1) for call in range(n_new // N_ENVS)]
    assert model._n_updates - n_updates == n_new // PER_UPDATE
    assert setup.episodes() - before == episodes_of(model)
    recorder = Recorder()
    model.learn(402, recorder)
    assert recorder.timesteps == [N_ENVS * (call + 1) for call in range(recorder.n_calls)]
    assert 402 <= model.num_timesteps < 402 + PER_UPDATE * 2


def test_locals_are_those_of_an_on_policy_algorithm(setup: Setup) -> None:
    n_steps: list[int] = []

    class Look(BaseCallback):
        def _on_training_start(self) -> None:
            assert self.locals["self"] is model
            assert self.locals["total_timesteps"] == 402

        def _on_step(self) -> bool:
            found = self.locals
            n_steps.append(found["n_steps"])
            assert found["self"] is model is self.model
            assert found["env"] is model.env is self.training_env
            assert found["callback"] is look
            assert found["total_timesteps"] == 402
            assert found["tb_log_name"] == "mine"
            assert found["rewards"].shape == found["dones"].shape == found["actions"].shape == (N_ENVS,)
            assert found["rewards"].tolist() == [1.0] * N_ENVS
            assert found["dones"].dtype == bool
            assert set(found["actions"].tolist()) <= {0, 1}
            assert found["new_obs"].shape == (N_ENVS, 4)
            assert np.isfinite(found["new_obs"]).all()
            assert len(found["infos"]) == N_ENVS
            assert [("episode" in info) for info in found["infos"]] == found["dones"].tolist()
            return True

    look, model = Look(), setup.model()
    model.learn(402, look, tb_log_name="mine")
    assert look.n_calls > 100
    # the number of the call in its rollout; the last rollout may be longer
    assert n_steps[:100] == [call % N_STEPS for call in range(100)]


@ALL_SETUPS
def test_no_callback_is_called_after_one_returned_false(setup: Setup) -> None:
    before, stop, nested, after = Recorder(), Recorder(stop_at=12), Recorder(), Recorder()
    model = setup.model()
    model.learn(100_000, [before, stop, CallbackList([nested]), after])
    for callback in (before, stop, nested, after):
        assert callback.timesteps == [N_ENVS * (call + 1) for call in range(12)]
        assert callback.events == "S(.....)(.....)(..E"  # as in A2C, no on_rollout_end after False
        assert callback.episodes == before.episodes
    assert 12 * N_ENVS <= model.num_timesteps < 100_000
    assert model._n_updates * PER_UPDATE == model.num_timesteps


def test_transitions_made_after_false_are_counted(setup: Setup) -> None:
    stop, model = Recorder(stop_at=1), setup.model(n_steps=50)
    before = setup.episodes()
    model.learn(100_000, stop)
    assert stop.n_calls == 1
    assert model.num_timesteps >= 4 * 50  # each worker has reported at least once
    assert model._n_updates * 2 * 50 == model.num_timesteps
    # of 50 steps in each environment the callback has seen the first; a rollout that has begun is dropped
    counted, played = episodes_of(model), setup.episodes() - before
    assert counted
    assert counted <= played
    if setup.n_workers == 0:
        assert counted == played


def test_a_function_as_callback(setup: Setup) -> None:
    timesteps: list[int] = []

    def note(local: dict[str, Any], global_: dict[str, Any]) -> bool:
        assert "__name__" in global_
        timesteps.append(local["self"].num_timesteps)
        return len(timesteps) < 13

    setup.model().learn(10_000, note)
    assert timesteps == [N_ENVS * (call + 1) for call in range(13)]


def test_after_an_exception_in_a_callback_the_model_has_what_was_learned(setup: Setup) -> None:
    def fail(*_: Any) -> bool:
        assert th.equal(weights(model), initial)  # refreshed only at the end of a rollout
        raise ZeroDivisionError

    model = setup.model()
    initial = weights(model)
    with pytest.raises(ZeroDivisionError):
        model.learn(10_000, fail)
    assert N_ENVS <= model.num_timesteps < 10_000
    assert model._n_updates * PER_UPDATE == model.num_timesteps
    assert not th.equal(weights(model), initial)
    assert th.isfinite(weights(model)).all()
    # the next training continues from there
    n_before, recorder = model.num_timesteps, Recorder()
    model.learn(100, recorder, reset_num_timesteps=False)
    assert recorder.timesteps == [n_before + N_ENVS * (call + 1) for call in range(recorder.n_calls)]
    assert n_before + 100 <= model.num_timesteps


# --- CheckpointCallback ---------------------------------------------------------------------------------------------


def test_checkpoints(setup: Setup, tmp_path: Path) -> None:
    seen: dict[int, th.Tensor] = {}

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 100 == 0:
                seen[self.num_timesteps] = weights(self.model)
            return True

    folder = tmp_path / "checkpoints"
    checkpoints = CheckpointCallback(save_freq=100, save_path=str(folder), name_prefix="a3c")
    setup.model().learn(1200, [checkpoints, Look()])
    assert {path.name for path in folder.iterdir()} == {f"a3c_{n}_steps.zip" for n in (400, 800, 1200)}
    for n_timesteps, expected in seen.items():
        loaded = A3C.load(folder / f"a3c_{n_timesteps}_steps", env=setup.env)
        assert loaded.num_timesteps == n_timesteps
        assert th.equal(weights(loaded), expected)
        assert loaded._n_updates > 0
        optimizer = loaded.policy.optimizer
        assert len(optimizer.state) == len(list(loaded.policy.parameters()))
        for state in optimizer.state.values():
            assert state["step"] > 0
            assert state["exp_avg"].any()
            assert state["exp_avg_sq"].any()
    assert not th.equal(seen[400], seen[800])
    loaded.learn(100, reset_num_timesteps=False)  # the last one
    assert 1300 <= loaded.num_timesteps < 1300 + PER_UPDATE * 2


@OTHER_TYPE_FOR_EVALUATION
def test_vec_normalize_in_checkpoints_and_evaluations(setup: Setup, tmp_path: Path) -> None:
    env = VecNormalize(setup.env)
    evaluation_env = VecNormalize(make_vec_env("CartPole-v1"), training=False, norm_reward=False)
    seen: list[int] = []
    # workers may be ahead of the callbacks by four rollouts and the current one; each reset counts too
    n_ahead = N_ENVS * (1 + N_STEPS * (5 if setup.n_workers else 1))

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 50 == 0:
                saved = VecNormalize.load(str(tmp_path / f"rl_model_vecnormalize_{self.num_timesteps}_steps.pkl"), env.venv)
                for statistics in (saved.obs_rms, evaluation_env.obs_rms, env.obs_rms):
                    assert not isinstance(statistics, dict)
                    assert self.num_timesteps <= statistics.count < self.num_timesteps + n_ahead + 1
                    assert not isinstance(env.obs_rms, dict)
                    assert statistics.mean.tolist() == env.obs_rms.mean.tolist() != [0, 0, 0, 0]
                    assert statistics.var.tolist() == env.obs_rms.var.tolist()
                assert saved.ret_rms.mean == env.ret_rms.mean
                seen.append(self.num_timesteps)
            return True

    checkpoints = CheckpointCallback(save_freq=50, save_path=str(tmp_path), save_vecnormalize=True)
    evaluation = EvalCallback(evaluation_env, eval_freq=50, n_eval_episodes=1, verbose=0)
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, n_workers=setup.n_workers)
    model.learn(600, [checkpoints, evaluation, Look()])
    assert seen == [200, 400, 600]
    kinds = {f"rl_model_{kind}_steps" for n in seen for kind in (f"{n}", f"vecnormalize_{n}")}
    assert {path.stem for path in tmp_path.glob("rl_model_*")} == kinds
    evaluation_env.close()


# --- EvalCallback and its children ----------------------------------------------------------------------------------


class Script(gym.Env[npt.NDArray[np.float32], np.int64]):
    """Episodes of 3 steps whose returns are given; notes the weights of the model that plays them."""

    def __init__(self, returns: Sequence[float], model: A3C | None = None) -> None:
        cartpole = gym.make("CartPole-v1")
        self.observation_space, self.action_space = cartpole.observation_space, cartpole.action_space
        self.returns = iter(returns)
        self.model = model
        self.weights: list[th.Tensor] = []
        self.n_steps = 0

    def reset(self, **_: Any) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        self.n_steps = 0
        return np.zeros(4, dtype=np.float32), {}

    def step(self, _: np.int64) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        if self.model is not None:
            self.weights.append(weights(self.model))
            time.sleep(0.005)  # the workers learn meanwhile
        is_last = self.n_steps == 3
        return np.zeros(4, dtype=np.float32), next(self.returns) if is_last else 0.0, is_last, False, {}


class Dumps(KVWriter):
    """What was logged: for each dump its step and values."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


@ALL_SETUPS
@OTHER_TYPE_FOR_EVALUATION
def test_the_best_model_is_the_one_that_was_evaluated(setup: Setup, tmp_path: Path) -> None:
    model, dumps = setup.model(learning_rate=1e-3), Dumps()
    model.set_logger(Logger(None, [dumps]))
    script = Script([3.0, 1.0, 4.0, 1.0, 5.0], model)
    bests: list[tuple[int, float]] = []
    scores: list[float] = []

    class OnNewBest(BaseCallback):
        def _on_step(self) -> bool:
            assert isinstance(self.parent, EvalCallback)
            bests.append((self.num_timesteps, self.parent.best_mean_reward))
            saved = A3C.load(tmp_path / "best" / "best_model")
            assert saved.num_timesteps == self.num_timesteps
            for scored in script.weights[-3:]:
                assert th.equal(weights(saved), scored)
            assert th.equal(weights(self.model), scored)
            return True

    class AfterEvaluation(BaseCallback):
        def _on_step(self) -> bool:
            assert isinstance(self.parent, EvalCallback)
            assert self.num_timesteps == 200 * self.n_calls == self.parent.num_timesteps
            assert self.locals["self"] is model  # the parent passes its locals on
            scores.append(self.parent.last_mean_reward)
            return True

    evaluation = EvalCallback(
        Monitor(script),
        callback_on_new_best=OnNewBest(),
        callback_after_eval=AfterEvaluation(),
        n_eval_episodes=1,
        eval_freq=50,
        log_path=str(tmp_path / "log"),
        best_model_save_path=str(tmp_path / "best"),
        verbose=0,
    )
    model.learn(1000, evaluation, log_interval=10**9)
    assert bests == [(200, 3.0), (600, 4.0), (1000, 5.0)]
    assert scores == [3.0, 1.0, 4.0, 1.0, 5.0]
    assert (evaluation.best_mean_reward, evaluation.last_mean_reward) == (5.0, 5.0)
    log = np.load(tmp_path / "log" / "evaluations.npz")
    assert log["timesteps"].tolist() == [200, 400, 600, 800, 1000]
    assert log["results"].tolist() == [[3.0], [1.0], [4.0], [1.0], [5.0]]
    assert log["ep_lengths"].tolist() == [[3]] * 5
    assert [step for step, _ in dumps.rows] == [200, 400, 600, 800, 1000]
    assert [row["eval/mean_reward"] for _, row in dumps.rows] == scores
    assert len(script.weights) == 15
    assert not th.equal(script.weights[0], script.weights[-1])


@OTHER_TYPE_FOR_EVALUATION
def test_stop_training_on_reward_threshold(setup: Setup) -> None:
    threshold, recorder = StopTrainingOnRewardThreshold(reward_threshold=10.0), Recorder()
    script = Script([1.0, 9.9, 3.0, 10.0, 2.0])
    evaluation = EvalCallback(Monitor(script), callback_on_new_best=threshold, n_eval_episodes=1, eval_freq=25, verbose=0)
    setup.model().learn(100_000, [evaluation, recorder])
    assert evaluation.best_mean_reward == 10.0
    assert evaluation.n_calls == recorder.n_calls == 4 * 25
    assert threshold.n_calls == 3
    assert list(script.returns) == [2.0]  # never played


@pytest.mark.parametrize(("min_evals", "n_evaluations"), [(0, 5), (4, 9)])
@OTHER_TYPE_FOR_EVALUATION
def test_stop_training_on_no_model_improvement(setup: Setup, min_evals: int, n_evaluations: int) -> None:
    patience = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=min_evals)
    # the third evaluation below the best of 5 ends the training; if counting starts at the fifth, 9 is reached before
    script = Script([1.0, 5.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0, 5.0])
    recorder = Recorder()
    evaluation = EvalCallback(Monitor(script), callback_after_eval=patience, n_eval_episodes=1, eval_freq=20, verbose=0)
    setup.model().learn(100_000, [evaluation, recorder])
    assert patience.n_calls == n_evaluations
    assert evaluation.n_calls == recorder.n_calls == n_evaluations * 20
    assert len(list(script.returns)) == 10 - n_evaluations


# --- others ----------------------------------------------------------------------------------------------------------


def test_stop_training_on_max_episodes(setup: Setup) -> None:
    stop, recorder = StopTrainingOnMaxEpisodes(max_episodes=5), Recorder()
    setup.model().learn(100_000, [stop, recorder])
    assert stop.n_calls == recorder.n_calls
    assert stop.n_episodes == sum(recorder.n_dones) == recorder.episodes.total()
    assert sum(recorder.n_dones[:-1]) < 5 * N_ENVS <= sum(recorder.n_dones)


def test_every_n_timesteps_fires_at_the_first_call_after_them(setup: Setup) -> None:
    child, recorder = Recorder(), Recorder()
    setup.model().learn(900, [EveryNTimesteps(n_steps=250, callback=child), recorder])
    assert child.timesteps == [252, 504, 756]
    assert recorder.n_calls >= 225
    child, recorder = Recorder(stop_at=3), Recorder()
    setup.model().learn(100_000, [EveryNTimesteps(n_steps=30, callback=child), recorder])
    assert child.timesteps == [32, 64, 96]
    assert recorder.n_calls == 96 // N_ENVS


def test_log_every_n_timesteps(setup: Setup) -> None:
    model, dumps = setup.model(), Dumps()
    model.set_logger(Logger(None, [dumps]))
    model.learn(900, LogEveryNTimesteps(n_steps=250), log_interval=10**9)
    assert [step for step, _ in dumps.rows] == [252, 504, 756]
    for step, row in dumps.rows:
        assert row["time/total_timesteps"] == step
        assert "time/iterations" not in row  # as in A2C
        assert row["rollout/ep_len_mean"] == row["rollout/ep_rew_mean"] >= 8  # CartPole pays 1 for each step
        assert -np.log(2) <= row["train/entropy_loss"] < -0.5
        assert 0 < row["train/n_updates"] <= model._n_updates
    # together with the logs of SB3's loop, after every 20th rollout
    model, dumps = setup.model(), Dumps()
    model.set_logger(Logger(None, [dumps]))
    model.learn(900, LogEveryNTimesteps(n_steps=300), log_interval=20)
    assert [step for step, _ in dumps.rows] == [300, 400, 600, 800, 900]


def test_the_progress_bar_counts_calls(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[int, int, int]] = []

    class ReadableProgressBar(ProgressBarCallback):
        def _on_training_end(self) -> None:
            bars.append((self.pbar.n, self.pbar.total, self.n_calls * N_ENVS))
            super()._on_training_end()

    monkeypatch.setattr("stable_baselines3.common.base_class.ProgressBarCallback", ReadableProgressBar)
    model, n_before = setup.model(), 0
    for reset_num_timesteps in (True, False):
        model.learn(402, progress_bar=True, reset_num_timesteps=reset_num_timesteps)
        shown, total, called = bars[-1]
        assert (shown, total) == (called, 402)
        assert 0 <= model.num_timesteps - n_before - shown < N_ENVS  # an incomplete last row is counted without a call
        n_before = model.num_timesteps
    assert len(bars) == 2


def test_callbacks_that_refer_to_each_other(setup: Setup) -> None:
    class Partner(BaseCallback):
        partner: BaseCallback

        def _on_step(self) -> bool:
            assert self.locals["rewards"].shape == (N_ENVS,)
            return True

    first, second = Partner(), Partner()
    first.partner, second.partner = second, first
    setup.model().learn(40, [first, second])
    assert first.n_calls == second.n_calls > 0


def test_what_was_learned_from_can_not_be_changed(setup: Setup) -> None:
    """In A2C the change of a reward has an effect. The next step begins an episode where this one has ended one."""

    class Shaping(BaseCallback):
        dones: list[bool]

        def _on_step(self) -> bool:
            for name in ("rewards", "dones", "actions"):
                with pytest.raises(ValueError, match="read-only"):
                    self.locals[name] *= 0
            if self.n_calls > 1:
                assert vars(self.model)["_last_episode_starts"].tolist() == self.dones
            self.dones = self.locals["dones"].tolist()
            return True

    callback = Shaping()
    setup.model().learn(200, callback)
    assert callback.n_calls >= 200 // N_ENVS - 1
