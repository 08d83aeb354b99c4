"""The number of threads to run with: how many CPU cores this process may really use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may run on, at least 1.

    ``os.cpu_count()`` and ONNX Runtime's own default count the machine's cores. Inside a
    container or under ``taskset`` that is too many, and threads that take turns on a core
    wait for each other at the end of every operator.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    logical = _allowed()
    cores = len({_core(root, cpu) for cpu in logical})
    quota = cpu_quota(root)
    # Rounded down: a thread more than the quota pays for gets the whole process stopped for
    # the rest of each scheduling period.
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU time a cgroup grants this process per unit of time; None without a limit.

    The least along the path from the process's cgroup to the topmost one seen, in version 2
    (``cpu.max``) or version 1 (``cpu.cfs_quota_us``).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # no Linux
    limits = [limit for line in lines for limit in _limits(root / "sys/fs/cgroup", line)]
    return min(limits, default=None)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(root: Path, cpu: int) -> str:
    """What the logical CPUs of one physical core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    names = "core_cpus_list", "thread_siblings_list"  # the same, in new and old kernels
    files = [topology / name for name in names if (topology / name).is_file()]
    return files[0].read_text().strip() if files else str(cpu)


def _limits(mounted: Path, line: str) -> Iterator[float]:
    """The quotas that one line of ``/proc/self/cgroup`` leads to."""
    _, controllers, group = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    base = mounted / controllers if (mounted / controllers).is_dir() else mounted / "cpu"
    base = base if controllers else mounted
    path = PurePosixPath(group.lstrip("/"))
    # In a container the path may be the host's, of which only the top is mounted here.
    for folder in (path, *path.parents):
        try:
            if controllers:
                quota = int((base / folder / "cpu.cfs_quota_us").read_text())
                period = int((base / folder / "cpu.cfs_period_us").read_text())
            else:
                given, of = (base / folder / "cpu.max").read_text().split()
                quota, period = (-1 if given == "max" else int(given)), int(of)
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            yield quota / period
