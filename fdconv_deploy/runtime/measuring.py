"""What the ways to run a bundle's batch sizes cost on this machine, measured at warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
ROUNDS = 5
# What timing may add to a start: after the first round, none begins later than this.
SECONDS = 4.0


def least_seconds(
    runs: Mapping[Key, Callable[[], Any]],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """The least seconds of each run, taking turns: others' work only ever adds to a time.

    :param runs: each has been run before, so that none pays for its first time.
    :param seconds: no further round starts after this long.
    """
    found: dict[Key, float] = {}
    began = clock()
    for turn in range(rounds):
        if turn and clock() - began > seconds:
            break
        for key, run in runs.items():
            start = clock()
            run()
            spent = clock() - start
            found[key] = min(spent, found.get(key, spent))
    return found
