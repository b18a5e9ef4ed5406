"""What the system grants this process: cores and memory, within the limits of its control groups and its own."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # where proc and sys stand


def available_cores() -> int:
    """Physical cores this process may use: affinity mask and CPU quota respected, hyperthreads of one counted once."""
    topology = ROOT / "sys/devices/system/cpu"
    cpus = os.sched_getaffinity(0)
    cores = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or f"cpu{cpu}" for cpu in cpus}
    return math.floor(max(1.0, min([len(cores), *_cpu_quotas()])))


def available_memory() -> int:
    """Bytes this process can still take: the system's estimate, or less where a limit leaves less."""
    return max(0, min([1 << 62, *_system_memory(), *_group_memory(), *_own_memory()]))


def _cpu_quotas() -> Iterator[float]:
    for group in _control_groups("cpu"):
        version_1 = _text(group / "cpu.cfs_quota_us") + " " + _text(group / "cpu.cfs_period_us")
        try:
            quota, period = (int(text) for text in (_text(group / "cpu.max") or version_1).split())
        except ValueError:  # "max 100000", or no such file
            continue
        if quota > 0 and period > 0:
            yield quota / period


def _system_memory() -> Iterator[int]:
    for line in _text(ROOT / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_memory() -> Iterator[int]:
    for group in _control_groups("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                yield int(_text(group / limit)) - int(_text(group / usage))
            except ValueError:  # "max", or no such file
                continue


def _own_memory() -> Iterator[int]:
    pages = _text(ROOT / "proc/self/statm").split()
    if len(pages) < 6:
        return
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - int(used) * resource.getpagesize()


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each followed by those above it: cgroups(7), v1 and v2.

    In a container the path may be that of the host: then only the root is found, which is the container's own group.
    """
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = ROOT / "sys/fs/cgroup" / (controller if controllers else "")
        inside = Path(path.lstrip("/"))
        yield from (mount / folder for folder in (inside, *inside.parents))


def _text(path: Path) -> str:
    """What the file says, or nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
