"""The matrices against numpy's FFT, at any length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.folding.spectrum import complex_inverse, real_inverse

LENGTHS = st.integers(1, 400)


def apply_complex(values: np.ndarray) -> np.ndarray:
    """``(N,)`` complex through the stages, as documented."""
    transform = complex_inverse(len(values))
    # frequency f1 + n1·(f2 + …): the first digit is the fastest of the natural order
    digits = values.reshape(transform.factors[::-1]).transpose()
    pair = np.stack([digits.real, digits.imag], -2)  # (f1, …, f(m-1), ri, fm)
    x = pair.reshape(-1)
    for stage in transform.stages:
        x = stage @ x.reshape(len(stage), stage.shape[2], -1)
    x = x.reshape(2, len(values))
    return x[0] + 1j * x[1]


def apply_real(slotted: np.ndarray, length: int, repeated: tuple[int, ...]) -> np.ndarray:
    """Complex values in a transform's slots through the stages, as documented."""
    transform = real_inverse(length, repeated)
    weighted = slotted * transform.weight
    x = np.stack([weighted.real, weighted.imag], -1)
    for stage in transform.stages:
        x = stage @ x.reshape(len(stage), stage.shape[2], -1)
    return (transform.outer @ x.reshape(2 * transform.classes, -1)).reshape(-1)


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return np.abs(actual - expected).max() <= 1e-12 * np.sqrt(len(expected)) * 8


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(0, 99))
def test_complex_inverse_is_the_inverse_transform(length, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=length) + 1j * rng.normal(size=length)
    assert close(apply_complex(values), np.fft.ifft(values) * length)


@settings(deadline=None, max_examples=80)
@given(st.data(), LENGTHS, st.integers(0, 99))
def test_real_inverse_is_the_inverse_transform(data, length, seed):
    """Of a half spectrum whose frequencies lie in slots, some of them in two."""
    frequencies = st.integers(0, length // 2)
    repeated = tuple(sorted(data.draw(st.sets(frequencies, max_size=12))))
    slots = real_inverse(length, repeated).slots
    named = slots[slots >= 0]
    row = np.minimum(named, length - named)  # of a frequency or its mirror image
    assert sorted(row) == sorted([*range(length // 2 + 1), *repeated])
    rng = np.random.default_rng(seed)
    slotted = rng.normal(size=slots.shape) + 1j * rng.normal(size=slots.shape)
    slotted[slots < 0] = 0
    stored = slotted[slots >= 0]
    half = np.zeros(length // 2 + 1, dtype=complex)
    np.add.at(half, row, np.where(named == row, stored, stored.conj()))  # its slots add up
    expected = np.fft.irfft(half, n=length) * length
    assert close(apply_real(slotted, length, repeated), expected)


def test_imaginary_parts_of_self_mirrored_frequencies_are_ignored():
    for length in (6, 7, 48, 96):
        slots = real_inverse(length).slots
        slotted = np.zeros(slots.shape, dtype=complex)
        slotted[(slots == 0) | (2 * slots == length)] = 5j
        assert np.abs(apply_real(slotted, length, ())).max() < 1e-12


@pytest.mark.parametrize("length", [96, 144, 768, 1536, 2304, 4608])
def test_lengths_of_published_layers_take_a_few_short_stages(length):
    """Far from the ``length`` multiplications per point of a plain matrix."""
    factors = complex_inverse(length).factors
    assert np.prod(factors) == length
    assert sum(factors) <= 4 * np.sqrt(length)
    factors = real_inverse(length).factors
    assert np.prod(factors) == length
    assert sum(factors) <= 4 * np.sqrt(length)


def test_short_and_prime_lengths_take_one_dense_stage():
    for length in (1, 2, 3, 7, 31, 127):
        assert complex_inverse(length).factors == (length,)
