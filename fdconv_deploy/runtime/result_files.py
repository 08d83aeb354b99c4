"""Image files in, mask and overlay files out."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import ImageError, in_the_way
from fdconv_deploy.runtime.detection import SHOWN_SCORE, Detection, PreparedDetection
from fdconv_deploy.runtime.input_files import CLASSES_NAME, LEGEND_NAME, Source
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.segmentation import Prepared, Segmentation
from fdconv_deploy.runtime.session import Session
from fdconv_deploy.runtime.visualization import encode, legend

Picture = npt.NDArray[Any]
Failed = Callable[[Path, ImageError], None]
P = TypeVar("P")
A = TypeVar("A")


@dataclass(frozen=True)
class FileResult:
    """What was written for one image; ``overlay`` is None where none was asked for."""

    image: Path
    mask: Path
    overlay: Path | None
    segmentation: Segmentation

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, size, how the image was fitted, seconds, and each class's share."""
        return {
            "image": str(self.image),
            "mask": str(self.mask),
            "overlay": None if self.overlay is None else str(self.overlay),
            "height": self.segmentation.labels.shape[0],
            "width": self.segmentation.labels.shape[1],
            "fit": self.segmentation.fit,
            "mode": self.segmentation.mode,
            "seconds": {k: round(v, 4) for k, v in self.segmentation.timings.items()},
            "classes": {n: round(share, 4) for n, share in class_shares(self.segmentation).items()},
        }

    def as_line(self) -> str:
        """For a person: the largest classes, how the image was fitted, and the time."""
        largest = sorted(class_shares(self.segmentation).items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in largest)
        milliseconds = sum(self.segmentation.timings.values()) * 1e3
        return f"{self.mask}: {shares} ({self.segmentation.fit}, {milliseconds:.0f} ms)"


def class_shares(found: Segmentation) -> dict[str, float]:
    """The share of the image's pixels, 0 to 1, of each class that is in it."""
    shares = found.areas() / found.labels.size
    pairs = zip(found.classes, shares, strict=True)
    return {name: float(share) for name, share in pairs if share}


@dataclass(frozen=True)
class Answering(Generic[P, A]):
    """How a kind of network answers images, several at a time.

    Attributes:
        read: an image's file to its pixels, as `Session.read_image`.
        prepare: one image's pixels to a network's input.
        run: several prepared images to as many answers.
        batch: the most images of one run.
    """

    read: Callable[[Path], Picture]
    prepare: Callable[[Picture], P]
    run: Callable[[Sequence[P]], list[A]]
    batch: int

    def __call__(self, picture: Picture) -> A:
        """The answer to one image."""
        return self.run([self.prepare(picture)])[0]


def segmentor_answering(session: Session, fit: str | None = None) -> Answering[Any, Segmentation]:
    """A segmentor's way to answer: the bundle's largest batch at a time, or crops of one image.

    Args:
        session: on a segmentor's bundle.
        fit: as `Session.segment`.
    """
    chosen = cast("Fit | None", fit)
    if session.mode == "slide":  # crops of one image fill the batches
        return Answering(
            session.read_image,
            lambda image: image,
            lambda images: [*map(session.segment, images)],
            1,
        )

    def run(prepared: Sequence[Prepared]) -> list[Segmentation]:
        start = time.perf_counter()
        logits = session.run(np.stack([one.input for one in prepared]))
        each = (time.perf_counter() - start) / len(prepared)
        return [
            session.finish(one, row, inference_seconds=each)
            for one, row in zip(prepared, logits, strict=True)
        ]

    return Answering(
        session.read_image,
        lambda image: session.prepare(image, fit=chosen),
        run,
        session.batch_sizes[-1],
    )


def segment_files(
    session: Session,
    sources: Sequence[Source],
    folder: Path,
    *,
    fit: str | None = None,
    opacity: float = 0.5,
    overlays: bool = True,
    overwrite: bool = False,
    skip_existing: bool = False,
    skipped: Callable[[Path], None] | None = None,
    failed: Failed | None = None,
) -> Iterator[FileResult]:
    """Segment images and write ``NAME.png`` and ``NAME_overlay.png`` for each.

    Beside them, ``classes.json`` and ``legend.png`` tell each mask value's class and colour.

    Args:
        session: on a segmentor's bundle.
        sources: images; see `sources_at`. Their names may have folders, which are made.
        folder: where results go; made if it is not there.
        fit: as `Session.segment`.
        opacity: of the classes' colours over the image, 0 to 1.
        overlays: whether to write overlays.
        overwrite: replace results that are there.
        skip_existing: leave out images whose results are all there, to go on with a run that
            was stopped.
        skipped: called with each image left out for that, before the first result.
        failed: called with an image that cannot be segmented, instead of ending the rest.

    Raises:
        ImageError: an image cannot be read, or two would be written to one name; before
            anything is written, also if a result is there already.
    """
    endings = (".png", "_overlay.png") if overlays else (".png",)
    places = result_places(sources, folder, endings, overwrite, skip_existing, skipped)
    write_legend(session, folder, overwrite)
    answering = segmentor_answering(session, fit)
    for path, picture, targets, result in answered(answering, places, failed):
        make_folder(targets[0].parent)
        if overlays:
            write_whole(targets[1], encode(result.overlay(picture, opacity), "PNG"))
        # Last, so that a mask that is there belongs to an image that is done.
        write_whole(targets[0], result.mask_png())
        yield FileResult(path, targets[0], targets[1] if overlays else None, result)


