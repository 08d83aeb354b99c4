"""Image files in; objects as JSON, overlays and instance masks out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdconv_deploy.runtime.files import PassedOver, pictures_in, result_places, write_whole
from fdconv_deploy.runtime.rendering import encode
from fdconv_deploy.runtime.session import Session

from .detection import SHOWN_SCORE, Detection


@dataclass(frozen=True)
class DetectionResult:
    """What was written for one image; ``mask`` is None when the network gives no masks."""

    image: Path
    objects: Path
    overlay: Path
    mask: Path | None
    detection: Detection

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, sizes, how the image was fitted, seconds, and each object."""
        found = self.detection
        return {
            "image": str(self.image),
            "objects": str(self.objects),
            "overlay": str(self.overlay),
            "mask": None if self.mask is None else str(self.mask),
            "height": found.image_size[0],
            "width": found.image_size[1],
            "fit": found.fit,
            "resized_to": list(found.resized_to),
            "seconds": {k: round(v, 4) for k, v in found.timings.items()},
            "instances": found.as_dicts(),
        }

    def as_line(self) -> str:
        """For a person: how many of which classes, how the image was fitted, and the time."""
        found = self.detection
        names = Counter(found.classes[label] for label in found.labels.tolist())
        counts = ", ".join(f"{number} {name}" for name, number in names.most_common(6))
        milliseconds = sum(found.timings.values()) * 1e3
        return f"{self.objects}: {counts or 'nothing'} ({found.fit}, {milliseconds:.0f} ms)"


def detect_files(
    session: Session,
    images: Sequence[Path],
    folder: Path,
    *,
    min_score: float = SHOWN_SCORE,
    opacity: float = 0.5,
    overwrite: bool = False,
    passed_over: PassedOver | None = None,
) -> Iterator[DetectionResult]:
    """Find objects in images one by one and write them down.

    For each, ``NAME.json``, ``NAME_overlay.png`` and, where the network gives masks,
    ``NAME.png``, which numbers the objects in the order of the JSON, from 1.

    :param min_score: leave out objects that score less.
    :param overwrite: replace results that are there.
    :param passed_over: told of an image that cannot be read, instead of ending the rest.
    :raises ImageError: an image cannot be read, or two would be written to one name; before
        anything is written, also if a result is there already.
    """
    places = result_places(images, folder, (".json", "_overlay.png", ".png"), overwrite)
    for path, picture, (objects, overlay, mask) in pictures_in(places, passed_over):
        found = session.detect(picture).kept(min_score)
        result = DetectionResult(path, objects, overlay, mask if found.has_masks else None, found)
        write_whole(objects, json.dumps(result.as_dict(), indent=1).encode())
        write_whole(overlay, encode(found.overlay(picture, opacity), "PNG"))
        if found.has_masks:
            write_whole(mask, found.mask_png())
        yield result
