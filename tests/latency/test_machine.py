"""The machine, whether it is quiet, and its GPUs: on a stand-in of NVIDIA's library."""

from __future__ import annotations

import time
from types import SimpleNamespace

from fdconv_deploy.latency.machine import Bystanders, describe, describe_gpus, gpus, shared_machine


class Nvml:
    """The part of ``pynvml`` that is used; what it does not know it refuses."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, old: bool = False) -> None:
        self.old = old

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 1

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
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA Made-up"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError("not supported")


def test_a_gpu():
    (gpu,) = gpus(Nvml())
    assert gpu.memory_mb() == 3000
    assert gpu.joules() == 12.5
    assert gpu.describe() == {
        "name": "NVIDIA Made-up",
        "driver": "580.1",
        "memory_gb": 80.0,
        "clocks_mhz": {"sm": 1980, "memory": 2619},
        "power_limit_w": 700.0,
        "temperature_c": None,
    }


def test_what_a_driver_does_not_tell_is_none():
    (gpu,) = gpus(Nvml(old=True))
    assert gpu.joules() is None


def test_no_driver_means_no_gpus(monkeypatch):
    broken = Nvml()
    monkeypatch.setattr(broken, "nvmlInit", lambda: 1 / 0)
    assert gpus(broken) == []
    assert isinstance(describe_gpus(), list)


def test_machine_says_what_a_reader_must_know() -> None:
    found = describe(threads=2)
    assert found["threads"] == 2
    assert found["cpu"]
    assert found["cores"] >= 1
    assert set(found["versions"]) >= {"torch", "onnxruntime"}
    assert found["date"].endswith("UTC")


def test_own_work_is_not_others() -> None:
    with Bystanders() as others:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    assert others.share is None or 0 <= others.share <= 1


def test_a_shared_machine_is_said() -> None:
    assert shared_machine(None) is shared_machine(0.03) is None
    assert "(12 % of CPU used by other processes)" in (shared_machine(0.12) or "")
