"""libstdc++'s ``std::sort`` of keys, and where it leaves each of them.

Ties end up wherever its swaps put them, so each step follows bits/stl_algo.h: the pivot is
the median of the second, the middle and the last key, swapped to the front; an unguarded
Hoare partition; the right part first; nothing below 17 keys but one insertion sort at the
end; heap sort where the recursion is deeper than 2·log2(n).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 16


class _Sorter:
    """Keys and the places they came from, moved together."""

    def __init__(self, keys: NDArray) -> None:
        self.keys = keys.copy()
        self.places = np.arange(len(keys))

    def swap(self, a: int | NDArray, b: int | NDArray) -> None:
        for array in (self.keys, self.places):
            array[a], array[b] = array[b], array[a].copy()

    def move_median_to_front(self, first: int, last: int) -> None:
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        x, y, z = self.keys[a], self.keys[b], self.keys[c]
        if not x < y:
            median = a if x < z else c if y < z else b
        elif y < z:
            median = b
        else:
            median = c if x < z else a
        self.swap(first, median)

    def partition(self, first: int, last: int) -> int:
        """Hoare's: the n-th key from the left that is not below the pivot changes places with
        the n-th from the right that is not above it, until the two meet."""
        pivot, keys = self.keys[first], self.keys[first + 1 : last]
        left = np.flatnonzero(keys >= pivot)
        right = np.flatnonzero(keys <= pivot)[::-1]
        both = min(len(left), len(right))
        swaps = int((left[:both] < right[:both]).sum())
        self.swap(first + 1 + left[:swaps], first + 1 + right[:swaps])
        stops = [*left[swaps : swaps + 1], *right[max(swaps - 1, 0) : swaps]]
        return first + 1 + int(min(stops))

    def loop(self, first: int, last: int, depth: int) -> None:
        while last - first > THRESHOLD:
            if depth == 0:
                self.heap_sort(first, last)
                return
            depth -= 1
            self.move_median_to_front(first, last)
            cut = self.partition(first, last)
            self.loop(cut, last, depth)
            last = cut

    def heap_sort(self, first: int, last: int) -> None:
        heap = list(zip(self.keys[first:last], self.places[first:last], strict=True))
        for parent in range((len(heap) - 2) // 2, -1, -1):
            _adjust(heap, parent, len(heap), heap[parent])
        for end in range(len(heap) - 1, 0, -1):
            value, heap[end] = heap[end], heap[0]
            _adjust(heap, 0, end, value)
        self.keys[first:last] = [key for key, _ in heap]
        self.places[first:last] = [place for _, place in heap]


def _adjust(heap: list[tuple], hole: int, length: int, value: tuple) -> None:
    """Sink the hole to a leaf, then let ``value`` rise from there (``__adjust_heap``)."""
    top = child = hole
    while child < (length - 1) // 2:
        child = 2 * (child + 1)
        if heap[child][0] < heap[child - 1][0]:
            child -= 1
        heap[hole], hole = heap[child], child
    if length % 2 == 0 and child == (length - 2) // 2:
        child = 2 * (child + 1)
        heap[hole], hole = heap[child - 1], child - 1
    while hole > top and heap[(hole - 1) // 2][0] < value[0]:
        heap[hole], hole = heap[(hole - 1) // 2], (hole - 1) // 2
    heap[hole] = value


def introsort_order(keys: NDArray) -> NDArray[np.int64]:
    """Indices that sort ``keys`` (1-d, no NaN) as ``std::sort`` does, ties included."""
    sorter = _Sorter(keys)
    if len(keys) > 1:
        sorter.loop(0, len(keys), 2 * (len(keys).bit_length() - 1))
    # Insertion sort never moves a key past its equal: it is a stable sort of what is left.
    return sorter.places[np.argsort(sorter.keys, kind="stable")]
