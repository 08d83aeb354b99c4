"""Timing several calls of this process side by side, for benchmarks' tables."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fdconv_deploy.latency import Clock, Interleaver

# Below this many rounds quartiles say nothing.
FEWEST_ROUNDS = 5


def interleave(
    targets: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    seconds: float = 120.0,
    warm_up: int = 2,
    progress: Callable[[str], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Run each target once per round, with the garbage collector off.

    Args:
        targets: calls by name.
        rounds: that count.
        seconds: no further round starts after this long, once there are ``FEWEST_ROUNDS``.
        warm_up: rounds before those that count; they fill caches and start threads.
        progress: told what is going on before every round.
        clock: seconds, as `time.perf_counter` gives them.

    Returns:
        Seconds by target, one value per round.
    """
    timer = Interleaver(list(targets.values()), clock)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(warm_up):
            progress("warming up")
            timer.warm_up()
        start = clock()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and clock() - start > seconds:
                break
            progress(f"round {number + 1} of {rounds}")
            timer.round()
    finally:
        if enabled:
            gc.enable()
    return dict(zip(targets, timer.seconds, strict=True))


def spread(values: Sequence[float], digits: int = 1, scale: float = 1e3) -> dict[str, float]:
    """Median, quartiles, least and number of some values, in milliseconds by default."""
    q1, median, q3 = np.percentile(values, [25, 50, 75]) * scale
    return {
        "median": round(float(median), digits),
        "q1": round(float(q1), digits),
        "q3": round(float(q3), digits),
        "min": round(min(values) * scale, digits),
        "runs": len(values),
    }
