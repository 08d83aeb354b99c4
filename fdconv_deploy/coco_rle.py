"""COCO's compressed run-length encoding (RLE) of masks in numpy, readable by pycocotools.

Pixels are read down columns, left column first; the first run is of pixels outside the mask.
Lengths (from the fourth on their difference from the one before the last) are written in
groups of five bits, lowest first, each as the character 48 above it; a sixth bit says that
more groups follow, and the highest bit of the last group is the sign.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
_FIRST = 48  # the character of an empty group of bits

MAX_MASK_PIXELS = 1 << 29
"""The largest mask: pycocotools shifts run lengths by 30 bits at most, in 32."""


class Rle(TypedDict):
    """A mask: ``size`` [height, width] in pixels, ``counts`` the compressed run lengths."""

    size: list[int]
    counts: str


def encode(mask: Mask, top: int = 0, left: int = 0, size: tuple[int, int] | None = None) -> Rle:
    """Encode a mask (H, W) bool; or one of ``size`` of which ``mask`` is all that may be True.

    The first pixel of ``mask`` is then at (``top``, ``left``); the rest is not made.
    """
    height, width = size or mask.shape
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1]), np.int8)
    padded[1:-1] = mask
    columns, rows = np.nonzero(np.diff(padded, axis=0).T)
    # Where one run's end is the next one's start, at the foot of a column, they are one run.
    edges, times = np.unique((columns + left) * height + rows + top, return_counts=True)
    edges = edges[times == 1]
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [height, width], "counts": compress(counts)}


def decode(rle: Rle) -> Mask:
    """Decode a mask to (H, W) bool; ``ValueError`` where it is none of its size."""
    height, width = _size(rle)
    counts = decompress(_counts(rle))
    if counts.min() < 0 or counts.max() > height * width or counts.sum() != height * width:
        raise ValueError(
            f"the run lengths do not make a mask of {height} x {width} pixels: their sum is "
            f"{counts.sum()}"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def area(rle: Rle) -> int:
    """Number of pixels of a mask; ``ValueError`` where these are no run lengths."""
    return int(decompress(_counts(rle))[1::2].sum())


def compress(counts: npt.NDArray[Any]) -> str:
    """Write run lengths (n,) as COCO's characters."""
    left = counts.astype(np.int64)
    left[3:] -= counts[1:-2]
    characters, written = [], []
    more = np.ones(len(left), np.bool_)
    while more.any():
        group, left = left & 0x1F, left >> 5
        follows = np.where(group & 0x10, left != -1, left != 0)
        characters.append(group + (follows << 5) + _FIRST)
        written.append(more)
        more = more & follows
    text = np.stack(characters, axis=1)[np.stack(written, axis=1)]
    return text.astype(np.uint8).tobytes().decode("ascii")


def decompress(text: str) -> npt.NDArray[np.int64]:
    """Read run lengths (n,) from COCO's characters; ``ValueError`` where they are others."""
    groups = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - _FIRST
    if not len(groups) or groups.min() < 0 or groups.max() > 0x3F or groups[-1] & 0x20:
        raise ValueError("these are not COCO's compressed run lengths")
    last = np.flatnonzero((groups & 0x20) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 12:
        raise ValueError("these are not COCO's compressed run lengths: a number has over 60 bits")
    place = np.arange(len(groups)) - np.repeat(first, lengths)
    counts = np.add.reduceat((groups & 0x1F) << (5 * place), first)
    counts -= np.where(groups[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts


def _size(rle: Rle) -> tuple[int, int]:
    size = rle.get("size") if isinstance(rle, dict) else None
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(side, int | np.integer) and side >= 0 for side in size)
        or int(size[0]) * int(size[1]) > MAX_MASK_PIXELS
    ):
        raise ValueError(
            f"the run lengths have the size {size!r:.60}; expected [height, width], whole numbers "
            f"of at most {MAX_MASK_PIXELS:,} pixels"
        )
    return int(size[0]), int(size[1])


def _counts(rle: Rle) -> str:
    counts = rle.get("counts") if isinstance(rle, dict) else None
    if not isinstance(counts, str):
        raise ValueError(
            f"the run lengths have counts of type {type(counts).__name__}; expected text, COCO's "
            "compressed ones"
        )
    return counts
