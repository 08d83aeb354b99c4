"""A stand-in for NVIDIA's management library (``pynvml``): two GPUs, read as a script says."""

from __future__ import annotations

import itertools
from types import SimpleNamespace


class Nvml:
    """The part of ``pynvml`` that is used; what it does not know it refuses."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, old: bool = False, clocks: tuple[int, ...] = (1980,)) -> None:
        self.old = old
        self._clocks = itertools.cycle(clocks)  # of the second GPU, one reading after another

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=3_000_000_000, total=80_000_000_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.old:
            raise self.NVMLError("not supported")
        return 12_500  # mJ

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle, kind):
        if kind == self.NVML_CLOCK_SM and handle == 1:
            return next(self._clocks)
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}0000000-0000-0000-0000-000000000000"

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000  # mW

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x1 | 0x4 if handle == 1 else 0x1  # idle; a power cap

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA Made-up"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetTemperature(self, handle, kind):
        if handle == 1:
            return 61
        raise self.NVMLError("not supported")
