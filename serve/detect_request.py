"""An image of a request to a detector, and its objects as the body of a response."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.polygons import class_rings
from fdconv_deploy.serve.responses import JPEG, MaskForm, Output, Writable
from fdconv_deploy.serve.segment_request import OneImage, Picture

from fdconv_deploy.runtime import Detection
from fdconv_deploy.runtime.visualization import encode


class DetectedImage(OneImage):
    """One image's way through a detector."""

    def answer(self) -> Writable:
        """The network's outputs as objects, and the time that took."""
        start = time.perf_counter()
        wanted, outcome = self._wanted, self._outcome
        assert outcome is not None
        found = self._session.finish_detection(self._prepared, outcome.rows[0])
        found = found.kept(wanted.min_score, wanted.kept)
        if found.has_masks and (wanted.form.output != "json" or wanted.mask != "none"):
            _ = found.pasted  # made here, so that it counts as what it is
        self.times["postprocess"] = time.perf_counter() - start
        kept = range(len(found.classes)) if wanted.kept is None else wanted.kept
        return Objects(
            self._version.name, found, self._image, self._name, self._timings_ms(), tuple(kept)
        )

    def _prepare(self, image: Picture) -> Any:
        return self._session.prepare_detection(image)


@dataclass(frozen=True)
class Objects:
    """One image's objects, to be written down.

    ``image`` (H, W, 3) uint8 where an overlay was asked for. ``kept`` are the classes asked for.
    """

    model: str
    found: Detection
    image: npt.NDArray[np.uint8] | None
    name: str | None
    timings_ms: dict[str, float]
    kept: tuple[int, ...]

    @property
    def fit(self) -> str:
        """How the image was brought to the network's size."""
        return self.found.fit

    def document(self, mask: MaskForm) -> dict[str, Any]:
        """As ``schemas.Detection``."""
        found = self.found
        entries = found.as_dicts(masks=mask == "rle")
        if mask == "polygons" and found.has_masks:
            areas = found.areas().tolist()
            for entry, part, area in zip(entries, found.pasted, areas, strict=True):
                rings = class_rings(part.pixels, 1)
                corner = (part.left, part.top)
                entry["area"] = area
                entry["mask"] = {
                    "size": list(found.image_size),
                    "rings": [[v + corner[i % 2] for i, v in enumerate(ring)] for ring in rings],
                }
        counts = np.bincount(found.labels, minlength=len(found.classes)).tolist()
        return {
            "model": self.model,
            "file": self.name,
            "height": found.image_size[0],
            "width": found.image_size[1],
            "fit": found.fit,
            "resized_to": list(found.resized_to),
            "classes": [
                {
                    "id": number,
                    "name": found.classes[number],
                    "color": found.palette[number],
                    "count": counts[number],
                }
                for number in self.kept
            ],
            "instances": [
                {"id": number, "area": None, "mask": None, **entry}
                for number, entry in enumerate(entries, 1)
            ],
            "timings_ms": self.timings_ms,
        }

    def file(self, output: Output, kind: str, opacity: float) -> bytes:
        """The overlay, or the PNG that numbers the objects."""
        if output == "overlay":
            assert self.image is not None
            picture = self.found.overlay(self.image, opacity)
            return encode(picture, "JPEG" if kind == JPEG else "PNG")
        return self.found.mask_png()
