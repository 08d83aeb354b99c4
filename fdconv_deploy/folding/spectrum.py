"""Constant spectra and their group map, laid out for the inverse transform.

The published layer stores half of the columns of a spectrum, all rows. Here it is half of
the rows, one of each mirrored two, all columns, so that the last, real transform runs over
rows and leaves the kernels in their natural order. All constant factors (alpha,
the transform's 1/(R·C), those of the attentions) are folded in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.folding.inverse_transform import (
    ComplexInverse,
    RealInverse,
    complex_inverse,
    real_inverse,
)


@dataclass(frozen=True)
class FoldedSpectrum:
    """Spectra of a layer's kernel matrix of R rows and C columns.

    The kernels' spectrum is the sum over ``param_ratio`` of ``values · attention[groups]``.
    Axes, in the terms of `ComplexInverse` (frequency digits f1, …, fm along the columns, all
    but the last in one axis F) and `RealInverse` (rows, by class and slot; empty slots hold
    zero):

    values: ``(P, F, 2, fm, row slots)`` float32.
    groups: ``(P, F, fm, row slots)`` uint8, or int32 for more than 256 attentions; index
        into the ``P·G`` kernel attentions.
    group_map_sha256: of the checkpoint's own grouping, ``(P, R, C//2+1)`` int16.
    """

    row_transform: RealInverse
    column_transform: ComplexInverse
    values: NDArray[np.float32]
    groups: NDArray[np.uint8] | NDArray[np.int32]
    group_map_sha256: str

    @property
    def rows(self) -> int:
        """R."""
        return self.row_transform.length

    @property
    def columns(self) -> int:
        """C."""
        return self.column_transform.length

    def by_frequency(self) -> HalfSpectrum:
        """The same in plain order."""
        slots, columns = self.row_transform.slots.reshape(-1), self.column_transform.frequencies
        return half_spectrum(self.rows, slots, columns, self.values, self.groups)


@dataclass(frozen=True)
class HalfSpectrum:
    """Half of the spectra of a kernel matrix of ``rows`` × ``columns``, in plain order.

    frequencies: ``(S,)`` int64, the row frequency q of each stored row, 0 … rows//2, a second time
    where a row has bins in two groups (the transform adds the two). values: ``(P, S, columns)``
    complex64, column frequencies in natural order; groups: ``(P, S, columns)`` int64.
    """

    rows: int
    columns: int
    frequencies: NDArray[np.int64]
    values: NDArray[np.complex64]
    groups: NDArray[np.int64]


def half_spectrum(
    length: int,
    row_frequencies: NDArray[np.int64],
    column_frequencies: NDArray[np.int64],
    values: NDArray[np.float32],
    groups: NDArray[Any],
) -> HalfSpectrum:
    """Bring stored spectra into plain order.

    Args:
        length: number of rows of the kernel matrix.
        row_frequencies: of each row slot, ``(slots,)``, -1 where nothing is stored.
        column_frequencies: of each place along the columns, ``(C,)``.
        values, groups: as `FoldedSpectrum` has them.
    """
    used = np.flatnonzero(row_frequencies >= 0)
    rows = row_frequencies[used]

    def natural(array: NDArray) -> NDArray:  # (P, F, fm, slot) -> (P, used slot, f)
        places = array.reshape(len(array), len(column_frequencies), -1)[:, :, used]
        result = np.empty_like(places)
        result[:, column_frequencies] = places
        return result.transpose(0, 2, 1)

    weight = np.where((rows == 0) | (2 * rows == length), 1.0, 2.0)
    half = natural(values[:, :, 0] + 1j * values[:, :, 1]) / weight[:, None]
    owner = natural(groups).astype(np.int64)
    image = 2 * rows > length
    half[:, image] = np.conj(_mirror(half[:, image], 2))
    owner[:, image] = _mirror(owner[:, image], 2)
    rows = np.where(image, length - rows, rows)
    # Of a frequency's two slots the further one comes last, as it does in the layout.
    order = np.argsort(rows, kind="stable")
    return HalfSpectrum(
        length,
        len(column_frequencies),
        rows[order],
        half[:, order].astype(np.complex64),
        owner[:, order],
    )


def _mirror(array: NDArray, axis: int) -> NDArray:
    """Index i -> -i modulo the length."""
    return np.roll(np.flip(array, axis), 1, axis)


def _self_mirrored_columns(columns: int) -> list[int]:
    """Column 0 and, of an even number of columns, the Nyquist column."""
    return [0] if columns % 2 else [0, columns // 2]


def straddling_rows(groups: NDArray[np.int64], columns: int) -> tuple[int, ...]:
    """Rows q ≤ R//2 where a bin and its mirror image are weighed by different attentions.

    That can be in column 0 and the Nyquist column only, where both are stored: their radii
    tie, and the sort may have left them on two sides of a group border.
    """
    rows = groups.shape[1]
    differs = np.zeros(rows, dtype=bool)
    for column in _self_mirrored_columns(columns):
        single = groups[:, :, column]
        differs |= (single != _mirror(single, 1)).any(0)
    return tuple(int(q) for q in np.flatnonzero(differs[: rows // 2 + 1]))


def _all_rows(
    spectra: NDArray[np.complex128], groups: NDArray[np.int64], columns: int
) -> tuple[NDArray[np.complex128], NDArray[np.int64]]:
    """``(P, R, C//2+1)`` values and groups -> ``(P, 2·R, C)``: each row, and its second slot.

    In column 0 and the Nyquist column the inverse takes the mean of a bin and its mirror
    image's conjugate. Where the two are in different groups, the image goes to the row's
    second slot.
    """
    ratio, rows, half = spectra.shape
    full = np.zeros((ratio, rows, columns), dtype=np.complex128)
    owner = np.full((ratio, rows, columns), -1, dtype=np.int64)
    full[:, :, :half], owner[:, :, :half] = spectra, groups
    interior = slice(1, (columns + 1) // 2)
    full[:, :, half:] = np.conj(_mirror(spectra, 1)[:, :, interior][:, :, ::-1])
    owner[:, :, half:] = _mirror(groups, 1)[:, :, interior][:, :, ::-1]

    second = np.zeros_like(full)
    second_owner = np.full_like(owner, -1)
    for column in _self_mirrored_columns(columns):
        value, group = spectra[:, :, column] / 2, groups[:, :, column]
        image, image_group = np.conj(_mirror(value, 1)), _mirror(group, 1)
        same = group == image_group
        full[:, :, column] = value + np.where(same, image, 0)
        second[:, :, column] = np.where(same, 0, image)
        second_owner[:, :, column] = np.where(same, -1, image_group)
    return np.concatenate([full, second], 1), np.concatenate([owner, second_owner], 1)


def fold_spectrum(
    spectra: NDArray[np.complex128], groups: NDArray[np.int64], columns: int
) -> FoldedSpectrum:
    """Lay a layer's spectra out for the inverse transform.

    Args:
        spectra: ``(P, R, C//2+1)``, every constant factor but the transform's folded in.
        groups: ``(P, R, C//2+1)``, index into the ``P·G`` kernel attentions, -1 where a bin
            was dropped (``param_reduction < 1``).
        columns: C.
    """
    ratio, rows, _ = spectra.shape
    digest = hashlib.sha256(groups.astype("<i2").tobytes()).hexdigest()
    repeated = straddling_rows(groups, columns)
    row_transform = real_inverse(rows, repeated)
    column_transform = complex_inverse(columns)
    values, owner = _all_rows(spectra, groups, columns)

    slots = _places(row_transform)
    weight = row_transform.weight.reshape(-1, 1) / (rows * columns)
    values = np.where(slots[:, None] >= 0, values[:, slots] * weight, 0)
    owner = np.maximum(np.where(slots[:, None] >= 0, owner[:, slots], 0), 0)
    # (plane, slot, f) -> (plane, F, fm, slot)
    order = column_transform.frequencies
    split = (ratio, column_transform.leading, column_transform.factors[-1], len(slots))
    values = values[:, :, order].transpose(0, 2, 1).reshape(split)
    owner = owner[:, :, order].transpose(0, 2, 1).reshape(split)
    pair = np.stack([values.real, values.imag], axis=2)
    # One byte a bin is enough for 256 attentions; runtimes know no type between that and int32.
    compact: NDArray[np.uint8] | NDArray[np.int32]
    if owner.max() <= 255:
        compact = np.ascontiguousarray(owner, dtype=np.uint8)
    else:
        compact = np.ascontiguousarray(owner, dtype=np.int32)
    return FoldedSpectrum(
        row_transform,
        column_transform,
        np.ascontiguousarray(pair, dtype=np.float32),
        compact,
        digest,
    )


def _places(transform: RealInverse) -> NDArray[np.int64]:
    """For each slot of a transform, its row in `_all_rows`' arrays, or -1."""
    seen: set[int] = set()
    places = []
    for q in transform.slots.reshape(-1).tolist():
        places.append(transform.length + q if q in seen else q)
        if q >= 0:
            seen.add(q)
    return np.array(places)
