"""Frequency Band Modulation without FFTs, at a fixed feature size.

Every mask is a square in frequency, so it separates into rows and columns, and the masks
are nested. One forward projection onto the widest band's frequencies, a quarter of the
pixels for k = 2, therefore serves all bands; each band transforms a leading block of those
coefficients back. With the weights w of the bands, in the order of narrowing masks,

    y = w1∘x + (w2 - w1)∘low1 + … + (wlast - wn)∘lown,

which is the published sum of weighted differences. Resized masks need not be symmetric in
their rows; then a column frequency is projected as a complex number (its quadrature twin
enters with the antisymmetric part of the row mask), else as two real ones at half the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.folding.modulation import array
from fdconv_deploy.nn.band_modulation import BandModulation, masks_for

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class BandBasis:
    """How one band's low-pass is made from the projected coefficients.

    ``rows`` and ``columns`` count the leading coefficients it needs. from_rows:
    ``(H', rows)``; from_columns: ``(2·frequencies, W)``; float32. H' is H, or 2·H where
    rows are complex.
    """

    rows: int
    columns: int
    from_rows: Float32
    from_columns: Float32


@dataclass(frozen=True)
class FoldedBands:
    """A layer's band modulation at a fixed size.

    ``x @ to_columns`` gives ``(…, H, 2·frequencies)``; ``to_rows @`` that, with real and
    imaginary parts moved to the rows where ``complex_rows``, gives the coefficients.
    The factors of the terms above are ``mix · act(conv(x)) + mix_bias``: two convolutions
    of as many groups as the band modulation has (act is a sigmoid, or a softmax over groups).

    to_columns: ``(W, 2·frequencies)``; to_rows: ``(rows, H')``; conv_weight: ``(groups·weighted,
    I/groups, s, s)``, group-major; conv_bias: ``(groups·weighted,)``; mix:
    ``(groups·terms, weighted)``; mix_bias: ``(groups·terms,)``; float32. ``weighted`` counts
    the bands that have a weight: all of them, and the last low-pass with ``lowfreq_att``.
    """

    height: int
    width: int
    complex_rows: bool
    to_columns: Float32
    to_rows: Float32
    bands: tuple[BandBasis, ...]
    conv_weight: Float32
    conv_bias: Float32
    groups: int
    mix: Float32
    mix_bias: Float32
    softmax: bool

    @property
    def terms(self) -> int:
        """Of the sum: the input itself and each low-pass."""
        return len(self.bands) + 1

    @property
    def transposed_weight(self) -> Float32:
        """``conv_weight`` as that of an equal transposed convolution, ``(I, weighted, s, s)``."""
        weight = self.conv_weight
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        turned = grouped.transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
        return turned.reshape(-1, *turned.shape[2:])


def _separate(mask: Float64) -> tuple[Bools, Bools]:
    rows, columns = np.any(mask > 0, axis=1), np.any(mask > 0, axis=0)
    assert np.array_equal(mask > 0, rows[:, None] & columns[None, :])
    return rows, columns


def _by_membership(masks: Sequence[Bools]) -> tuple[list[int], list[int]]:
    """Indices in the widest mask, members of narrower masks first; and each mask's count."""
    counts = np.sum(masks, axis=0)
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return order, [int(m.sum()) for m in masks]


def _column_basis(width: int, frequencies: list[int]) -> tuple[Float64, Float64]:
    """Forward ``(W, F, 2)`` and inverse ``(F, 2, W)`` of a real row's chosen frequencies."""
    chosen = np.array(frequencies)
    angle = 2 * np.pi * (np.arange(width)[:, None] * chosen[None, :] % width) / width
    forward = np.stack([np.cos(angle), -np.sin(angle)], -1)
    single = (chosen == 0) | (2 * chosen == width)
    weight = np.where(single, 1.0, 2.0) / width
    inverse = np.stack([np.cos(angle).T, -np.sin(angle).T], 1) * weight[:, None, None]
    return forward, inverse


def _real_row_basis(height: int, order: list[int]) -> Float64:
    """Orthonormal real Fourier basis ``(H, len(order))`` of a symmetric set of frequencies."""
    chosen = np.array(order)
    mirrored = (height - chosen) % height
    turns = np.arange(height)[:, None] * np.minimum(chosen, mirrored) % height
    angle = 2 * np.pi * turns / height
    wave = np.where(chosen <= mirrored, np.cos(angle), np.sin(angle))
    return np.where(chosen == mirrored, wave / np.sqrt(height), wave * np.sqrt(2 / height))


def _complex_row_basis(height: int, order: list[int]) -> tuple[Float64, Float64]:
    """Forward ``(2·Q, 2·H)`` and inverse ``(2·H, 2·Q)``, of (row, real/imaginary) pairs."""
    turns = np.array(order)[:, None] * np.arange(height)[None, :] % height
    wave = np.exp(-2j * np.pi * turns / height)

    def real(matrix: NDArray[np.complex128]) -> Float64:
        top = np.stack([matrix.real, -matrix.imag], -1)
        bottom = np.stack([matrix.imag, matrix.real], -1)
        return np.stack([top, bottom], 1).reshape(2 * len(matrix), -1)

    return real(wave), real(np.conj(wave.T) / height)


def fold_bands(fbm: BandModulation, height: int, width: int) -> FoldedBands:
    """Fold ``FBM`` for feature maps of ``height`` × ``width``."""
    masks = masks_for(fbm.config, height, width).double().numpy()
    row_masks, column_masks = zip(*map(_separate, masks), strict=True)
    row_order, row_counts = _by_membership(row_masks)
    column_order, column_counts = _by_membership(column_masks)
    mirror = -np.arange(height) % height
    complex_rows = any(not np.array_equal(m, m[mirror]) for m in row_masks)

    forward, inverse = _column_basis(width, column_order)
    if complex_rows:
        # Columns as (real/imaginary, frequency), so that the pair can join the rows.
        to_columns = forward.transpose(0, 2, 1)
        to_rows, from_rows = _complex_row_basis(height, row_order)
        per_row, per_column = 2, 1
    else:
        to_columns = forward
        from_rows = _real_row_basis(height, row_order)
        to_rows = from_rows.T
        per_row, per_column = 1, 2

    bands = []
    for rows, columns in zip(row_counts, column_counts, strict=True):
        back = inverse[:columns].transpose(1, 0, 2) if complex_rows else inverse[:columns]
        bands.append(
            BandBasis(
                rows * per_row,
                columns * per_column,
                _constant(from_rows[:, : rows * per_row]),
                _constant(back.reshape(-1, width)),
            )
        )
    return FoldedBands(
        height,
        width,
        complex_rows,
        _constant(to_columns.reshape(width, -1)),
        _constant(to_rows),
        tuple(bands),
        **_fold_weights(fbm),
    )


def _constant(matrix: Float64) -> Float32:
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _fold_weights(fbm: BandModulation) -> dict[str, Any]:
    """The band convolutions as one, and the map from their activations to coefficients."""
    groups, config = fbm.groups, fbm.config
    convs = list(fbm.freq_weight_conv_list)
    slope = 2.0 if config.act == "tanh" else 1.0
    # Group-major, so that one grouped convolution gives all bands' maps.
    weight, bias = (
        np.stack([array(conv.get_parameter(name)) for conv in convs], 1) * slope
        for name in ("weight", "bias")
    )
    weighted, bands = len(convs), len(config.k_list)

    mix = np.eye(bands + 1, weighted) - np.eye(bands + 1, weighted, -1)
    constant = np.zeros(bands + 1)
    constant[weighted:] = 1  # without a weight the last low-pass passes as it is
    mix *= groups if config.act == "softmax" else 2.0
    return {
        "conv_weight": _constant(weight.reshape(-1, *weight.shape[2:])),
        "conv_bias": _constant(bias.reshape(-1)),
        "groups": groups,
        "mix": _constant(np.tile(mix, (groups, 1))),
        "mix_bias": _constant(np.tile(constant, groups)),
        "softmax": config.act == "softmax",
    }
