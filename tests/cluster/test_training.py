"""Training on several hosts, without Ray: exact, counted, logged and called back as on one machine."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_a3c import A3C, WorkerDiedError
from tests.toy_envs import Countdown, StepCounter

pytestmark = pytest.mark.timeout(120)
LocalHosts = Callable[..., None]
N_STEPS = 5


@pytest.mark.parametrize("policy", [pytest.param("MlpPolicy", marks=pytest.mark.slow), "MlpLstmPolicy"])
def test_one_host_with_one_worker_is_exact_to_the_bit(policy: str, local_hosts: LocalHosts) -> None:
    local_hosts(1)
    models = [
        A3C(policy, make_vec_env("CartPole-v1", n_envs=8), n_workers=1, seed=1, cluster=cluster).learn(6000)
        for cluster in (None, "auto")
    ]
    parameters, optimizers = zip(*[(m.policy.state_dict(), m.policy.optimizer.state_dict()["state"]) for m in models])  # noqa: B905
    assert all(th.equal(parameters[0][key], parameters[1][key]) for key in parameters[0])
    assert optimizers[0].keys() == optimizers[1].keys() and len(optimizers[0]) > 5
    for index, state in optimizers[0].items():
        assert all(th.equal(value, optimizers[1][index][key]) for key, value in state.items())
    assert models[0].num_timesteps == models[1].num_timesteps == 6080
    assert models[0]._n_updates == models[1]._n_updates > 0


class Watch(BaseCallback):
    """What a user's callbacks do."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.infos, self.n_called = path, list[dict[str, Any]](), 0

    def _on_step(self) -> bool:
        self.infos += self.locals["infos"]
        if self.n_calls == 100:
            self.training_env.env_method("set_wrapper_attr", "lengths", [4])
            assert self.training_env.env_method("get_wrapper_attr", "lengths") == [[4]] * 4
            self.model.save(self.path / "model")
            saved = A3C.load(self.path / "model")
            assert saved.policy.optimizer.state_dict()["state"][0]["step"] > 0
            assert saved.cluster is None
        if self.n_calls == 200:
            zeros: Any = {key: th.zeros_like(value) for key, value in self.model.policy.state_dict().items()}
            self.model.set_parameters({"policy": zeros}, exact_match=False)
            self.model.learning_rate = 0.0
            self.model.lr_schedule = lambda _: 0.0
        return True


def test_what_users_know_works_on_two_hosts(local_hosts: LocalHosts, tmp_path: Path) -> None:
    local_hosts(2, 2)

    def monitored(i: int) -> Any:
        return Monitor(Countdown(), str(tmp_path / str(i)))

    env = VecNormalize(DummyVecEnv([lambda i=i: monitored(i) for i in range(4)]), norm_reward=True)  # type: ignore[misc]
    model = A3C("MlpPolicy", env, n_steps=N_STEPS, seed=1, cluster="auto")
    logger, logged = configure(None, []), dict[str, Any]()
    logger.record = lambda key, value, exclude=None: logged.update({key: value})  # type: ignore[method-assign]
    model.set_logger(logger)
    watch = Watch(tmp_path)
    threads = th.get_num_threads()
    model.learn(4000, watch, log_interval=10)
    assert len({info["pid"] for info in watch.infos}) == 4  # one worker for each CPU
    assert 4000 <= model.num_timesteps <= 4000 + 4 * N_STEPS
    assert env.ret_rms.count == pytest.approx(model.num_timesteps, abs=20)
    assert {"train/cluster_staleness", "time/exchange_ms", "time/hosts"} <= logged.keys()
    assert logged["time/hosts"] == 2
    episodes = [info["episode"]["r"] for info in watch.infos if "episode" in info]
    assert 4 in episodes and 10 in episodes
    rows = sorted(load_results(str(tmp_path))["r"])
    assert rows[: len(episodes)] == pytest.approx(sorted(episodes)[: len(rows)], abs=6)
    assert 0 <= len(rows) - len(episodes) <= 4
    env.close()
    # all hosts went on from zero, and did not learn any more but for what was on its way
    weights = th.nn.utils.parameters_to_vector(model.policy.parameters())
    assert weights.abs().max() < 0.1
    assert th.get_num_threads() == threads


def test_exceptions_of_an_environment_arrive_with_their_traceback(local_hosts: LocalHosts) -> None:
    local_hosts(1, 1)

    class FaultyError(Exception):
        pass

    class Faulty(Countdown):
        def step(self, action: Any) -> Any:
            if self.n_steps == 50:
                raise FaultyError("at step 50")
            return super().step(action)

    model = A3C("MlpPolicy", DummyVecEnv([Faulty] * 2), n_steps=N_STEPS, cluster="auto")
    with pytest.raises(FaultyError, match="at step 50") as raised:
        model.learn(10_000)
    assert "in step" in str(raised.value.__cause__)
    assert model.num_timesteps > 0


