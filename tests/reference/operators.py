"""What the operators mean, by numpy's FFT."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.folding.spectrum import FoldedSpectrum

Float64 = NDArray[np.float64]


def frequency_assembly(attention: Float64, spectrum: FoldedSpectrum) -> Float64:
    """Kernel matrices from kernel attention, by numpy's FFT.

    Args:
        attention: ``(B, n)``.
        spectrum: of a matrix of R rows and C columns.

    Returns:
        ``(B, R, C)`` float64.
    """
    values, groups = spectrum.by_frequency()
    total = (values.astype(np.complex128) * attention[:, groups]).sum(1)
    # numpy normalises, the folded spectrum already is.
    size = spectrum.rows, spectrum.columns
    return np.fft.irfft2(total, s=size, norm="forward")


def frequency_band_modulation(x: Float64, weights: Float64, masks: Float64) -> Float64:
    """Each band of ``x`` weighed, by numpy's FFT.

    Args:
        x: ``(B, I, H, W)``.
        weights: ``(weighted, B, g, H, W)``, one map per band and group; one more than there
            are masks where the last low-pass is weighted too.
        masks: ``(bands, H, W//2+1)`` of 0 and 1.

    Returns:
        ``(B, I, H, W)`` float64.
    """
    batch, channels, height, width = x.shape
    groups = weights.shape[2]
    spectrum = np.fft.rfft2(x)
    # numpy's irfft2 inverts rows, then drops imaginary parts of column 0, as torch's does.
    lows = [np.fft.irfft2(spectrum * mask, s=(height, width)) for mask in masks]
    previous, total = x, np.zeros_like(x)

    def weighted(band: int, part: Float64) -> Float64:
        grouped = part.reshape(batch, groups, channels // groups, height, width)
        return (weights[band][:, :, None] * grouped).reshape(x.shape)

    for band, low in enumerate(lows):
        total = total + weighted(band, previous - low)
        previous = low
    return total + (weighted(len(lows), previous) if len(weights) > len(lows) else previous)
