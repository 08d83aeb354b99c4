"""Times on a GPU, beside its clock and power; by the wall clock where there is none."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
SAMPLE_MS = 50
# A clock that moved by more makes times of one run differ by more than the run can tell.
STEADY = 0.03
# Bits of `clocks_event_reasons.active`, as NVML names them.
REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "thermal (software)", 0x40: "thermal (hardware)",
    0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


# Every driver of these years knows them.
STATE = (
    "driver_version", "vbios_version", "power.limit", "clocks.max.sm", "clocks.max.mem",
    "persistence_mode", "ecc.mode.current",
)  # fmt: skip


def driver_state(gpu: str) -> dict[str, str] | str:
    """What a GPU's times depend on, as ``nvidia-smi`` says it with units; or why it does not.

    Args:
        gpu: its UUID or index.
    """
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {error}"
    cells = [cell.strip() for cell in done.stdout.split(",")]
    if done.returncode or len(cells) != len(STATE):
        return f"nvidia-smi says {(done.stdout + done.stderr).strip()[:200]!r}"
    return dict(zip(STATE, cells, strict=True))


class Clocks:
    """Samples a GPU's clocks, power, temperature and throttle reasons by ``nvidia-smi``.

    Args:
        gpu: its UUID or index, as ``nvidia-smi -i`` takes it.
    """

    def __init__(self, gpu: str) -> None:
        self._samples: list[tuple[float, list[str]]] = []
        self.problem: str | None = None
        command = [
            "nvidia-smi", "-i", gpu, f"--query-gpu={','.join(QUERY)}",
            "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS),
        ]  # fmt: skip
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            self.problem = f"nvidia-smi does not run: {error.strerror}"
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) == len(QUERY):
                self._samples.append((time.monotonic(), cells))
            else:
                self.problem = f"nvidia-smi says {line.strip()!r}"

    def between(self, start: float, end: float) -> dict[str, Any] | None:
        """What was seen between two readings of `time.monotonic`; None where nothing was."""
        cells = [found for at, found in list(self._samples) if start <= at <= end]
        if not cells:
            return None
        columns = dict(zip(QUERY, zip(*cells, strict=True), strict=True))

        def numbers(name: str) -> list[float]:
            return [float(c) for c in columns[name] if c.replace(".", "", 1).isdigit()] or [0.0]

        sm = numbers("clocks.sm")
        active = 0
        for cell in columns["clocks_event_reasons.active"]:
            active |= int(cell, 16) if cell.startswith("0x") else 0
        return {
            "samples": len(cells),
            "sm_mhz": [min(sm), statistics.median(sm), max(sm)],
            "steady": max(sm) - min(sm) <= STEADY * max(sm),
            "memory_mhz": max(numbers("clocks.mem")),
            "watts": max(numbers("power.draw")),
            "celsius": max(numbers("temperature.gpu")),
            "throttled": [n for bit, n in REASONS.items() if active & bit and n != "idle"],
        }

    def close(self) -> None:
        if self.problem is None or hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()


def rotating_seconds(calls: Sequence[Callable[[], object]], seconds: float = 0.2) -> float:
    """Median time of one of ``calls``, which run one after another in a CUDA graph.

    Each call has buffers of its own. Where these are larger than the cache together, every call
    finds its inputs in memory, as in a network; and nothing waits for the CPU.
    """
    if not torch.cuda.is_available():
        return _wall(calls[0])
    graph = captured(lambda: [call() for call in calls])
    return statistics.median(_events(graph.replay, seconds)) / len(calls)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what ``run`` puts on the stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what it compiles, it compiles now
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def compute_seconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median time that one call keeps the GPU, by events before and after it."""
    if not torch.cuda.is_available():
        return _wall(run)
    return statistics.median(_events(run, seconds))


def _events(run: Callable[[], object], seconds: float) -> list[float]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return times


def call_seconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median wall-clock time of single calls that end with an answer on the host."""
    if not torch.cuda.is_available():
        return _wall(run)
    for _ in range(3):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        times.append(_wall(run))
    return statistics.median(times)


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
