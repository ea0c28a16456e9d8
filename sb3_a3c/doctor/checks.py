"""The doctor's verdicts: pure functions from measured numbers to findings, each with a fix to type."""

import enum
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import gymnasium as gym

from sb3_a3c.errors import WorkerDiedError

#: Workers per core above which a warning is due.
MAX_WORKERS_PER_CORE = 1.25
#: Part of the available memory that workers may use; evaluations, checkpoints and other programs need the rest.
MAX_MEMORY_USE = 0.8
#: Seconds above which the start of the workers counts as slow.
SLOW_START = 30.0
#: Installs what Atari needs.
ATARI_PACKAGES = 'pip install "ale-py>=0.12" opencv-python-headless'


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    UNKNOWN = "unknown"  #: could not be checked here
    WARNING = "warning"  #: a run would suffer
    PROBLEM = "problem"  #: a run would stop


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    level: Level
    text: str  #: what was measured
    fix: str = ""  #: what to type; empty if nothing has to be done


def unknown(name: str, why: str) -> Finding:
    """A check that can't be made here."""
    return Finding(name, Level.UNKNOWN, f"not checked here: {why}")


def check_cores(n_workers: int, n_cores: int, quota: float | None) -> Finding:
    """Of ``n_cores`` cores, the control group may use ``quota`` cores' time; None without limit."""
    usable = n_cores if quota is None else min(n_cores, quota)
    limit = "no CPU quota" if quota is None else f"a CPU quota of {quota:.3g}"
    text = f"{_count(n_workers, 'worker')} on {_count(n_cores, 'core')}, {limit}"
    if n_workers <= MAX_WORKERS_PER_CORE * usable:
        return Finding("cores", Level.OK, text)
    if usable < 1:
        return Finding("cores", Level.WARNING, text, "docker run --cpus=1 (or more), with A3C(…, n_workers=1)")
    text += ": more only pays where environments wait"
    return Finding("cores", Level.WARNING, text, f"A3C(…, n_workers={int(usable)})")


