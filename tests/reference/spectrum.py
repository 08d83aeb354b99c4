"""Radii, order and groups of a spectrum's bins, and the masks of frequency bands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.reference.introsort import introsort_order

Float32 = NDArray[np.float32]


def frequencies(length: int) -> Float32:
    """Of a full transform, in cycles per sample: a product of two rounded numbers."""
    index = np.arange(length)
    signed = np.where(index < (length + 1) // 2, index, index - length)
    return signed.astype(np.float32) * np.float32(1 / length)


def half_frequencies(length: int) -> Float32:
    """Of a half transform; the one at an even length's Nyquist is positive."""
    return np.arange(length // 2 + 1).astype(np.float32) * np.float32(1 / length)


def fused_multiply_add(a: Float32, b: Float32, c: Float32) -> Float32:
    """``a·b + c`` rounded once.

    The product is exact in float64. The sum may not be: where it lies half-way between two
    float32 for want of digits, what was lost decides.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    shadow = total - product
    lost = (product - (total - shadow)) + (addend - shadow)
    nudged = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where(lost == 0, total, nudged).astype(np.float32)


def bin_radii(rows: int, columns: int) -> Float32:
    """``(rows, columns//2 + 1)``: each bin's distance from the zero frequency."""
    vertical, horizontal = np.meshgrid(
        frequencies(rows), half_frequencies(columns), indexing="ij", sparse=True
    )
    square = fused_multiply_add(horizontal, horizontal, vertical * vertical)
    return np.sqrt(square)


def bin_order(rows: int, columns: int) -> NDArray[np.int64]:
    """Flat bin indices by ascending radius, ties as the published code has them."""
    return introsort_order(bin_radii(rows, columns).reshape(-1))


def own_size_mask(k: float, height: int, width: int) -> NDArray[np.bool_]:
    """As the first published version made it in each call: row frequencies keep their signs."""
    limit = np.float32(0.5 / k)
    return (frequencies(height) < limit)[:, None] & (half_frequencies(width) < limit)


def band_mask(k: float, height: int, width: int, made_at: Sequence[int]) -> NDArray[np.bool_]:
    """Low-pass of band ``k``, ``(height, width//2 + 1)``: made once, resized to nearest."""
    vertical, horizontal = np.abs(frequencies(made_at[0])), half_frequencies(made_at[1])
    small = np.maximum(vertical[:, None], horizontal) < np.float32(0.5 / k + 1e-8)
    picks = []
    for source, target in zip(small.shape, (height, width // 2 + 1), strict=True):
        step = np.float32(source) / np.float32(target)
        pick = np.floor(np.arange(target, dtype=np.float32) * step).astype(int)
        picks.append(np.minimum(pick, source - 1))
    return small[np.ix_(*picks)]
