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
    frequencies, values, groups = spectrum.by_frequency()
    by_slot = (values.astype(np.complex128) * attention[:, groups]).sum(1)
    half = np.zeros((len(attention), rows // 2 + 1, columns), dtype=np.complex128)
    for place, q in enumerate(frequencies):
        half[:, q] += by_slot[:, place]
    # numpy normalises, the folded spectrum already is.
    matrix = np.fft.irfft(np.fft.ifft(half, axis=2), n=rows, axis=1)
    return matrix * (rows * columns)