@pytest.mark.parametrize("n_workers", [pytest.param(3, marks=pytest.mark.slow), None])
def test_numbers_of_workers(n_workers: int | None, local_hosts: LocalHosts) -> None:
    local_hosts(1, 1)
    model = A3C("MlpPolicy", DummyVecEnv([Countdown] * 3), n_workers=n_workers, n_steps=N_STEPS, cluster="auto")
    if n_workers == 3:
        with pytest.raises(
            ValueError, match=r"n_workers=3, but the cluster has 2 free CPUs \(host-0 1 of 1, host-1 1 of 1\)"
        ):
            model.learn(100)
    else:
        pids: list[int] = []

        def note(local: dict[str, Any], _: dict[str, Any]) -> bool:
            pids.extend(info["pid"] for info in local["infos"])
            return True

        model.learn(400, note)
        assert len(set(pids)) == 2


@pytest.mark.filterwarnings("ignore:Host host-. ", "ignore:The process that connects", "ignore:Worker . on host-. ")
@pytest.mark.parametrize("victim", ["broker", *(pytest.param(each, marks=pytest.mark.slow) for each in ("worker", "agent"))])
def test_what_dies_is_replaced_and_the_count_is_exact(victim: str, local_hosts: LocalHosts, tmp_path: Path) -> None:
    """``num_timesteps`` is what the environments of all workers have counted, dead ones included."""
    local_hosts(1, 1, in_processes=victim == "agent")

    class Kill(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.infos, self.killed = list[dict[str, Any]](), False

        def _on_step(self) -> bool:
            self.infos += self.locals["infos"]
            self.n_restarts = self.model._collector.n_restarts  # type: ignore[attr-defined]
            pids = sorted({info["pid"] for info in self.infos})
            if len(pids) == 2 and not self.killed:
                self.killed, pid = True, pids[0]
                # a worker's parent is the fork server, whose parent is the agent, or the broker if that has the agents
                os.kill(pid if victim == "worker" else parent(parent(pid)), signal.SIGKILL)
            return True

    kill = Kill()
    model = A3C("MlpPolicy", DummyVecEnv([lambda: StepCounter(Countdown())] * 2), n_steps=N_STEPS, cluster="auto")
    model.learn(3000, kill)
    assert kill.n_restarts == 1
    assert 3000 <= model.num_timesteps <= 3000 + 2 * N_STEPS
    counted: dict[int, list[int]] = {}  # by each worker's environment
    for info in kill.infos:
        counted.setdefault(info["pid"], []).append(info["n_steps"])
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in counted.values())
    assert sum(map(len, counted.values())) == model.num_timesteps // 2 * 2  # the last call needs a step of each environment
    assert len({info["pid"] for info in kill.infos}) == (4 if victim == "broker" else 3)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.filterwarnings("ignore:Host host-.* Training continues")
@pytest.mark.slow
@pytest.mark.parametrize("n_lost", [1, 2])
def test_hosts_are_lost_for_which_there_is_no_other(n_lost: int, local_hosts: LocalHosts, tmp_path: Path) -> None:
    local_hosts(2, 1, folder=tmp_path)
    answers: list[list[float]] = []

    def lose(local: dict[str, Any], _: dict[str, Any]) -> bool:
        model = local["self"]
        if model.num_timesteps == 600:
            for number in range(2 - n_lost, 2):
                (tmp_path / f"host-{number}").touch()
        if model._collector._given_up and not answers:
            answers.append(model.get_env().env_method("reward"))
            model.get_env().set_attr("lengths", [3])
        return True

    model = A3C("MlpPolicy", DummyVecEnv([Countdown] * 3), n_steps=N_STEPS, cluster="auto")
    if n_lost == 1:
        told = r"^Host host-1 was lost. Its workers 2 are gone. No host .* CPUs for 1 others. .* continues with 2 workers\.$"
        with pytest.warns(UserWarning, match=told):
            model.learn(4000, lose)
        assert answers == [[1.0, 1.0, 1.0]]
        assert 4000 <= model.num_timesteps <= 4000 + 2 * N_STEPS
    else:
        with pytest.raises(WorkerDiedError, match=r"^Host host-\d was lost"):
            model.learn(10**9, lose)
        assert model.num_timesteps >= 600


@pytest.mark.slow
def test_no_restart_is_left(local_hosts: LocalHosts) -> None:
    local_hosts(1, 1)

    class AlwaysDies(Countdown):
        def step(self, action: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    model = A3C("MlpPolicy", DummyVecEnv([AlwaysDies] * 2), max_worker_restarts=0, cluster="auto")
    with pytest.raises(WorkerDiedError, match=r"Worker . on host-. was killed by SIGKILL"):
        model.learn(100)
