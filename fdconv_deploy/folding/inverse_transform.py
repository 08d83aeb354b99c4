"""The inverse 2-d real Fourier transform as four small constant matrix products.

A length N = N1·N2 inverse transform is N2 transforms of length N1, a twiddle, and N1 of
length N2 (Cooley and Tukey 1965). Here the twiddle is folded into the first stage, whose
matrices then differ per batch entry, real and imaginary parts are two more rows of every
matrix, and the data is laid out so that each product finds its contraction axis where it
needs it: no transposition but one between the two axes, no elementwise pass, no FFT.

The columns of the kernel matrix are inverted first, as complex numbers; the rows last,
onto real numbers, where Hermitian symmetry halves the work. ``folding/spectrum.py`` lays
the constant spectrum out to match.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """``length = first · second``: the sizes of the two stages."""

    first: int
    second: int

    @property
    def length(self) -> int:
        """Of the whole transform."""
        return self.first * self.second


def _pairs(length: int) -> list[Factors]:
    """All factor pairs; the second of an even length is even.

    So frequency length/2 falls on the second index alone.
    """
    pairs = [Factors(a, length // a) for a in range(1, length + 1) if length % a == 0]
    return pairs if length % 2 else [pair for pair in pairs if pair.second % 2 == 0]


def complex_factors(length: int) -> Factors:
    """Factors of the complex transform: both stages cost the same per point.

    Of equally cheap pairs, the one with the shorter second stage, which is `inner`'s: its
    matrices differ per batch entry and take the room.
    """
    return min(_pairs(length), key=lambda p: (p.first + p.second, p.second))


def real_factors(length: int) -> Factors:
    """Factors of the real transform.

    A point of the first stage is complex and costs double, and the longer that stage is, the
    more of a spectrum's slots stay empty; hence the weight of three.
    """
    return min(_pairs(length), key=lambda p: (3 * p.first + p.second, p.first))


def _as_real(matrix: NDArray[np.complex128]) -> Float64:
    """Complex ``(…, m, k)`` -> real ``(…, 2, m, 2, k)`` acting on (real, imaginary) pairs."""
    real, imaginary = matrix.real, matrix.imag
    rows = [np.stack([real, -imaginary], -2), np.stack([imaginary, real], -2)]
    return np.stack(rows, -4)


@dataclass(frozen=True)
class ComplexInverse:
    """Length N inverse transform of complex data on the outermost axis.

    Frequency f = f1 + first·f2 and position c = second·c1 + c2; without the 1/N.

    Input ``(first, 2, second, …)`` = (f1, real/imaginary, f2, …). `inner`, one matrix per
    f1, takes (real/imaginary, f2) to (real/imaginary, c2); `outer` takes (f1,
    real/imaginary) to (real/imaginary, c1). The output is ``(2, N, …)`` in natural order.

    inner: ``(first, 2·second, 2·second)``; outer: ``(2·first, 2·first)``; float64.
    """

    factors: Factors
    inner: Float64
    outer: Float64


@lru_cache(maxsize=128)
def complex_inverse(length: int) -> ComplexInverse:
    """The matrices for one length."""
    factors = complex_factors(length)
    first, second = factors.first, factors.second
    f1, f2 = np.arange(first), np.arange(second)
    c1, c2 = f1, f2
    # exp(2πi·f·c/N) with f = f1 + first·f2, c = second·c1 + c2; the turns are reduced
    # in integers so that the angles stay exact.
    turns = (f1[:, None, None] + first * f2[None, None, :]) * c2[None, :, None] % length
    inner = _as_real(np.exp(2j * np.pi * turns / length))
    inner = inner.reshape(first, 2 * second, 2 * second)
    turns = c1[:, None] * f1[None, :] % first
    outer = _as_real(np.exp(2j * np.pi * turns / first))  # (ri', c1, ri, f1)
    outer = outer.transpose(0, 1, 3, 2).reshape(2 * first, 2 * first)
    return ComplexInverse(factors, inner, outer)


@dataclass(frozen=True)
class RealInverse:
    """Length N inverse transform of a Hermitian half spectrum, onto real numbers.

    Position r = first·r2 + r1; without the 1/N. The half spectrum's frequencies
    q = 0 … N//2 are grouped into classes of equal ±q modulo second; `slots` tells where
    each is: ``(classes, first)`` int64, -1 where a class has fewer than ``first``. A
    frequency may have a second slot, in which case the transform adds the two.

    Input ``(classes, first, 2, …)`` = (class, slot, real/imaginary, …). `inner`, one matrix
    per class, takes (slot, real/imaginary) to (real/imaginary, r1); `outer` takes (class,
    real/imaginary) to r2. The output is ``(N, …)`` in natural order.

    inner: ``(classes, 2·first, 2·first)``; outer: ``(second, 2·classes)``; float64.
    The imaginary parts of frequency 0 and of the Nyquist frequency are ignored.
    """

    factors: Factors
    slots: NDArray[np.int64]
    inner: Float64
    outer: Float64

    @property
    def classes(self) -> int:
        """Number of frequency classes: ``second // 2 + 1``, and more to hold second slots."""
        return self.slots.shape[0]


