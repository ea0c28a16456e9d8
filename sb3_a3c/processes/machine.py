"""
What this machine grants a process: memory, cores, open files. Each function says None where the system does not tell.

Limits of containers are those of their control group, which are in ``/sys/fs/cgroup``: version 1 has a tree of folders for
each controller, version 2 one for all. A group's limit holds for all groups below it, so the tightest on the way up counts.
"""

import contextlib
import os
from pathlib import Path, PurePosixPath

#: Where the files below are; tests have a tree of their own.
ROOT = Path("/")


def cpu_quota(root: Path = ROOT) -> float | None:
    """
    :param root: of the file system
    :return: how many cores' time the control group may use, as of ``docker run --cpus``; None without limit
    """
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        v1 = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        words = (_text(folder / "cpu.max") or v1).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_memory(root: Path = ROOT) -> int | None:
    """
    :param root: of the file system
    :return: bytes that can still be allocated without swapping, in the machine and in the control group
    """
    lines = [line.split() for line in _text(root / "proc" / "meminfo").splitlines()]
    free = [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]
    for folder in _cgroup_folders("memory", root):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            free.append(max(0, int(limit) - int(used) + _file_cache(folder)))
    return min(free, default=None)


def _file_cache(folder: Path) -> int:
    """Bytes of a control group that it would give back when it needs memory."""
    lines = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    found = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    return found.get("total_inactive_file", found.get("inactive_file", 0))  # v1's, groups below included; v2's


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Of this process's control group and those above it; in a container, paths may begin outside of what can be seen."""
    folders = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = root / "sys" / "fs" / "cgroup" / (controller if controllers else "")
        group = PurePosixPath(path.lstrip("/"))
        folders += [tree / part for part in (group, *group.parents)]
    return folders


def process_memory(pid: int, root: Path = ROOT) -> int | None:
    """
    :param pid: of a process of ours
    :param root: of the file system
    :return: its bytes in memory; of pages that it shares with k processes the k-th part, so that sums are right
    """
    for line in _text(root / "proc" / str(pid) / "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return None


def free_shared_memory(folder: Path = ROOT / "dev" / "shm") -> int | None:
    """
    :param folder: where the system keeps shared memory
    :return: free bytes there
    """
    if not (hasattr(os, "statvfs") and folder.is_dir()):
        return None
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def file_limits() -> tuple[int, int] | None:
    """:return: how many files a process may have open, and to how many it may raise that by itself"""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, hard


def n_open_files(root: Path = ROOT) -> int:
    """
    :param root: of the file system
    :return: how many files this process has open; 0 if the system does not tell
    """
    with contextlib.suppress(OSError):
        return len(os.listdir(root / "proc" / "self" / "fd"))
    return 0


def _text(path: Path) -> str:
    """What is in a file; nothing if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
