"""Limits of the system, on made-up trees of its files."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm import system

GB = 1 << 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores, of which this process may use all, and 64 GB."""
    monkeypatch.setattr(system, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for cpu in range(16):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 8},{cpu % 8 + 8}")
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {64 * GB // 1024} kB")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_without_limits(root: Path) -> None:
    assert system.available_cores() == 8
    assert system.available_memory() == 64 * GB


def test_without_any_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ROOT", tmp_path)
    assert system.available_cores() == len(os.sched_getaffinity(0))
    assert system.available_memory() > 1 << 60


def test_the_least_limit_from_the_own_group_up_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/system.slice/pyllm.service")
    write(root, "sys/fs/cgroup/system.slice/pyllm.service/cpu.max", "max 100000")
    write(root, "sys/fs/cgroup/system.slice/cpu.max", "250000 100000")
    write(root, "sys/fs/cgroup/cpu.max", "400000 100000")
    assert system.available_cores() == 2
    write(root, "sys/fs/cgroup/system.slice/pyllm.service/memory.max", str(8 * GB))
    write(root, "sys/fs/cgroup/system.slice/pyllm.service/memory.current", str(3 * GB))
    write(root, "sys/fs/cgroup/system.slice/memory.max", "max")
    write(root, "sys/fs/cgroup/system.slice/memory.current", str(9 * GB))
    assert system.available_memory() == 5 * GB


def test_version_1(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n3:cpuset:/b\n1:name=systemd:/")
    write(root, "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us", "-1")
    write(root, "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us", "100000")
    assert system.available_cores() == 8
    write(root, "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us", "50000")
    assert system.available_cores() == 1
    write(root, "sys/fs/cgroup/memory/docker/memory.limit_in_bytes", str(4 * GB))
    write(root, "sys/fs/cgroup/memory/docker/memory.usage_in_bytes", str(5 * GB))
    assert system.available_memory() == 0


def test_a_containers_own_group_stands_at_the_root(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/kubepods/pod1")
    write(root, "sys/fs/cgroup/cpu.max", "300000 100000")
    assert system.available_cores() == 3


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_process_own_limits_count(limit: str) -> None:
    code = f"""
import resource
from pyllm.system import available_memory
resource.setrlimit(resource.{limit}, ({4 * GB}, {4 * GB}))
print(available_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= int(done.stdout) < 4 * GB
