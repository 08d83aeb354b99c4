"""Where a measurement was made, and whether the machine was quiet."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fdconv_deploy.runtime.backends.cores import available_cores, cpu_quota

ROOT = Path(__file__).resolve().parents[1]
# Others may take this share of the machine before a measurement is called noisy.
QUIET = 0.05
# What decides speed: measurements of different ones of these do not belong in one table.
DECISIVE = ("cpu", "cores", "threads", "versions")


def describe(threads: int) -> dict[str, Any]:
    """The machine, as JSON: CPU, cores, memory, load, versions, commit and date.

    :param threads: that both runtimes use.
    """
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "logical_cpus": os.cpu_count(),
        "quota": cpu_quota(),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnxruntime", "numpy")},
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def say(machine: dict[str, Any]) -> str:
    """A machine in one line."""
    versions = machine["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; torch "
        f"{versions['torch']}, ONNX Runtime {versions['onnxruntime']}; commit "
        f"{machine['commit']}, {machine['date']}"
    )


def warn_if_busy() -> None:
    """Say so on stderr when the machine has other work: its figures will be high and uneven."""
    load, cores = os.getloadavg()[0], available_cores()
    if load > 0.3 * cores:
        print(
            f"The machine is busy (load {load:.1f} on {cores} cores); measure again when it is "
            "quiet before quoting anything.",
            file=sys.stderr,
        )


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with a + when the measured code has been changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "--", "fdconv_deploy", "export"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


@dataclass
class Bystanders:
    """A context manager: the share of the machine's CPU time that went to others meanwhile.

    ``share`` is 0 when only this process worked, 1 when it got nothing; other processes and
    time the hypervisor took both count. None where the system does not tell.
    """

    share: float | None = None
    _start: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), repr=False)

    def __enter__(self) -> Bystanders:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, wall = (b - a for a, b in zip(self._start, self._now(), strict=True))
        if wall > 0 and Path("/proc/stat").exists():
            cpus = psutil.cpu_count() or 1
            self.share = round(min(max((busy - own) / (wall * cpus), 0.0), 1.0), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests are counted in user and nice already.
        counted = [v for k, v in times._asdict().items() if not k.startswith("guest")]
        return sum(counted) - idle, time.process_time(), time.perf_counter()
