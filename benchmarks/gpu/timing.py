"""Times on a GPU, or by the wall clock where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def kernel_seconds(run: Callable[[], object]) -> float:
    """Median of one call with cold caches: what it reads comes from memory, as in a network."""
    if not torch.cuda.is_available():
        return _wall(run, 1)
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3


def network_seconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median of single calls, each waited for, for about ``seconds``."""
    if not torch.cuda.is_available():
        return _wall(run, 1)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wall(run: Callable[[], object], rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    return (time.perf_counter() - start) / rounds