def result_places(
    sources: Sequence[Source],
    folder: Path,
    endings: Sequence[str],
    overwrite: bool,
    skip_existing: bool = False,
    skipped: Callable[[Path], None] | None = None,
) -> dict[Path, list[Path]]:
    """Where each image's results go: its name in ``folder`` and each ending.

    Args:
        sources: the images.
        folder: for the results.
        endings: of the results of one image.
        overwrite: results that are there may be replaced.
        skip_existing: images whose results are all there are left out.
        skipped: called with each image left out.

    Raises:
        ImageError: an image would be overwritten, a result is there already, or two
            images' results would be written to one name.
    """
    places: dict[Path, list[Path]] = {}
    taken: dict[Path, Path] = {}
    given = {source.path.resolve(): source.path for source in sources}
    for source in sources:
        targets = [folder / f"{source.name}{ending}" for ending in endings]
        for target in targets:
            if target in taken:
                raise ImageError(
                    f"{taken[target]} and {source.path} would both be written to "
                    f"{target.relative_to(folder)}. Segment them into two folders."
                )
            if target.resolve() in given:
                raise ImageError(
                    f"{given[target.resolve()]} would be overwritten by results. Give another "
                    "output folder."
                )
            taken[target] = source.path
        if skip_existing and all(is_there(target) for target in targets):
            if skipped is not None:
                skipped(source.path)
            continue
        places[source.path] = targets
        for target in targets:
            if target.exists() and not (overwrite or skip_existing):
                raise in_the_way(ImageError, f"The result {target} is there already.")
    return places


def answered(
    answering: Answering[P, A], places: dict[Path, list[Path]], failed: Failed | None = None
) -> Iterator[tuple[Path, Picture, list[Path], A]]:
    """Each image's path, its pixels, where its results go, and its answer, in order.

    Raises:
        ImageError: an image cannot be read or prepared, and ``failed`` was not given.
    """
    waiting: list[tuple[Path, Picture, list[Path], P]] = []

    def flush() -> Iterator[tuple[Path, Picture, list[Path], A]]:
        answers = answering.run([prepared for *_, prepared in waiting]) if waiting else []
        for (path, picture, targets, _), answer in zip(waiting, answers, strict=True):
            yield path, picture, targets, answer
        waiting.clear()

    for path, targets in places.items():
        try:
            picture = answering.read(path)
            waiting.append((path, picture, targets, answering.prepare(picture)))
        except ImageError as error:
            if str(path) not in str(error):
                error = type(error)(f"{path}: {error}")
            if failed is None:
                raise error from None
            yield from flush()
            failed(path, error)
        if len(waiting) == answering.batch:
            yield from flush()
    yield from flush()


def write_legend(session: Session, folder: Path, overwrite: bool) -> None:
    """Write ``classes.json`` and ``legend.png``: the class and colour of each mask value.

    Raises:
        ImageError: the folder holds those of other classes, and ``overwrite`` is False.
    """
    entries = [
        {"id": number, "name": name, "color": list(colour)}
        for number, (name, colour) in enumerate(zip(session.classes, session.palette, strict=True))
    ]
    text = json.dumps(entries, indent=1, ensure_ascii=False).encode() + b"\n"
    file = folder / CLASSES_NAME
    if file.exists() and file.read_bytes() != text and not overwrite:
        raise in_the_way(ImageError, f"{file} is there already, and lists other classes.")
    make_folder(folder)
    write_whole(folder / LEGEND_NAME, encode(legend(session.classes, session.palette), "PNG"))
    write_whole(file, text)


def is_there(result: Path) -> bool:
    """Whether a result was written: an empty file is what a full disk leaves."""
    return result.is_dir() or (result.is_file() and result.stat().st_size > 0)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ImageError: a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ImageError(
            f"Results cannot be written to the folder {folder}: a file is in the way. Give "
            "another output folder."
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
