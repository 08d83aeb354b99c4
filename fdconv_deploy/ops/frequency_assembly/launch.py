"""Constants and launch shapes of the GPU kernels: numpy, no Triton.

The kernels invert the spectrum as the published code does, rows of the kernel matrix first,
then its columns onto real numbers; a folded spectrum is stored the other way round (half of
the rows). Both say the same thing, and this way round a kernel's rows come out whole, so the
modulation finds all of an output channel's weights in one program. It also makes the last
length even, always (C must be), and needs no second slot for a row whose two mirror images
are weighed by different attentions: columns 0 and C/2 store all rows, and only the real part
of their transform counts, so each image goes to its own row.

Sizes: R rows, C columns, P planes, h = C/2. A tile is ``tile_columns`` columns of the h + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.folding.spectrum import FoldedSpectrum

# Above this the odd part of a length would not fit a thread's registers.
LARGEST_ODD = 27


def pass_radix(length: int, limit: int) -> int:
    """Radix of the first pass over ``length`` (a power of two), none above ``limit``."""
    bits, most = length.bit_length() - 1, limit.bit_length() - 1
    return int(2 ** -(-bits // max(1, -(-bits // most))))


@dataclass(frozen=True)
class Transform:
    """How one length is inverted: ``length = odd · power`` in registers, or a dense product.

    odd: 1, 3, … `LARGEST_ODD`; power: of two; limit: on a pass's radix.
    """

    length: int
    odd: int
    power: int
    limit: int

    @property
    def block(self) -> int:
        """Points of one transform in each of a pass's tensors."""
        return self.power // pass_radix(self.power, self.limit)


def transform_of(length: int) -> Transform | None:
    """None where the odd part is too large: then a dense product inverts it."""
    power = length & -length
    odd = length // power
    if odd > LARGEST_ODD:
        return None
    # One output of the odd part is transformed while all its inputs stay in registers: about
    # 40 complex numbers a thread leave room to work with.
    limit = 16
    while limit > 2 and odd * limit > 40:
        limit //= 2
    return Transform(length, odd, power, limit)


def column_transform(columns: int, kernel_width: int) -> Transform | None:
    """Of C points; None for a dense product.

    The kernel's width must divide the odd part, so that each output of it is of one kernel
    column.
    """
    transform = transform_of(columns)
    return None if transform is None or transform.odd % kernel_width else transform


def _roots(turns: NDArray[np.int64], length: int) -> NDArray[np.complex128]:
    """exp(2πi · turns / length), the turns reduced in integers so that angles stay exact."""
    return np.exp(2j * np.pi * (turns % length) / length).reshape(-1)


@lru_cache(maxsize=128)
def root_table(length: int, transform: Transform | None) -> NDArray[np.float32]:
    """Roots of unity that a transform reads: ``(2, n)`` float32, real and imaginary parts.

    Of the odd part, if above 1: its ``odd`` roots, then ``(odd, power)`` twiddles. Then of
    each pass but the last the first power, ``(points left,)``. For a dense product: all roots
    of the length. Never empty, and a multiple of four long.
    """
    parts = []
    if transform is None:
        parts.append(_roots(np.arange(length), length))
    else:
        odd, left = transform.odd, transform.power
        if odd > 1:
            parts.append(_roots(np.arange(odd), odd))
            parts.append(_roots(np.arange(odd)[:, None] * np.arange(left), length))
        while (radix := pass_radix(left, transform.limit)) < left:
            parts.append(_roots(np.arange(left // radix), left))
            left //= radix
    table = np.concatenate([*parts, np.ones(0)])
    table = np.pad(table, (0, -len(table) % 4 if len(table) else 4))
    return np.stack([table.real, table.imag]).astype(np.float32)


def tile_columns(rows: int, columns: int) -> int:
    """Columns per program of the row kernel.

    Four, or two where that leaves multiprocessors of a large GPU idle: with the rows that the
    second kernel takes together they still make full 32-byte sectors. Short columns need more
    to fill a warp.
    """
    transform = transform_of(rows)
    if transform is None:
        return 4
    width = 4 if columns // 2 + 1 > 4 * 128 else 2
    return max(width, 32 // transform.block)


@dataclass(frozen=True)
class KernelSpectrum:
    """A spectrum laid out for the kernels: what one program reads lies together.

    values: ``(tiles, P, 2, R, tile_columns)`` float32, real and imaginary parts.
    groups: ``(tiles, P, R, tile_columns)`` uint8, or int32 for more than 256 attentions.
    Columns past C/2 hold zeros.
    """

    rows: int
    columns: int
    values: NDArray[np.float32]
    groups: NDArray[np.uint8] | NDArray[np.int32]


def _half_columns(
    spectrum: FoldedSpectrum,
) -> tuple[NDArray[np.complex64], NDArray[np.int64]]:
    """Values and groups ``(P, R, C/2 + 1)`` whose transform's real part is the kernel matrix."""
    rows, columns = spectrum.rows, spectrum.columns
    half = columns // 2
    stored, values, groups = spectrum.by_frequency()
    ratio = len(values)
    full = np.zeros((ratio, rows, half + 1), dtype=np.complex64)
    owner = np.zeros((ratio, rows, half + 1), dtype=np.int64)
    # The columns that are their own mirror images: an odd number of columns has no middle one.
    own = [0] if columns % 2 else [0, half]
    inner = slice(1, (columns + 1) // 2)
    seen: set[int] = set()
    for place, q in enumerate(stored.tolist()):
        value, group, mirror = values[:, place], groups[:, place], (rows - q) % rows
        if q in seen:
            # The transform keeps the real part of twice this; so does its conjugate's at -q.
            assert not np.delete(value, own, axis=1).any(), "second slots hold columns 0 and C/2"
            full[:, mirror, own] = 2 * value[:, own].conj()
            owner[:, mirror, own] = group[:, own]
            continue
        seen.add(q)
        full[:, q], owner[:, q] = value[:, : half + 1], group[:, : half + 1]
        if mirror == q:
            continue
        full[:, q, own] *= 2
        full[:, mirror, inner] = value[:, half + 1 :][:, ::-1].conj()
        owner[:, mirror, inner] = group[:, half + 1 :][:, ::-1]
    return full, owner


def kernel_spectrum(spectrum: FoldedSpectrum) -> KernelSpectrum:
    """Lay a folded spectrum out for the kernels."""
    width = tile_columns(spectrum.rows, spectrum.columns)
    values, groups = _half_columns(spectrum)
    ratio, rows, used = values.shape
    tiles = -(-used // width)
    spare = ((0, 0), (0, 0), (0, tiles * width - used))

    def tiled(array: NDArray) -> NDArray:  # (P, R, columns) -> (tiles, P, R, width)
        return np.pad(array, spare).reshape(ratio, rows, tiles, width).transpose(2, 0, 1, 3)

    values, groups = tiled(values), tiled(groups)
    compact = groups.astype(np.uint8 if groups.max(initial=0) <= 255 else np.int32)
    return KernelSpectrum(
        rows,
        spectrum.columns,
        np.ascontiguousarray(np.stack([values.real, values.imag], axis=2)),
        np.ascontiguousarray(compact),
    )
