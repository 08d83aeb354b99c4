"""Image files in; objects as JSON, overlays and instance masks out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fdconv_deploy.runtime.detection import SHOWN_SCORE, Detection
from fdconv_deploy.runtime.detection_pipeline import PreparedDetection
from fdconv_deploy.runtime.input_files import Source
from fdconv_deploy.runtime.result_files import (
    Answering,
    Failed,
    answered,
    make_folder,
    result_places,
    write_whole,
)
from fdconv_deploy.runtime.session import Session
from fdconv_deploy.runtime.visualization import encode


@dataclass(frozen=True)
class DetectionResult:
    """What was written for one image.

    ``mask`` is None when the network gives no masks, ``overlay`` where none was asked for.
    """

    image: Path
    objects: Path
    overlay: Path | None
    mask: Path | None
    detection: Detection

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, sizes, how the image was fitted, seconds, and each object."""
        found = self.detection
        return {
            "image": str(self.image),
            "objects": str(self.objects),
            "overlay": None if self.overlay is None else str(self.overlay),
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


def detector_answering(session: Session, min_score: float) -> Answering[Any, Detection]:
    """A detector's way to answer, the bundle's largest batch at a time.

    Args:
        session: on a detector's bundle.
        min_score: leave out objects that score less.
    """

    def run(prepared: Sequence[PreparedDetection]) -> list[Detection]:
        start = time.perf_counter()
        rows = session.run(np.stack([one.input for one in prepared]))
        each = (time.perf_counter() - start) / len(prepared)
        return [
            session.finish_detection(one, row, inference_seconds=each).kept(min_score)
            for one, row in zip(prepared, rows, strict=True)
        ]

    return Answering(session.read_image, session.prepare_detection, run, session.batch_sizes[-1])


def detect_files(
    session: Session,
    sources: Sequence[Source],
    folder: Path,
    *,
    min_score: float = SHOWN_SCORE,
    opacity: float = 0.5,
    overlays: bool = True,
    overwrite: bool = False,
    skip_existing: bool = False,
    skipped: Callable[[Path], None] | None = None,
    failed: Failed | None = None,
) -> Iterator[DetectionResult]:
    """Find objects in images and write them down.

    For each, ``NAME.json``, ``NAME_overlay.png`` and, where the network gives masks,
    ``NAME.png``, which numbers the objects in the order of the JSON, from 1.

    Args:
        session: on a detector's bundle.
        sources: images; see `sources_at`. Their names may have folders, which are made.
        folder: where results go; made if it is not there.
        min_score: leave out objects that score less.
        opacity: of the masks' colours over the image, 0 to 1.
        overlays: whether to write overlays.
        overwrite: replace results that are there.
        skip_existing: leave out images whose results are all there.
        skipped: called with each image left out for that, before the first result.
        failed: called with an image that cannot be read, instead of ending the rest.

    Raises:
        ImageError: an image cannot be read, or two would be written to one name; before
            anything is written, also if a result is there already.
    """
    endings = [".json"]
    endings += ["_overlay.png"] if overlays else []
    endings += [".png"] if session.finds_masks else []
    places = result_places(sources, folder, endings, overwrite, skip_existing, skipped)
    answering = detector_answering(session, min_score)
    for path, picture, targets, found in answered(answering, places, failed):
        make_folder(targets[0].parent)
        at = dict(zip(endings, targets, strict=True))
        result = DetectionResult(path, at[".json"], at.get("_overlay.png"), at.get(".png"), found)
        if result.overlay is not None:
            write_whole(result.overlay, encode(found.overlay(picture, opacity), "PNG"))
        if result.mask is not None:
            write_whole(result.mask, found.mask_png())
        # Last, so that a JSON file that is there belongs to an image that is done.
        write_whole(result.objects, json.dumps(result.as_dict(), indent=1).encode())
        yield result
