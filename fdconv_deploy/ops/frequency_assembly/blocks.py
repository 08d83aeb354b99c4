"""The group map as blocks of neighbouring bins that repeat a few patterns.

Groups are rings around frequency zero, so that bins side by side mostly share one, and the
patterns of groups in a short block of bins repeat over and over. Runtimes gather blocks
several times faster than single numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class GroupBlocks:
    """``groups.reshape(-1) == patterns[blocks].reshape(-1)``.

    patterns: ``(N, L)``, of the type of the group map; blocks: ``(bins / L,)`` int32.
    """

    patterns: NDArray[Any]
    blocks: NDArray[np.int32]


def _cost(patterns: int, length: int, bins: int) -> float:
    """Nanoseconds of gathering: measured in ONNX Runtime, benchmarks/primitives.py."""
    return 2.9 * patterns * length + (2.8 + 0.11 * length) * bins / length


def group_blocks(groups: NDArray[Any]) -> GroupBlocks:
    """Blocks of the length that is fastest to gather.

    Args:
        groups: a group map of any shape, integer.
    """
    return _group_blocks(groups.tobytes(), groups.dtype.str)


# Layers of one shape share a group map, and so do the graphs of several batch sizes.
@lru_cache(maxsize=32)
def _group_blocks(content: bytes, dtype: str) -> GroupBlocks:
    flat = np.frombuffer(content, dtype)
    best: tuple[float, GroupBlocks] | None = None
    for length in LENGTHS:
        if flat.size % length:
            continue
        rows = flat.reshape(-1, length)
        # One bytes-like key per block: sorting those is much faster than sorting rows.
        keys = rows.view(np.dtype((np.void, rows.itemsize * length))).reshape(-1)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        found = GroupBlocks(rows[first], inverse.reshape(-1).astype(np.int32))
        cost = _cost(len(first), length, flat.size)
        if best is None or cost < best[0]:
            best = cost, found
    assert best is not None
    return best[1]
