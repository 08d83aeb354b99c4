"""Limits that a report must keep, for continuous integration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fdconv_deploy.latency.report import row_name


@dataclass(frozen=True)
class Floors:
    """What every row must keep; None asks for nothing.

    ``images_per_second``: the least. ``milliseconds``: the longest median. ``ratio``: how many
    times the first side's median another may take.
    """

    images_per_second: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None

    def broken(self, report: dict[str, Any]) -> Iterator[str]:
        """A sentence for every limit that a row does not keep."""
        for row in report["rows"]:
            name, rate, median = row_name(row), row["images_per_second"], row["ms"]["p50"]
            over = row["over_first"]
            if self.images_per_second is not None and rate < self.images_per_second:
                yield f"{name}: {rate:.2f} images/s, {self.images_per_second:g} are asked for."
            if self.milliseconds is not None and median > self.milliseconds:
                yield f"{name}: {median:.2f} ms, at most {self.milliseconds:g} are allowed."
            if self.ratio is not None and over is not None and over["value"] > self.ratio:
                yield (
                    f"{name}: {over['value']:.3f} times the first side's time, at most "
                    f"{self.ratio:g} are allowed."
                )
