"""The machine, whether it is quiet, and its GPUs: on a stand-in of NVIDIA's library."""

from __future__ import annotations

import time

import pytest

from fdconv_deploy.latency.machine import (
    Bystanders,
    Reading,
    describe,
    gpus,
    shared_machine,
    visible_gpu,
    watched,
)
from tests.latency.nvml import Nvml


def test_a_gpu():
    gpu, _ = gpus(Nvml())
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
    gpu, _ = gpus(Nvml(old=True))
    assert gpu.joules() is None


def test_no_driver_means_no_gpus(monkeypatch):
    broken = Nvml()
    monkeypatch.setattr(broken, "nvmlInit", lambda: 1 / 0)
    assert gpus(broken) == []


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


SECOND = "GPU-10000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("visible", "uuid", "found"),
    [
        (None, None, 0),
        ("1", None, 1),
        ("1,0", None, 1),
        (SECOND, None, 1),
        ("GPU-1", None, 1),  # CUDA takes the beginning of one
        ("0", SECOND, 1),
        ("7", None, None),
        ("", None, None),
        ("GPU-9", None, None),
    ],
)
def test_the_gpu_that_cuda_calls_its_first(visible, uuid, found, monkeypatch):
    """NVIDIA's library numbers all GPUs, whatever is visible to CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = visible_gpu(uuid, Nvml())
    assert (gpu and gpu.uuid) == (None if found is None else f"GPU-{found}{SECOND[5:]}")


def test_a_gpu_is_read_while_others_work_on_it():
    gpu = gpus(Nvml(clocks=(1980, 1500)))[1]
    with watched(gpu, interval=0.001) as readings:
        while len(readings) < 3:
            time.sleep(0.001)
    count = len(readings)
    first = Reading(1980, 2619, 650.0, 61, ("power cap",))
    assert readings[:3] == [first, first._replace(sm_mhz=1500), first]
    assert len(readings) == count
    with watched(None) as nothing:
        pass
    assert nothing == []
