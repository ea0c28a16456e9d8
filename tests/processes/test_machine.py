"""What the machine grants, read from made-up control groups and from this machine."""

import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest

from sb3_a3c.processes import machine

MB = 2**20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    write(group / "a/b/cpu.max", "max 100000\n")
    write(group / "a/b/memory.max", "max\n")
    write(group / "a/b/memory.current", "4096\n")
    assert machine.cpu_quota(tmp_path) is None
    assert machine.available_memory(tmp_path) == 8000 * 1024
    write(group / "a/cpu.max", "50000 100000\n")  # of the group above
    write(group / "a/memory.max", "100000\n")
    write(group / "a/memory.current", "90000\n")
    assert machine.available_memory(tmp_path) == 10_000
    write(group / "a/memory.stat", "anon 1\ninactive_file 5000\n")
    assert machine.cpu_quota(tmp_path) == 0.5
    assert machine.available_memory(tmp_path) == 15_000


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "3:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n1:cpuset:/\n")
    group = tmp_path / "sys/fs/cgroup"  # a container sees its own group as the root
    write(group / "cpu/cpu.cfs_quota_us", "-1\n")
    write(group / "cpu/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path) is None
    write(group / "cpu/cpu.cfs_quota_us", "250000\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    assert machine.available_memory(tmp_path) is None
    write(group / "memory/memory.limit_in_bytes", "1000\n")
    write(group / "memory/memory.usage_in_bytes", "1300\n")
    assert machine.available_memory(tmp_path) == 0
    write(group / "memory/memory.stat", "inactive_file 1\ntotal_inactive_file 400\n")
    assert machine.available_memory(tmp_path) == 100


@pytest.mark.parametrize(
    ("cores", "quota", "usable"),
    [(4, "max", 4), (4, "150000", 1), (4, "299000", 2), (4, "300000", 3), (2, "640000", 2), (4, "50000", 1)],
)
def test_usable_cores_are_whole_and_at_least_one(
    cores: int, quota: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    for version, group in ((2, tmp_path / "v2"), (1, tmp_path / "v1")):
        folder = group / "sys/fs/cgroup"
        if version == 2:
            write(group / "proc/self/cgroup", "0::/a\n")
            write(folder / "a/cpu.max", f"{quota} 100000\n")
        else:
            write(group / "proc/self/cgroup", "4:cpu,cpuacct:/a\n0::/\n")
            write(folder / "cpu/a/cpu.cfs_quota_us", quota.replace("max", "-1"))
            write(folder / "cpu/a/cpu.cfs_period_us", "100000")
        assert machine.n_cores(group) == usable


def test_system_without_proc(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None
    assert machine.n_cores(tmp_path) == machine.affinity()
    assert machine.available_memory(tmp_path) is None
    assert machine.process_memory(os.getpid(), tmp_path) is None
    assert machine.free_shared_memory(tmp_path / "shm") is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_this_machine() -> None:
    before = machine.process_memory(os.getpid())
    block = mmap.mmap(-1, 50 * MB)  # not from malloc, which may reuse freed memory
    block.write(b"x" * len(block))
    after = machine.process_memory(os.getpid())
    block.close()
    assert before is not None and after is not None
    assert 45 * MB < after - before < 60 * MB
    assert machine.free_shared_memory() == pytest.approx(shutil.disk_usage("/dev/shm").free, abs=64 * MB)
