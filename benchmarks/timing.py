"""Timing several things side by side, so that a machine's drift hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Below this many rounds quartiles say nothing.
FEWEST_ROUNDS = 5


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    seconds: float = 120.0,
    warm_up: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Run each side once per round: seconds by side, one value per round.

    Every round starts with another side, so that none always follows the same one. The
    garbage collector is off.

    :param seconds: no further round starts after this long, once there are ``FEWEST_ROUNDS``.
    :param warm_up: rounds before those that count; they fill caches and start threads.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for turn in range(-warm_up, rounds):
            if turn == 0:
                began = time.perf_counter()
            if turn >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            progress(f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up")
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                sides[name]()
                spent = time.perf_counter() - start
                if turn >= 0:
                    times[name].append(spent)
    finally:
        if enabled:
            gc.enable()
    return times


def spread(values: list[float], digits: int = 1, scale: float = 1e3) -> dict[str, float]:
    """Median, quartiles, least and number of some values, in milliseconds by default."""
    q1, median, q3 = np.percentile(values, [25, 50, 75]) * scale
    return {
        "median": round(float(median), digits),
        "q1": round(float(q1), digits),
        "q3": round(float(q3), digits),
        "min": round(min(values) * scale, digits),
        "runs": len(values),
    }


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """How many times ``below`` something took.

    ``value`` is the ratio of medians; ``q1`` and ``q3`` are the quartiles of the rounds' own
    ratios, in which drift between rounds cancels.
    """
    rounds = np.array(above) / np.array(below)
    q1, q3 = np.percentile(rounds, [25, 75])
    return {
        "value": round(float(np.median(above) / np.median(below)), 3),
        "q1": round(float(q1), 3),
        "q3": round(float(q3), 3),
    }
