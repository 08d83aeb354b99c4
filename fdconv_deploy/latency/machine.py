"""Where a measurement was made, and whether the machine was quiet."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from fdconv_deploy.latency.nvml import describe_gpus
from fdconv_deploy.runtime.backends.threads import available_cores, cpu_quota

ROOT = Path(__file__).resolve().parents[2]
# Others may take this share of the machine before a measurement is called noisy.
QUIET = 0.05
# What decides speed: measurements of different ones of these do not belong in one table.
DECISIVE = ("cpu", "cores", "threads", "versions")
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton", "numpy")
# What this project's figures always depend on, in the order they are said.
_SAID = {"torch": "torch", "onnxruntime": "ONNX Runtime", "onnxruntime-gpu": "ONNX Runtime GPU"}


def describe(threads: int) -> dict[str, Any]:
    """The machine, as JSON: CPU, clock, cores, memory, load, GPUs, versions, commit and date.

    :param threads: that both runtimes use.
    """
    return {
        "cpu": cpu_model(),
        "cpu_mhz": cpu_clock(),
        "governor": _line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "cores": available_cores(),
        "logical_cpus": os.cpu_count(),
        "quota": cpu_quota(),
        "threads": threads,
        "memory_gb": round(memory("MemTotal") / 1e9, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gpus": describe_gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def say(machine: dict[str, Any]) -> str:
    """A machine in one line."""
    versions = machine["versions"]
    known = {name: versions[key] for key, name in _SAID.items() if key in versions}
    packages = ", ".join(f"{name} {found}" for name, found in known.items())
    gpus = "".join(f", {gpu['name']} (driver {gpu['driver']})" for gpu in machine.get("gpus", []))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads{gpus}; "
        f"{packages}; commit {machine['commit']}, {machine['date']}"
    )


def busy() -> str | None:
    """A sentence when the machine has other work; None when it is quiet."""
    load, cores = os.getloadavg()[0], available_cores()
    if load <= 0.3 * cores:
        return None
    return (
        f"The machine is busy (load {load:.1f} on {cores} cores); measure again when it is "
        "quiet before quoting anything."
    )


def warn_if_busy() -> None:
    """Say so on stderr when the machine has other work: its figures will be high and uneven."""
    if sentence := busy():
        print(sentence, file=sys.stderr)


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_clock() -> int | None:
    """The first core's clock now, in MHz; None where the system does not tell."""
    told = _cpuinfo("cpu MHz")
    return round(float(told)) if told else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def memory(key: str = "MemAvailable") -> int:
    """A line of ``/proc/meminfo`` in bytes; 0 where the system has none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def commit() -> str:
    """The checkout's commit, with a + when the measured code has been changed since."""
    if not (ROOT / ".git").exists():  # installed, or inside somebody else's repository
        return "unknown"
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "fdconv_deploy", "export")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.check_output(command, text=True).strip()  # noqa: S603 - nothing of a user's


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


@dataclass
class Bystanders:
    """A context manager: the share of the machine's CPU time that went to others meanwhile.

    ``share`` is 0 when only this process worked, 1 when it got nothing; other processes and
    time the hypervisor took both count. None where the system does not tell.

    :param own: seconds of CPU time that are not others'; this process's when not given.
    """

    own: Callable[[], float] = time.process_time
    share: float | None = None
    _start: tuple[float, float, float] | None = field(default=None, repr=False)

    def __enter__(self) -> Bystanders:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if self._start is None or end is None:
            return
        busy, own, wall = (b - a for a, b in zip(self._start, end, strict=True))
        if wall > 0:
            cpus = os.cpu_count() or 1
            self.share = round(min(max((busy - own) / (wall * cpus), 0.0), 1.0), 3)

    def _now(self) -> tuple[float, float, float] | None:
        try:
            cpu, *ticks = Path("/proc/stat").read_text().splitlines()[0].split()
        except (OSError, IndexError):
            return None
        assert cpu == "cpu"
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two.
        spent = [int(tick) for tick in ticks[:8]]
        busy = sum(spent) - spent[3] - spent[4]
        return busy / os.sysconf("SC_CLK_TCK"), self.own(), time.perf_counter()