def _frequency_classes(
    length: int, factors: Factors, repeated: tuple[int, ...]
) -> list[tuple[int, list[int]]]:
    """(residue, frequencies) of each class, none with more than ``first`` frequencies."""
    members: list[list[int]] = [[] for _ in range(factors.second // 2 + 1)]
    for q in [*range(length // 2 + 1), *repeated]:
        residue = q % factors.second
        members[min(residue, factors.second - residue)].append(q)
    classes = [(residue, some[: factors.first]) for residue, some in enumerate(members)]
    for residue, some in enumerate(members):
        starts = range(factors.first, len(some), factors.first)
        classes += [(residue, some[start : start + factors.first]) for start in starts]
    return classes


@lru_cache(maxsize=128)
def real_inverse(length: int, repeated: tuple[int, ...] = ()) -> RealInverse:
    """The matrices for one length, with second slots for the ``repeated`` frequencies."""
    factors = real_factors(length)
    first, second = factors.first, factors.second
    classes = _frequency_classes(length, factors, repeated)
    r1, r2 = np.arange(first), np.arange(second)
    slots = np.full((len(classes), first), -1, dtype=np.int64)
    inner = np.zeros((len(classes), first, 2, 2, first))  # (class, slot, ri, ri', r1)
    for row, (residue, members) in enumerate(classes):
        slots[row, : len(members)] = members
        for slot, q in enumerate(members):
            # A stored frequency stands for itself and for its mirror image; each adds to
            # the class's sum if it is in this residue class (of q, not of ±q).
            self_mirrored = q in (0, length - q)
            images = [(q, 1)] if self_mirrored else [(q, 1), (length - q, -1)]
            for frequency, sign in images:
                if frequency % second != residue:
                    continue
                wave = np.exp(2j * np.pi * (frequency * r1 % length) / length)
                inner[row, slot, 0] += np.stack([wave.real, wave.imag])
                if not self_mirrored:  # times i, or -i for the mirror image
                    inner[row, slot, 1] += sign * np.stack([-wave.imag, wave.real])
    matrices = inner.reshape(len(classes), 2 * first, 2 * first).transpose(0, 2, 1)
    residues = np.array([residue for residue, _ in classes])
    angle = 2 * np.pi * (r2[:, None] * residues[None, :] % second) / second
    # Every class but the self-mirrored ones stands for two of the `second` residues.
    twice = np.where((residues == 0) | (2 * residues == second), 1.0, 2.0)
    outer = np.stack([twice * np.cos(angle), -twice * np.sin(angle)], -1)
    return RealInverse(factors, slots, matrices.copy(), outer.reshape(second, 2 * len(classes)))
