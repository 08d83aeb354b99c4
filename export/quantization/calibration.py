"""How large activations get: histograms over images, and the range worth eight bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError

BINS = 4096
PERCENTILE = 99.99


class Magnitudes:
    """A histogram of absolute values whose range doubles when a larger one comes."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.range = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Count values of any shape.

        Raises:
            ExportError: some are not finite.
        """
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0))
        if not np.isfinite(largest):
            raise ExportError("a calibration image gives activations that are not finite.")
        if largest == 0:
            self.counts[0] += magnitudes.size
            return
        if self.range == 0:
            self.range = largest
        while largest > self.range:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(1)
            self.counts[BINS // 2 :] = 0
            self.range *= 2
        self.counts += np.histogram(magnitudes, BINS, (0, self.range))[0]

    def scale(self, levels: int) -> float:
        """The step at which ``levels`` of them reach the 99.99th percentile.

        The few values beyond are cut off, so that all others are stored more finely. 1 where
        every value was 0.
        """
        if self.range == 0:
            return 1.0
        below = np.cumsum(self.counts)
        place = int(np.searchsorted(below, PERCENTILE / 100 * below[-1]))
        return self.range * (place + 1) / BINS / levels


def magnitudes(
    model: Path, tensors: Iterable[str], feeds: Iterable[dict[str, NDArray]]
) -> dict[str, Magnitudes]:
    """Run a model and count each tensor's values.

    Args:
        model: with ``tensors`` among its outputs.
        feeds: what is fed, one run each.

    Raises:
        ExportError: as `Magnitudes.add`.
    """
    names = list(tensors)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    seen = {name: Magnitudes() for name in names}
    for feed in feeds:
        for name, values in zip(names, session.run(names, feed), strict=True):
            seen[name].add(values)
    return seen
