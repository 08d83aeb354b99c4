"""Image files in, mask and overlay files out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import ImageError, in_the_way

from .decoding import read_image
from .manifest import Fit
from .rendering import encode
from .segmentation import Segmentation
from .session import Session

PassedOver = Callable[[Path, ImageError], None]


@dataclass(frozen=True)
class FileResult:
    """What was written for one image."""

    image: Path
    mask: Path
    overlay: Path
    segmentation: Segmentation

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, size, how the image was fitted, seconds, and each class's share."""
        labels = self.segmentation.labels
        shares = self.segmentation.areas() / labels.size
        return {
            "image": str(self.image),
            "mask": str(self.mask),
            "overlay": str(self.overlay),
            "height": labels.shape[0],
            "width": labels.shape[1],
            "fit": self.segmentation.fit,
            "mode": self.segmentation.mode,
            "seconds": {k: round(v, 4) for k, v in self.segmentation.timings.items()},
            "classes": {
                name: round(float(share), 4)
                for name, share in zip(self.segmentation.classes, shares, strict=True)
                if share
            },
        }

    def as_line(self) -> str:
        """For a person: the largest classes, how the image was fitted, and the time."""
        facts = self.as_dict()
        largest = sorted(facts["classes"].items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in largest)
        milliseconds = sum(self.segmentation.timings.values()) * 1e3
        return f"{self.mask}: {shares} ({facts['fit']}, {milliseconds:.0f} ms)"


def segment_files(
    session: Session,
    images: Sequence[Path],
    folder: Path,
    *,
    fit: str | None = None,
    opacity: float = 0.5,
    overwrite: bool = False,
    passed_over: PassedOver | None = None,
) -> Iterator[FileResult]:
    """Segment images one by one and write ``NAME.png`` and ``NAME_overlay.png`` for each.

    :param overwrite: replace results that are there.
    :param passed_over: told of an image that cannot be read, instead of ending the rest.
    :raises ImageError: an image cannot be read, or two would be written to one name; before
        anything is written, also if a result is there already.
    """
    places = result_places(images, folder, (".png", "_overlay.png"), overwrite)
    for path, picture, (mask, overlay) in pictures_in(places, passed_over):
        result = session.segment(picture, fit=cast("Fit | None", fit))
        write_whole(mask, result.mask_png())
        write_whole(overlay, encode(result.overlay(picture, opacity), "PNG"))
        yield FileResult(path, mask, overlay, result)


def result_places(
    images: Sequence[Path], folder: Path, endings: Sequence[str], overwrite: bool
) -> dict[Path, list[Path]]:
    """Where each image's results go, ``NAME`` and each ending, in a folder that is made.

    :raises ImageError: an image would be overwritten, a result is there already, or two
        images' results would be written to one name.
    """
    places: dict[Path, list[Path]] = {}
    taken: dict[Path, Path] = {}
    given = {image.resolve(): image for image in images}
    for image in images:
        places[image] = targets = [folder / f"{image.stem}{ending}" for ending in endings]
        for target in targets:
            if target in taken:
                raise ImageError(
                    f"{taken[target]} and {image} would both be written to {target.name}. "
                    "Segment them into two folders."
                )
            taken[target] = image
    for target in taken:
        if target.resolve() in given:
            raise ImageError(
                f"{given[target.resolve()]} would be overwritten by results. Give another output "
                "folder."
            )
        if target.exists() and not overwrite:
            raise in_the_way(ImageError, f"The result {target} is there already.")
    folder.mkdir(parents=True, exist_ok=True)
    return places


def pictures_in(
    places: dict[Path, list[Path]], passed_over: PassedOver | None = None
) -> Iterator[tuple[Path, npt.NDArray[np.uint8], list[Path]]]:
    """Each image's path, its pixels, and where its results go.

    :raises ImageError: an image cannot be read, and nobody is to be told instead.
    """
    for path, targets in places.items():
        try:
            picture = read_image(path)
        except ImageError as error:
            if passed_over is None:
                raise
            passed_over(path, error)
            continue
        yield path, picture, targets


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
