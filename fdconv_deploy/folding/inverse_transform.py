"""The inverse 2-d real Fourier transform as a few small constant matrix products.

A length N = N1·N2·… inverse transform is a stage of transforms per factor with twiddles
between (Cooley and Tukey 1965). Here every twiddle is folded into the stage before it,
whose matrices then differ per batch entry, real and imaginary parts are two more rows of
every matrix, and the data is laid out so that each product finds its contraction axis where
it needs it: no transposition but one between the two axes, no elementwise pass, no FFT.

The columns of the kernel matrix are inverted first, as complex numbers; the rows last,
onto real numbers, where Hermitian symmetry halves the work. ``folding/spectrum.py`` lays
the constant spectrum out to match.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


# A product with a 2n × 2n matrix costs per number of its output about as much as OVERHEAD + 2n
# multiplications: reading and writing outweigh short rows. Measured in ONNX Runtime on two
# AVX-512 cores, 16 ≤ 2n ≤ 96, 2.4 million numbers (benchmarks/primitives.py).
OVERHEAD = 11
MOST_STAGES = 3


def _products(length: int, most: int) -> list[tuple[int, ...]]:
    """All ways to write ``length`` as an ordered product of at most ``most`` factors > 1."""
    if most == 1 or length == 1:
        return [(length,)]
    ways: list[tuple[int, ...]] = [(length,)]
    for first in range(2, length // 2 + 1):
        if length % first == 0:
            ways += [(first, *rest) for rest in _products(length // first, most - 1)]
    return ways


@lru_cache(maxsize=128)
def complex_factors(length: int) -> tuple[int, ...]:
    """Factors of the complex transform: the cheapest, a single dense stage if that is it.

    Of equally cheap ones, that with the smallest last factor: the last one's matrices differ
    per batch entry and take the most room.
    """

    def cost(factors: tuple[int, ...]) -> tuple[int, int]:
        return sum(OVERHEAD + 2 * factor for factor in factors), factors[-1]

    return min(_products(length, MOST_STAGES), key=cost)


# What a number costs before the rows' transform, in the same unit: its attention, the columns'
# stages, a transposition. A shorter first factor leaves more slots empty, which cost all that.
BEFORE_ROWS = 280


@lru_cache(maxsize=128)
def real_factors(length: int) -> tuple[int, ...]:
    """Factors of the real transform; the first is that of the last, real stage."""

    def cost(factors: tuple[int, ...]) -> float:
        classes = factors[0] // 2 + 1
        stored = 2 * classes / factors[0]
        inner = sum(OVERHEAD + 2 * factor for factor in factors[1:])
        return stored * (BEFORE_ROWS + inner) + OVERHEAD + 2 * classes

    return min(_products(length, MOST_STAGES), key=cost)


def _as_real(matrix: NDArray[np.complex128]) -> Float64:
    """Complex ``(…, m, k)`` -> real ``(…, 2, m, 2, k)`` acting on (real, imaginary) pairs."""
    real, imaginary = matrix.real, matrix.imag
    rows = [np.stack([real, -imaginary], -2), np.stack([imaginary, real], -2)]
    return np.stack(rows, -4)


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
    def frequencies(self) -> NDArray[np.int64]:
        """The frequency at each place of the axes (f1, …, fm), ``(N,)``."""
        return _digits(np.zeros(1, dtype=np.int64), self.factors, 0)


def _digits(start: NDArray[np.int64], factors: tuple[int, ...], first: int) -> NDArray[np.int64]:
    """Frequencies of the axes (start, f_first, …) of ``factors[first:]``, in one axis."""
    result = start
    for j in range(first, len(factors)):
        digit = np.arange(factors[j]) * math.prod(factors[:j])
        result = (result[:, None] + digit[None, :]).reshape(-1)
    return result


def _stage(factors: tuple[int, ...], j: int, lower: NDArray[np.int64]) -> Float64:
    """Matrices of factor j for each lower frequency, ``(len(lower), ri', cj, ri, fj)``.

    The phase is that of position digit cj with frequency digits f1 … fj; with later ones it
    makes whole turns. Turns are reduced in integers so that the angles stay exact.
    """
    length, size = math.prod(factors), factors[j]
    frequency = lower[:, None] + math.prod(factors[:j]) * np.arange(size)[None, :]
    position = np.arange(size) * math.prod(factors[j + 1 :])
    turns = frequency[:, None, :] * position[None, :, None] % length
    return _as_real(np.exp(2j * np.pi * turns / length))


def _flat(stage: Float64) -> Float64:
    return np.ascontiguousarray(stage).reshape(len(stage), 2 * stage.shape[2], -1)


@lru_cache(maxsize=128)
def complex_inverse(length: int) -> ComplexInverse:
    """The matrices for one length."""
    factors = complex_factors(length)
    stages = []
    for j in reversed(range(len(factors))):
        stage = _stage(factors, j, _digits(np.zeros(1, dtype=np.int64), factors[:j], 0))
        last = j == len(factors) - 1
        stages.append(_flat(stage if last else np.swapaxes(stage, -1, -2)))
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
    slots: NDArray[np.int64]
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


def _slots(
    factors: tuple[int, ...], repeated: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Residues of the classes, and `RealInverse.slots`."""
    length, first = math.prod(factors), factors[0]
    residues = list(range(first // 2 + 1))
    higher = _digits(np.zeros(1, dtype=np.int64), factors, 1)
    frequency = np.array(residues)[:, None] + higher[None, :]
    # A class of its own mirror images needs one of each two.
    own = np.array([residue in (0, first - residue) for residue in residues])
    slots = [np.where(own[:, None] & (2 * frequency > length), -1, frequency)]
    place = {int(q): i for i, q in enumerate(higher)}
    further: dict[int, NDArray[np.int64]] = {}
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
        stage = _stage(factors, j, _digits(residues, factors[:j], 1))
        stages.append(_flat(np.swapaxes(stage, -1, -2)))
    angle = 2 * np.pi * (np.arange(first)[:, None] * residues[None, :] % first) / first
    outer = np.stack([np.cos(angle), -np.sin(angle)], -1).reshape(first, -1)
    return RealInverse(factors, slots, tuple(stages), outer)
