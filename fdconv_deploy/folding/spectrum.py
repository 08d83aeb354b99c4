"""Constant spectra and their group map, laid out for an inverse transform by matrix products.

A length N = N1·N2·… inverse transform is a stage of transforms per factor with twiddles
between (Cooley and Tukey 1965). Here every twiddle is folded into the stage before it,
whose matrices then differ per batch entry, real and imaginary parts are two more rows of
every matrix, and the data is laid out so that each product finds its contraction axis where
it needs it: no transposition but one between the two axes, no elementwise pass, no FFT.

The columns of the kernel matrix are inverted first, as complex numbers; the rows last, onto
real numbers, where Hermitian symmetry halves the work. The published layer stores half of the
columns of a spectrum, all rows; here it is half of the rows, one of each mirrored two, all
columns, so that the kernels come out in their natural order. All constant factors (alpha, the
transform's 1/(R·C), those of the attentions) are folded in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

# A product with a 2n × 2n matrix costs per number of its output about as much as OVERHEAD + 2n
# multiplications: reading and writing outweigh short rows. Measured in ONNX Runtime on two
# AVX-512 cores, 16 ≤ 2n ≤ 96, 2.4 million numbers (benchmarks/primitives.py).
OVERHEAD = 11
MOST_STAGES = 3
# What a number costs before the rows' transform, in the same unit: its attention, the columns'
# stages, a transposition. A shorter first factor leaves more slots empty, which cost all that.
BEFORE_ROWS = 280


def _products(length: int, most: int = MOST_STAGES) -> list[tuple[int, ...]]:
    """All ways to write ``length`` as an ordered product of at most ``most`` factors > 1."""
    ways: list[tuple[int, ...]] = [(length,)]
    if most == 1:
        return ways
    for first in range(2, length // 2 + 1):
        if length % first == 0:
            ways += [(first, *rest) for rest in _products(length // first, most - 1)]
    return ways


def complex_factors(length: int) -> tuple[int, ...]:
    """Factors of the complex transform: the cheapest, a single dense stage if that is it."""

    def cost(factors: tuple[int, ...]) -> tuple[int, int]:
        # Of equally cheap ones, that with the smallest last factor: the last one's matrices
        # differ per batch entry and take the most room.
        return sum(OVERHEAD + 2 * factor for factor in factors), factors[-1]

    return min(_products(length), key=cost)


def real_factors(length: int) -> tuple[int, ...]:
    """Factors of the real transform; the first is that of the last, real stage."""

    def cost(factors: tuple[int, ...]) -> float:
        classes = factors[0] // 2 + 1
        stored = 2 * classes / factors[0]
        inner = sum(OVERHEAD + 2 * factor for factor in factors[1:])
        return stored * (BEFORE_ROWS + inner) + OVERHEAD + 2 * classes

    return min(_products(length), key=cost)


def _digits(factors: tuple[int, ...]) -> Indices:
    """The number at each place of the axes of its digits, of which the first counts ones."""
    return np.arange(math.prod(factors)).reshape(factors[::-1]).T.reshape(-1)


def _stage(factors: tuple[int, ...], j: int, lower: Indices, *, parts_first: bool) -> Float64:
    """Matrices of factor j for each lower frequency, ``(len(lower), 2·nj, 2·nj)``.

    They take (fj, real/imaginary), or with ``parts_first`` (real/imaginary, fj), to
    (real/imaginary, cj). The phase is that of position digit cj with frequency digits f1 … fj; with
    later ones it makes whole turns. Turns are reduced in integers so that the angles stay exact.
    """
    length, size = math.prod(factors), factors[j]
    frequency = lower[:, None] + math.prod(factors[:j]) * np.arange(size)[None, :]
    position = np.arange(size) * math.prod(factors[j + 1 :])
    turns = frequency[:, None, :] * position[None, :, None] % length
    wave = np.exp(2j * np.pi * turns / length)
    parts = (wave.real, -wave.imag), (wave.imag, wave.real)
    rows = [np.stack(pair, 2 if parts_first else 3) for pair in parts]
    return np.concatenate(rows, 1).reshape(len(lower), 2 * size, -1)


@dataclass(frozen=True)
class ComplexInverse:
    """Length N inverse transform of complex data on the outermost axes, without the 1/N.

    With N = n1·n2·…·nm, frequency f = f1 + n1·(f2 + n2·(f3 + …)) and position
    c = cm + nm·(c(m-1) + …). The input is ``(f1, …, f(m-1), real/imaginary, fm, …)``.

    stages: in the order of their application, from the last factor to the first; that of
    factor j is ``(n1·…·n(j-1), 2·nj, 2·nj)`` float64, one matrix per (f1, …, f(j-1)), and
    takes (fj, real/imaginary), the last factor's (real/imaginary, fm), to
    (real/imaginary, cj). The output is ``(2, N, …)`` in natural order.
    """

    factors: tuple[int, ...]
    stages: tuple[Float64, ...]

    @property
    def length(self) -> int:
        """N."""
        return math.prod(self.factors)

    @property
    def leading(self) -> int:
        """Size of the frequency axes before the last: n1·…·n(m-1)."""
        return self.length // self.factors[-1]

    @property
    def frequencies(self) -> Indices:
        """The frequency at each place of the axes (f1, …, fm), ``(N,)``."""
        return _digits(self.factors)


@lru_cache(maxsize=128)
def complex_inverse(length: int) -> ComplexInverse:
    """The matrices for one length."""
    factors = complex_factors(length)
    last = len(factors) - 1
    stages = [
        _stage(factors, j, _digits(factors[:j]), parts_first=j == last)
        for j in reversed(range(len(factors)))
    ]
    return ComplexInverse(factors, tuple(stages))


@dataclass(frozen=True)
class RealInverse:
    """Length N inverse transform of a Hermitian spectrum, onto real numbers, without the 1/N.

    As `ComplexInverse`, with N = n1·…·nm, but of the first digit f1 only the values 0 … n1//2
    are stored: the classes. The mirror image of any frequency q, N - q, is in the rest, or in
    the same class where that is 0 or n1/2. `slots` tells which frequency is where:
    ``(classes, n2·…·nm)`` int64, -1 where nothing is stored. There may be further classes for
    second slots of a frequency; the transform adds the two.

    The input is ``(classes, f2, …, fm, real/imaginary, …)``, each frequency's value times
    `weight`. stages: in the order of their application, for the factors m … 2: one matrix
    ``2·nj × 2·nj`` per (class, f2, …, f(j-1)), takes (fj, real/imaginary) to (real/imaginary,
    cj). outer: ``(n1, 2·classes)``, takes (class, real/imaginary) to c1; float64. The output
    is ``(N, …)`` in natural order. The imaginary parts of frequency 0 and of the Nyquist
    frequency are ignored.
    """

    factors: tuple[int, ...]
    slots: Indices
    stages: tuple[Float64, ...]
    outer: Float64

    @property
    def length(self) -> int:
        """N."""
        return math.prod(self.factors)

    @property
    def classes(self) -> int:
        """Number of values of the first digit that are stored, with those of second slots."""
        return self.slots.shape[0]

    @property
    def weight(self) -> Float64:
        """``slots``' shape: 2 where a frequency stands for its mirror image too, else 1."""
        return np.where((self.slots == 0) | (2 * self.slots == self.length), 1.0, 2.0)


