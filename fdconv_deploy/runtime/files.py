"""Image files in, mask and overlay files out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import ImageError

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
    passed_over: PassedOver | None = None,
) -> Iterator[FileResult]:
    """Segment images one by one and write ``NAME.png`` and ``NAME_overlay.png`` for each.

    :param passed_over: told of an image that cannot be read, instead of ending the rest.
    :raises ImageError: an image cannot be read, or two would be written to one name.
    """
    endings = (".png", "_overlay.png")
    for path, picture, (mask, overlay) in pictures_in(images, folder, endings, passed_over):
        result = session.segment(picture, fit=cast("Fit | None", fit))
        write_whole(mask, result.mask_png())
        write_whole(overlay, encode(result.overlay(picture, opacity), "PNG"))
        yield FileResult(path, mask, overlay, result)


def pictures_in(
    images: Sequence[Path],
    folder: Path,
    endings: Sequence[str],
    passed_over: PassedOver | None = None,
) -> Iterator[tuple[Path, npt.NDArray[np.uint8], list[Path]]]:
    """Each image's path, its pixels, and where its results go: ``NAME`` and each ending.

    :raises ImageError: an image cannot be read, or would be overwritten, or two images'
        results would be written to one name.
    """
    _check_names(images, endings)
    folder.mkdir(parents=True, exist_ok=True)
    for path in images:
        try:
            picture = read_image(path)
        except ImageError as error:
            if passed_over is None:
                raise
            passed_over(path, error)
            continue
        targets = [folder / f"{path.stem}{ending}" for ending in endings]
        if path.resolve() in [target.resolve() for target in targets]:
            raise ImageError(
                f"{path} would be overwritten by its own results. Give another output folder."
            )
        yield path, picture, targets


def _check_names(images: Sequence[Path], endings: Sequence[str]) -> None:
    seen: dict[str, Path] = {}
    for path in images:
        for name in (f"{path.stem}{ending}" for ending in endings):
            if name in seen:
                raise ImageError(
                    f"{seen[name]} and {path} would both be written to {name}. "
                    "Segment them into two folders."
                )
            seen[name] = path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
