"""What ``fdconv::FrequencyAssembly`` means, in float64 numpy, without its matrices."""

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
    rows, columns = spectrum.rows, spectrum.columns
    factors = spectrum.column_transform.factors
    slots = spectrum.row_transform.slots.reshape(-1)
    values = spectrum.values[:, :, 0].astype(np.float64) + 1j * spectrum.values[:, :, 1]
    total = (values * attention[:, spectrum.groups]).sum(1)  # (B, f1, f2, slot)
    by_slot = total.transpose(0, 3, 2, 1).reshape(len(attention), len(slots), factors.length)
    half = np.zeros((len(attention), rows // 2 + 1, columns), dtype=np.complex128)
    for place, q in enumerate(slots):
        if q >= 0:
            half[:, q] += by_slot[:, place]
    # numpy normalises, the folded spectrum already is.
    matrix = np.fft.irfft(np.fft.ifft(half, axis=2), n=rows, axis=1)
    return matrix * (rows * columns)
