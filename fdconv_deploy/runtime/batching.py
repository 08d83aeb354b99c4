"""How a number of images is divided over the batch sizes a bundle has graphs for."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar


def linear_cost(batch: int, call: float = 0.05) -> float:
    """What running a batch is assumed to cost, in images, until it is measured.

    FDConv makes one set of kernels per image, so a larger batch saves next to nothing on a CPU; a
    slot filled with a repeated image is paid for in full.
    """
    return batch + call


def measured_cost(seconds: Mapping[int, float]) -> Callable[[int], float]:
    """A cost by the seconds that one run of each batch size took.

    A fiftieth of an image is added for the call, so that of plans that cost the same but for the
    noise of measuring, the one of fewer runs is taken.
    """
    call = 0.02 * min(spent / batch for batch, spent in seconds.items())
    costs = {batch: spent + call for batch, spent in seconds.items()}
    return costs.__getitem__


def plan_batches(
    images: int, sizes: Sequence[int], cost: Callable[[int], float] = linear_cost
) -> list[int]:
    """The batch sizes to run, in order, so that their sum is at least ``images``.

    Chosen for the least total ``cost``, and among equals for the fewest repeated images.
    Members of a batch do not influence each other, so the slots that are too many may be
    filled with any image; they are in the last batch.

    >>> plan_batches(6, (1, 4))
    [4, 1, 1]
    """
    if images < 1:
        return []
    # Largest first, so that the last run is the smallest and any slots left over are there.
    return sorted(_plan(images, tuple(sorted(set(sizes))), cost), reverse=True)


@lru_cache(maxsize=4096)
def _plan(images: int, sizes: tuple[int, ...], cost: Callable[[int], float]) -> tuple[int, ...]:
    # Beyond a few of the largest, the best plan only adds more of the cheapest per image.
    bulk = min(sizes, key=lambda size: (cost(size) / size, -size))
    many = max((images - 4 * sizes[-1]) // bulk, 0)
    rest = images - many * bulk
    # best[n]: (cost, slots, runs) to answer n images.
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    for n in range(1, rest + 1):
        best.append(
            min(
                (before[0] + cost(size), before[1] + size, (*before[2], size))
                for size in sizes
                for before in [best[max(n - size, 0)]]
            )
        )
    return (bulk,) * many + best[rest][2]


Key = TypeVar("Key", bound=Hashable)


def least_seconds(
    runs: Mapping[Key, Callable[[], Any]],
    *,
    rounds: int = 5,
    seconds: float = 4.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """The shortest time of each run, interleaved: other processes only ever add to a time.

    Each has been run before, so that none pays for its first time; no further round starts after
    ``seconds`` of ``clock``, which is what timing may add to a start.
    """
    found: dict[Key, float] = {}
    began = clock()
    for number in range(rounds):
        if number and clock() - began > seconds:
            break
        for key, run in runs.items():
            start = clock()
            run()
            spent = clock() - start
            found[key] = min(spent, found.get(key, spent))
    return found
