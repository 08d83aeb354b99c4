"""How many cores a process has, told by a copy of the files Linux tells it in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdconv_deploy.runtime.backends.threads import available_cores, cpu_quota


@pytest.fixture
def machine(tmp_path: Path, monkeypatch):
    """Eight logical CPUs, two to a core, all of them allowed."""
    for cpu in range(8):
        write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list", siblings(cpu))
    allow(monkeypatch, range(8))
    return tmp_path


def siblings(cpu: int) -> str:
    return f"{cpu % 4},{cpu % 4 + 4}\n"


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def allow(monkeypatch, cpus) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus), raising=False)


class TestCores:
    def test_counts_cores_and_not_their_threads(self, machine: Path) -> None:
        assert available_cores(machine) == 4

    @pytest.mark.parametrize(("cpus", "cores"), [([0, 1, 2], 3), ([0, 4], 1), ([7], 1)])
    def test_keeps_to_the_affinity(self, machine, monkeypatch, cpus, cores) -> None:
        allow(monkeypatch, cpus)
        assert available_cores(machine) == cores

    @pytest.mark.parametrize(
        ("quota", "cores"), [("200000", 2), ("350000", 3), ("50000", 1), ("900000", 4), ("max", 4)]
    )
    def test_keeps_to_the_quota(self, machine: Path, quota: str, cores: int) -> None:
        write(machine, "proc/self/cgroup", "0::/\n")
        write(machine, "sys/fs/cgroup/cpu.max", f"{quota} 100000\n")
        assert available_cores(machine) == cores

    def test_old_kernels_name_siblings_otherwise(self, tmp_path: Path, monkeypatch) -> None:
        allow(monkeypatch, range(8))
        for cpu in range(8):
            name = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            write(tmp_path, name, siblings(cpu))
        assert available_cores(tmp_path) == 4

    def test_nothing_to_read(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 6)
        assert available_cores(tmp_path) == 6
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        assert available_cores(tmp_path) == 1

    def test_of_this_machine(self) -> None:
        assert 1 <= available_cores() <= (os.cpu_count() or 1)


class TestQuota:
    def test_the_tightest_of_the_cgroups_above_counts(self, tmp_path: Path) -> None:
        write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
        write(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
        write(tmp_path, "sys/fs/cgroup/a/cpu.max", "150000 100000\n")
        write(tmp_path, "sys/fs/cgroup/cpu.max", "300000 100000\n")
        write(tmp_path, "sys/fs/cgroup/other/cpu.max", "100000 100000\n")
        assert cpu_quota(tmp_path) == 1.5

    def test_a_path_that_is_not_mounted_here(self, tmp_path: Path) -> None:
        write(tmp_path, "proc/self/cgroup", "0::/docker/0123\n")
        write(tmp_path, "sys/fs/cgroup/cpu.max", "250000 100000\n")
        assert cpu_quota(tmp_path) == 2.5

    @pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
    @pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", None)])
    def test_version_1(self, tmp_path: Path, mount: str, quota: str, expected) -> None:
        write(tmp_path, "proc/self/cgroup", "5:memory:/job\n4:cpu,cpuacct:/job\n")
        write(tmp_path, f"sys/fs/cgroup/{mount}/job/cpu.cfs_quota_us", f"{quota}\n")
        write(tmp_path, f"sys/fs/cgroup/{mount}/job/cpu.cfs_period_us", "100000\n")
        assert cpu_quota(tmp_path) == expected

    def test_none(self, tmp_path: Path) -> None:
        assert cpu_quota(tmp_path) is None
        write(tmp_path, "proc/self/cgroup", "0::/\n")
        assert cpu_quota(tmp_path) is None
        write(tmp_path, "sys/fs/cgroup/cpu.max", "not a number\n")
        assert cpu_quota(tmp_path) is None
