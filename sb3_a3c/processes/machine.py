"""
What the system grants this process: memory and cores. Functions return None for what the system does not tell.

In a container the limits are those of its control group. ``/sys/fs/cgroup`` has one tree of folders for all controllers
(version 2) or one tree for each (version 1). A limit applies to all groups below, so the tightest one on the way up counts.
The parameter ``root`` is the root of the file system.
"""

import contextlib
import os
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time that the control group may use, as set by ``docker run --cpus``; None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        v1 = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        words = (_text(folder / "cpu.max") or v1).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def affinity() -> int:
    """Number of cores that this process may run on: all, or those that ``taskset`` or ``docker run --cpuset-cpus`` left."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_cores(root: Path = ROOT) -> int:
    """Number of whole cores that this process may use: affinity or CPU quota, what is less, rounded down; at least 1."""
    quota = cpu_quota(root)
    return affinity() if quota is None else max(1, min(affinity(), int(quota)))


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that can still be allocated without swapping, in the machine and in the control group."""
    lines = [line.split() for line in _text(root / "proc" / "meminfo").splitlines()]
    free = [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]
    for folder in _cgroup_folders("memory", root):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            free.append(max(0, int(limit) - int(used) + _file_cache(folder)))
    return min(free, default=None)


def _file_cache(folder: Path) -> int:
    """Bytes of a control group's file cache, which the kernel frees when the group needs memory."""
    lines = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    found = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    return found.get("total_inactive_file", found.get("inactive_file", 0))  # version 1, with the groups below; version 2


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """The folders of this process's control group and of those above it. In a container, some of them may not be visible."""
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
    """Bytes of a process in memory. A page shared by k processes counts as 1/k in each, so that sums are right."""
    for line in _text(root / "proc" / str(pid) / "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return None


def free_shared_memory(folder: Path = ROOT / "dev" / "shm") -> int | None:
    """Free bytes in the folder where the system keeps shared memory."""
    if not (hasattr(os, "statvfs") and folder.is_dir()):
        return None
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _text(path: Path) -> str:
    """The content of a file; empty if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