def _slots(factors: tuple[int, ...], repeated: tuple[int, ...]) -> tuple[Indices, Indices]:
    """Residues of the classes, and `RealInverse.slots`."""
    length, first = math.prod(factors), factors[0]
    residues = list(range(first // 2 + 1))
    higher = first * _digits(factors[1:])
    frequency = np.array(residues)[:, None] + higher[None, :]
    # A class of its own mirror images needs one of each two.
    own = np.array([residue in (0, first - residue) for residue in residues])
    slots = [np.where(own[:, None] & (2 * frequency > length), -1, frequency)]
    place = {int(q): i for i, q in enumerate(higher)}
    further: dict[int, Indices] = {}
    for row in repeated:
        q = row if row % first <= first // 2 else length - row
        residue = q % first
        empty = np.full(len(higher), -1, dtype=np.int64)
        further.setdefault(residue, empty)[place[q - residue]] = q
    residues += further
    return np.array(residues), np.concatenate([*slots, *(row[None] for row in further.values())])


@lru_cache(maxsize=128)
def real_inverse(length: int, repeated: tuple[int, ...] = ()) -> RealInverse:
    """The matrices for one length, with second slots for ``repeated`` frequencies ≤ N/2."""
    factors = real_factors(length)
    first = factors[0]
    residues, slots = _slots(factors, repeated)
    stages = []
    for j in reversed(range(1, len(factors))):
        lower = residues[:, None] + first * _digits(factors[1:j])
        stages.append(_stage(factors, j, lower.reshape(-1), parts_first=False))
    angle = 2 * np.pi * (np.arange(first)[:, None] * residues[None, :] % first) / first
    outer = np.stack([np.cos(angle), -np.sin(angle)], -1).reshape(first, -1)
    return RealInverse(factors, slots, tuple(stages), outer)


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

    def by_frequency(self) -> tuple[NDArray[np.complex64], Indices]:
        """As `unfold_spectrum` gives it."""
        slots, columns = self.row_transform.slots.reshape(-1), self.column_transform.frequencies
        return unfold_spectrum(self.rows, slots, columns, self.values, self.groups)


def unfold_spectrum(
    rows: int,
    row_frequencies: Indices,
    column_frequencies: Indices,
    values: NDArray[np.float32],
    groups: NDArray[Any],
) -> tuple[NDArray[np.complex64], Indices]:
    """Values and groups of a `FoldedSpectrum`, back to half of the columns and all R ``rows``.

    Each ``(P, R, C//2+1)``; the kernels' spectrum is again the sum over P of values · attention.
    Of column 0 and the Nyquist column the transform keeps the real part alone, so of two rows that
    mirror each other there the lower one counts for both; the upper one holds what is weighed by
    another attention.

    Args:
        row_frequencies: of each row slot, ``(slots,)``, -1 where nothing is stored.
        column_frequencies: of each place along the columns, ``(C,)``.
    """
    columns = len(column_frequencies)

    def natural(array: NDArray) -> NDArray:  # (P, F, fm, slot) -> (P, slot, f)
        places = array.reshape(len(array), columns, -1)
        result = np.empty_like(places)
        result[:, column_frequencies] = places
        return result.transpose(0, 2, 1)

    stored = natural(values[:, :, 0] + 1j * values[:, :, 1])
    stored_owner = natural(groups).astype(np.int64)
    full = np.zeros((len(values), rows, columns // 2 + 1), dtype=np.complex64)
    owner = np.zeros(full.shape, dtype=np.int64)
    single, inner = _self_mirrored(columns), np.arange(1, (columns + 1) // 2)
    seen: set[int] = set()
    for slot, q in enumerate(row_frequencies.tolist()):
        if q < 0:
            continue
        value, group, image = stored[:, slot], stored_owner[:, slot], -q % rows
        lower, own = min(q, image), value[:, single]
        own = own.conj() if q > image else own
        if q in seen:  # a second slot: of these columns only
            full[:, -lower, single], owner[:, -lower, single] = own.conj(), group[:, single]
            continue
        seen.add(q)
        full[:, lower, single], owner[:, lower, single] = own, group[:, single]
        # Stored twice over where it stands for its mirror image, too.
        inside = value if q == image else value / 2
        full[:, image, inner], owner[:, image, inner] = inside[:, -inner].conj(), group[:, -inner]
        full[:, q, inner], owner[:, q, inner] = inside[:, inner], group[:, inner]
    return full, owner


def _mirror(array: NDArray, axis: int) -> NDArray:
    """Index i -> -i modulo the length."""
    return np.roll(np.flip(array, axis), 1, axis)


def _self_mirrored(columns: int) -> list[int]:
    """Column 0 and, of an even number of columns, the Nyquist column."""
    return [0] if columns % 2 else [0, columns // 2]


def straddling_rows(groups: Indices, columns: int) -> tuple[int, ...]:
    """Rows q ≤ R//2 where a bin and its mirror image are weighed by different attentions.

    That can be in column 0 and the Nyquist column only, where both are stored: their radii
    tie, and the sort may have left them on two sides of a group border.
    """
    rows = groups.shape[1]
    single = groups[:, :, _self_mirrored(columns)]
    differs = (single != _mirror(single, 1)).any((0, 2))
    return tuple(np.flatnonzero(differs[: rows // 2 + 1]).tolist())


def _all_rows(
    spectra: NDArray[np.complex128], groups: Indices, columns: int
) -> tuple[NDArray[np.complex128], Indices]:
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

    second, second_owner = np.zeros_like(full), np.full_like(owner, -1)
    single = _self_mirrored(columns)
    value, group = spectra[:, :, single] / 2, groups[:, :, single]
    image, image_group = np.conj(_mirror(value, 1)), _mirror(group, 1)
    same = group == image_group
    full[:, :, single] = value + np.where(same, image, 0)
    second[:, :, single] = np.where(same, 0, image)
    second_owner[:, :, single] = np.where(same, -1, image_group)
    return np.concatenate([full, second], 1), np.concatenate([owner, second_owner], 1)


def fold_spectrum(spectra: NDArray[np.complex128], groups: Indices, columns: int) -> FoldedSpectrum:
    """Lay a layer's spectra out for the inverse transform, of C ``columns``.

    Args:
        spectra: ``(P, R, C//2+1)``, every constant factor but the transform's folded in.
        groups: ``(P, R, C//2+1)``, index into the ``P·G`` kernel attentions, -1 where a bin
            was dropped (``param_reduction < 1``).
    """
    ratio, rows, _ = spectra.shape
    digest = hashlib.sha256(groups.astype("<i2").tobytes()).hexdigest()
    repeated = straddling_rows(groups, columns)
    row_transform = real_inverse(rows, repeated)
    column_transform = complex_inverse(columns)
    values, owner = _all_rows(spectra, groups, columns)

    named = row_transform.slots.reshape(-1)
    again = named >= 0
    again[np.unique(named, return_index=True)[1]] = False
    slots = named + rows * again  # rows of `_all_rows`
    weight = row_transform.weight.reshape(-1, 1) / (rows * columns)
    values = np.where(slots[:, None] >= 0, values[:, slots] * weight, 0)
    owner = np.maximum(np.where(slots[:, None] >= 0, owner[:, slots], 0), 0)
    # (plane, slot, f) -> (plane, F, fm, slot)
    order = column_transform.frequencies
    split = ratio, -1, column_transform.factors[-1], len(slots)
    values = values[:, :, order].transpose(0, 2, 1).reshape(split)
    owner = owner[:, :, order].transpose(0, 2, 1).reshape(split)
    pair = np.stack([values.real, values.imag], axis=2)
    # One byte a bin is enough for 256 attentions; runtimes know no type between that and int32.
    compact: NDArray[np.uint8] | NDArray[np.int32] = (
        owner.astype(np.uint8, "C") if owner.max() <= 255 else owner.astype(np.int32, "C")
    )
    return FoldedSpectrum(
        row_transform,
        column_transform,
        np.ascontiguousarray(pair, dtype=np.float32),
        compact,
        digest,
    )
