"""What NVIDIA's management library tells of GPUs: names, clocks, memory, energy.

By the package ``nvidia-ml-py`` (module ``pynvml``) where it is installed and a driver answers;
elsewhere there simply are no GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


class Gpu:
    """One GPU. What the driver does not tell is None.

    :param nvml: the module ``pynvml``, started.
    """

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def _ask(self, ask: Callable[[], Any]) -> Any:
        with contextlib.suppress(self._nvml.NVMLError):
            return ask()
        return None

    def memory_mb(self) -> float | None:
        """Memory in use, by whomever, in MB."""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle))
        return None if found is None else found.used / 1e6

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if found is None else found / 1e3

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory, clocks, power limit and temperature, as JSON."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        limit = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        clocks = {
            name: self._ask(partial(nvml.nvmlDeviceGetClockInfo, handle, kind))
            for name, kind in kinds.items()
        }
        return {
            "name": _text(self._ask(lambda: nvml.nvmlDeviceGetName(handle))),
            "driver": _text(self._ask(nvml.nvmlSystemGetDriverVersion)),
            "memory_gb": None if memory is None else round(memory.total / 1e9, 1),
            "clocks_mhz": clocks,
            "power_limit_w": None if limit is None else limit / 1e3,
            "temperature_c": self._ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
        }


def gpus(nvml: Any = None) -> list[Gpu]:
    """Every GPU the driver shows; none where there is no driver or no ``pynvml``."""
    try:
        nvml = import_module("pynvml") if nvml is None else nvml
        nvml.nvmlInit()
        return [Gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # a missing library raises whatever its loader does
        return []


def describe_gpus() -> list[dict[str, Any]]:
    """Every GPU, as JSON."""
    return [gpu.describe() for gpu in gpus()]


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