def check_shared_memory(free: int | None, needed: int) -> Finding:
    """Bytes that are free, and bytes that a ``SharedMemoryStore`` needs."""
    if free is None:
        return unknown("shared memory", "there is no /dev/shm")
    text = f"/dev/shm has {_size(free)} free, weights and optimizer state need {_size(needed)}"
    if 2 * needed <= free:
        return Finding("shared memory", Level.OK, text)
    size = max(64, 1 << (4 * needed // 2**20).bit_length())  # MB, a power of two
    fix = f"docker run --shm-size={size}m, or outside a container: mount -o remount,size={size}m /dev/shm"
    if needed <= free:
        return Finding("shared memory", Level.WARNING, f"{text}: a second run would not fit", fix)
    return Finding("shared memory", Level.PROBLEM, text, fix)


def unusable_environment(env_id: str, error: Exception, known_ids: Collection[str]) -> Finding:
    """Making the environment raised ``error``; ``known_ids`` are all that are registered."""
    text = f"{env_id} can't be made: {type(error).__name__}: {error}"
    return Finding("environment", Level.PROBLEM, text, _how_to_make(env_id, error, known_ids))


def _how_to_make(env_id: str, error: Exception, known_ids: Collection[str]) -> str:
    is_atari = _looks_like_atari(env_id)
    has_atari = any(_looks_like_atari(known) for known in known_ids)
    if isinstance(error, gym.error.UnregisteredEnv) and (has_atari or not is_atari):
        return "--env your_module:YourEnv-v0 for your own; others: python -c 'import gymnasium as g; g.pprint_registry()'"
    if is_atari or "ale-py" in str(error):  # a package, or a ROM, is missing
        return f"{ATARI_PACKAGES} (the ROMs come with ale-py)"
    if commands := re.findall(r"`(pip install [^`]+)`", str(error)):
        return " && ".join(commands)
    return f"""look at the traceback of python -c 'import gymnasium as g; g.make("{env_id}").reset()'"""


def _looks_like_atari(env_id: str) -> bool:
    return "NoFrameskip" in env_id or env_id.startswith("ALE/")


def check_gradient(mismatch: str | None, text: str) -> Finding:
    """``mismatch``: where shared weights differ from those of torch's optimizer. ``text``: what was compared."""
    if mismatch is None:
        return Finding("gradient", Level.OK, text)
    fix = "pip install -c constraints.txt -e . in the checkout, for tested versions; if it stays, report all these lines"
    return Finding("gradient", Level.PROBLEM, mismatch, fix)


def check_start(n_workers: int, method: str, seconds: float) -> Finding:
    """``seconds`` until the first rollout."""
    text = f"{_count(n_workers, 'process')} started by {method}, first rollout after {seconds:.1f} s"
    if seconds <= SLOW_START:
        return Finding("start", Level.OK, text)
    fix = 'A3C(…, start_method="forkserver")' if method == "spawn" else "put Python's packages on a local disk"
    return Finding("start", Level.WARNING, f"{text}, at each call of learn", fix)


def check_training(n_wanted: int, n_workers: int, n_steps: int, n_updates: int, seconds: float) -> Finding:
    """``n_workers`` of ``n_wanted`` processes trained; 0: it was this one."""
    trained_by = _count(n_workers, "worker") if n_workers else "this process"
    text = f"{trained_by} made {n_steps} steps and {n_updates} updates in {seconds:.1f} s"
    if n_updates == 0:
        fix = "VecCheckNan(env, raise_exception=True) shows where NaN or infinity comes from"
        return Finding("training", Level.PROBLEM, f"{text}: all were dropped", fix)
    if n_workers < n_wanted:
        fix = f"--n-workers {n_wanted}, to see why the environments can't be sent to workers"
        return Finding("training", Level.WARNING, f"{text}, instead of {_count(n_wanted, 'worker')}", fix)
    return Finding("training", Level.OK, text)


def failed_training(error: Exception, n_workers: int) -> Finding:
    """``learn`` raised ``error``."""
    fix = "--n-workers 0, which does the same in one process, for a debugger; or another --start-method"
    if isinstance(error, WorkerDiedError) and n_workers > 1:
        fewer = n_workers // 2
        fix = f"--n-workers {fewer} if memory ran out (journalctl -k); else python -X faulthandler with --n-workers 0"
    elif isinstance(error, TimeoutError):
        fix = "--timeout 600 if the environment is that slow; else --n-workers 0 in a debugger"
    return Finding("training", Level.PROBLEM, f"{type(error).__name__}: {error}", fix)


def check_threads(n_threads: int, n_workers: int, n_cores: int) -> Finding:
    """``n_threads`` of torch in each worker."""
    if n_threads == 1 or n_threads * n_workers <= n_cores:
        return Finding("threads", Level.OK, f"torch uses {n_threads} in each worker")
    text = (
        f"torch uses {n_threads} threads in each of {n_workers} workers, and they compete for {n_cores} cores: an "
        "environment or the policy has called `torch.set_num_threads`. Workers are fastest with one."
    )
    return Finding("threads", Level.WARNING, text, "take torch.set_num_threads out, or let it be 1")


def check_memory(of_workers: Sequence[int | None], available: int | None) -> Finding:
    """Bytes of each worker while all of them run, and bytes that were available before."""
    known = [size for size in of_workers if size is not None]
    if len(known) < len(of_workers) or available is None or not known:
        return unknown("memory", "the system does not report it (/proc)")
    each, total = max(known), sum(known)
    text = f"up to {_size(each)} in each of {_count(len(known), 'worker')}, {_size(total)} of {_size(available)} available"
    if total <= MAX_MEMORY_USE * available:
        return Finding("memory", Level.OK, text)
    n_workers = int(MAX_MEMORY_USE * available / each)
    fewer = f"A3C(…, n_workers={n_workers}), with fewer environments"
    fix = fewer if n_workers else "docker run --memory=…, or a larger machine"
    return Finding("memory", Level.PROBLEM if total > available else Level.WARNING, text, fix)


def _count(n: int, thing: str) -> str:
    plural = "es" if thing.endswith("s") else "s"
    return f"{n} {thing}{'' if n == 1 else plural}"


def _size(n_bytes: int) -> str:
    """In MB or GB, of 1024 each as everywhere in docker."""
    return f"{n_bytes / 2**30:.1f} GB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MB"
