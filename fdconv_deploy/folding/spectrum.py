"""Constant spectra and their group map, laid out for the inverse transform.

The published layer stores half of the columns of a spectrum, all rows. Here it is half of
the rows, all columns: the mirror image supplies the rest, so that the last, real transform
runs over rows and leaves the kernels in their natural order. All constant factors (alpha,
the transform's 1/(R·C), those of the attentions) are folded in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.folding.inverse_transform import complex_inverse, real_inverse

# (plane, bin): a bin's value and the kernel attention that weighs it, or -1 for none.
_Half = tuple[NDArray[np.complex128], NDArray[np.int64]]


@dataclass(frozen=True)
class FoldedSpectrum:
    """Spectra of a layer's kernel matrix of R rows and C columns.

    The kernels' spectrum is the sum over planes of ``values · attention[groups]``. Axes, in
    the terms of `ComplexInverse` (frequency f1 + first·f2 along the columns) and
    `RealInverse` (rows, by class and slot; empty slots hold zero):

    values: ``(planes, f1, 2, f2, row slots)`` float32.
    groups: ``(planes, f1, f2, row slots)`` uint8, index into the ``P·G`` kernel attentions.
    group_map_sha256: of the checkpoint's own grouping, ``(P, R, C//2+1)`` int16.
    """

    rows: int
    columns: int
    values: NDArray[np.float32]
    groups: NDArray[np.uint8]
    group_map_sha256: str


def _mirror(array: NDArray, axis: int) -> NDArray:
    """Index i -> -i modulo the length."""
    return np.roll(np.flip(array, axis), 1, axis)


def _half_rows(spectrum: NDArray[np.complex128], groups: NDArray[np.int64], columns: int) -> _Half:
    """One ``(R, C//2+1)`` plane -> planes of ``(R//2+1, C)``.

    In column 0 and the Nyquist column a bin and its mirror image are both stored, and the
    inverse takes the mean of one and the other's conjugate. Where a tie across a group
    border left the two in different groups, the mirror image goes to a plane of its own.
    """
    rows = spectrum.shape[0]
    half = columns // 2 + 1
    full = np.zeros((2, rows, columns), dtype=np.complex128)
    owner = np.full((2, rows, columns), -1, dtype=np.int64)
    full[0, :, :half], owner[0, :, :half] = spectrum, groups
    interior = slice(1, (columns + 1) // 2)
    image = _mirror(spectrum, 0)[:, interior]
    full[0, :, half:] = np.conj(image[:, ::-1])
    owner[0, :, half:] = _mirror(groups, 0)[:, interior][:, ::-1]

    for column in {0, columns // 2} if columns % 2 == 0 else {0}:
        value, group = spectrum[:, column] / 2, groups[:, column]
        image, image_group = np.conj(_mirror(value, 0)), _mirror(group, 0)
        same = group == image_group
        full[0, :, column] = value + np.where(same, image, 0)
        full[1, :, column] = np.where(same, 0, image)
        owner[1, :, column] = np.where(same, -1, image_group)
    planes = 2 if (full[1] != 0).any() else 1
    keep = rows // 2 + 1
    return full[:planes, :keep], owner[:planes, :keep]


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
    if groups.max() > 255:
        raise UnsupportedLayerError(
            f"at most 256 kernel attentions (kernel_num × param_ratio) can be exported, this "
            f"layer has {groups.max() + 1}."
        )
    digest = hashlib.sha256(groups.astype("<i2").tobytes()).hexdigest()
    halves = [_half_rows(spectra[p], groups[p], columns) for p in range(ratio)]
    values = np.concatenate([h[0] for h in halves]) / (rows * columns)
    owner = np.concatenate([h[1] for h in halves])

    factors = complex_inverse(columns).factors
    slots = real_inverse(rows).slots.reshape(-1)
    values = np.where(slots[:, None] >= 0, values[:, slots], 0)
    owner = np.maximum(np.where(slots[:, None] >= 0, owner[:, slots], 0), 0)
    # (plane, slot, f) -> (plane, f1, f2, slot), with f = f1 + first·f2
    split = (len(values), len(slots), factors.second, factors.first)
    values = values.reshape(split).transpose(0, 3, 2, 1)
    owner = owner.reshape(split).transpose(0, 3, 2, 1)
    pair = np.stack([values.real, values.imag], axis=2)
    return FoldedSpectrum(
        rows,
        columns,
        np.ascontiguousarray(pair, dtype=np.float32),
        np.ascontiguousarray(owner, dtype=np.uint8),
        digest,
    )
