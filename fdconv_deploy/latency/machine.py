"""The machine a measurement was made on: CPU, GPUs, versions, and whether it was quiet.

GPUs are described by NVIDIA's management library, the package ``nvidia-ml-py`` (module
``pynvml``), where it is installed and a driver answers; elsewhere there simply are none.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fdconv_deploy.environment import installed_version
from fdconv_deploy.runtime.backends.threads import available_cores, cpu_quota

ROOT = Path(__file__).resolve().parents[2]
# Other processes may take this share of the machine before a measurement is called noisy.
QUIET = 0.05
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton", "numpy")
# Packages that `say` names, by their names for people.
_NAMED = {"torch": "torch", "onnxruntime": "ONNX Runtime", "onnxruntime-gpu": "ONNX Runtime GPU"}
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe(threads: int) -> dict[str, Any]:
    """The machine, as JSON, and how many of its CPU threads measurements use."""
    clock = _proc("/proc/cpuinfo", "cpu MHz")
    versions = {name: found for name in _PACKAGES if (found := installed_version(name))}
    return {
        "cpu": cpu_model(),
        "cpu_mhz": round(float(clock)) if clock else None,
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        "cores": available_cores(),
        "logical_cpus": os.cpu_count(),
        "quota": cpu_quota(),
        "threads": threads,
        "memory_gb": round(memory("MemTotal") / 1e9, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gpus": [gpu.describe() for gpu in gpus()],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def say(machine: dict[str, Any]) -> str:
    """A machine, as `describe` gives it, in one line."""
    here = machine["versions"]
    packages = ", ".join(f"{name} {here[key]}" for key, name in _NAMED.items() if key in here)
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


def shared_machine(share: float | None) -> str | None:
    """A sentence to put below figures, by `Bystanders.share`; None when the machine was quiet."""
    if share is None or share <= QUIET:
        return None
    return (
        f"Measured on a shared machine ({100 * share:.0f} % of CPU used by other processes): "
        "compare ratios, not milliseconds."
    )


def warn_if_busy() -> None:
    """Print a warning on stderr when the machine has other work."""
    if sentence := busy():
        print(sentence, file=sys.stderr)


def cpu_model() -> str:
    """The processor's name."""
    return _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def memory(key: str = "MemAvailable", path: str = "/proc/meminfo") -> int:
    """A line such as ``MemTotal: 12 kB`` of a file, in bytes; 0 where the system has none."""
    value = _proc(path, key)
    return int(value.split()[0]) * 1024 if value else 0


def _proc(path: str, key: str) -> str:
    """What follows a key and its colon in a file of lines; "" where the system has none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def commit() -> str:
    """The checkout's commit, with a + when the measured code has been changed since."""
    if not (ROOT / ".git").exists():  # installed, or inside somebody else's repository
        return "unknown"

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.check_output(command, text=True).strip()  # noqa: S603 - not a user's

    try:
        changed = git("status", "--porcelain", "--", "fdconv_deploy", "export")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Bystanders:
    """A context manager: the share of the machine's CPU time that went to others meanwhile.

    ``share`` is 0 when only this process worked, 1 when it got nothing; other processes and
    time the hypervisor took both count. None where the system has no such figure. ``own`` are
    seconds of CPU time that are not others'.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self._own = own
        self.share: float | None = None

    def __enter__(self) -> Bystanders:
        self._start = self._others(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        (before, start), now = self._start, self._others()
        if before is not None and now is not None:
            available = (time.perf_counter() - start) * (os.cpu_count() or 1)
            self.share = round(min(max((now - before) / max(available, 1e-9), 0.0), 1.0), 3)

    def _others(self) -> float | None:
        """Seconds of CPU time that others have had since the machine was started."""
        try:
            ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except (OSError, IndexError):
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two.
        spent = [int(tick) for tick in ticks]
        return (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK") - self._own()


class Reading(NamedTuple):
    """What a GPU said of itself at one moment; None is what the driver does not give."""

    sm_mhz: int | None  # clocks
    memory_mhz: int | None
    watts: float | None  # power drawn
    celsius: int | None  # its temperature
    throttled: tuple[str, ...] = ()  # why its clock is held down, of ``THROTTLES``


# Bits of nvmlClocksEventReasons that slow work down; an idle GPU or one that follows clocks set by
# its owner is not throttled.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Gpu:
    """One GPU, by ``nvml``, the module ``pynvml``; what the driver does not give is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a function of the library says of this GPU."""
        with contextlib.suppress(self._nvml.NVMLError, AttributeError):
            found = getattr(self._nvml, name)(self._handle, *arguments)
            return found.decode() if isinstance(found, bytes) else found
        return None

    @property
    def uuid(self) -> str | None:
        """Such as ``GPU-0a1b…``."""
        found: str | None = self._ask("nvmlDeviceGetUUID")
        return found

    def reading(self) -> Reading:
        """What it says of itself now."""
        nvml, watts = self._nvml, self._ask("nvmlDeviceGetPowerUsage")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # older libraries and drivers know the older name
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return Reading(
            self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            None if watts is None else watts / 1e3,
            self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            tuple(why for bit, why in THROTTLES.items() if reasons & bit),
        )

    def memory_mb(self) -> float | None:
        """Memory in use, by whomever, in MB."""
        found = self._ask("nvmlDeviceGetMemoryInfo")
        return None if found is None else found.used / 1e6

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else found / 1e3

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory, clocks, power limit and temperature, as JSON."""
        nvml, driver, now = self._nvml, None, self.reading()
        with contextlib.suppress(nvml.NVMLError):
            driver = nvml.nvmlSystemGetDriverVersion()
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "name": self._ask("nvmlDeviceGetName"),
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "memory_gb": None if memory is None else round(memory.total / 1e9, 1),
            "clocks_mhz": {"sm": now.sm_mhz, "memory": now.memory_mhz},
            "power_limit_w": None if limit is None else limit / 1e3,
            "temperature_c": now.celsius,
        }


def gpus(nvml: Any = None) -> list[Gpu]:
    """Every GPU that the driver shows; none where there is no driver or no ``pynvml``."""
    try:
        nvml = import_module("pynvml") if nvml is None else nvml
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        return [Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except Exception:  # a missing library raises whatever its loader does
        return []


def visible_gpu(uuid: str | None = None, nvml: Any = None) -> Gpu | None:
    """The GPU that CUDA's first device is; None where there is none, or it is not known.

    By its UUID, where CUDA has told it, else by ``CUDA_VISIBLE_DEVICES``. The management library
    numbers all GPUs of the machine, whatever that says.
    """
    found = gpus(nvml)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    wanted = uuid or first
    if wanted.isdecimal():
        return found[int(wanted)] if int(wanted) < len(found) else None
    return next((gpu for gpu in found if wanted and (gpu.uuid or "").startswith(wanted)), None)


@contextlib.contextmanager
def watched(gpu: Gpu | None, interval: float = 0.02) -> Iterator[list[Reading]]:
    """Readings of a GPU, every ``interval`` seconds, while others work on it; none where None."""
    readings: list[Reading] = []
    done = threading.Event()

    def watch() -> None:
        # Not at once: what is timed is just beginning, and the clock of an idle GPU is low.
        while gpu is not None and not done.wait(interval):
            readings.append(gpu.reading())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        done.set()
        thread.join()
