"""``fdconv::FrequencyBandModulation``: each band of an input weighted by its own map.

    y = sum over terms t of factor[t] ∘ low[t],  low[0] = x, factor = mix · act(conv(x)) + bias

Inputs, in order (B images, I channels in g groups, H × W; see `fdconv_deploy.folding.bands`):

    x               (B, I, H, W) float32
    conv_weight     (I, weighted, s, s) float32, of a transposed convolution
    conv_bias       (g·weighted,) float32
    mix             (terms, weighted) float32
    mix_bias        (terms, 1) float32
    to_columns      (W, 2·frequencies) float32
    to_rows         (rows, H') float32
    from_rows…      per band: (H', rows of the band) float32
    from_columns…   per band: (columns of the band, W) float32

Output: ``(B, I, H, W)`` float32.

Attributes, beside the shapes that the body reshapes to: ``layer`` (its name), ``groups`` g,
``feature_size`` H, W, ``softmax`` (1: over groups, in place of sigmoids) and ``complex_rows`` (1:
projected rows are complex, real and imaginary parts a row each).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def frequency_band_modulation(x: Float64, weights: Float64, masks: Float64) -> Float64:
    """What the operator means: each band of ``x`` weighed, by numpy's FFT.

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
