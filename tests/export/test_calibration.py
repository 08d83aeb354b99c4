"""Ranges of activations from histograms."""

from __future__ import annotations

import numpy as np
import pytest
from fdconv_deploy.export.quantization.calibration import BINS, Magnitudes

from fdconv_deploy.errors import ExportError

RNG = np.random.default_rng(0)


def test_the_range_grows_with_what_comes():
    values = RNG.normal(size=50_000).astype(np.float32)
    seen = Magnitudes()
    for part in np.split(values[np.argsort(np.abs(values))], 10):  # each larger than the last
        seen.add(part)
    exact = np.quantile(np.abs(values), 0.9999)
    assert int(seen.counts.sum()) == values.size
    assert seen.scale(127) * 127 == pytest.approx(exact, abs=2 * seen.range / BINS)
    assert seen.scale(255) == pytest.approx(seen.scale(127) * 127 / 255)


def test_few_far_values_do_not_count():
    seen = Magnitudes()
    seen.add(np.linspace(-1, 1, 100_000))
    seen.add(np.full(3, 50.0))
    assert seen.scale(100) == pytest.approx(0.01, rel=0.05)


def test_zeros():
    seen = Magnitudes()
    seen.add(np.zeros(10))
    assert seen.scale(127) == 1
    seen.add(np.full(1000, 2.0))
    assert seen.scale(127) == pytest.approx(2 / 127, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(ExportError, match="not finite"):
        Magnitudes().add(np.array([1, value], np.float32))
