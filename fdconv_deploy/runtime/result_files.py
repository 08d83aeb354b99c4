"""Results of ``fdconv segment``: images and videos in, masks, overlays and objects out."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.atomic_write import atomic_folder, atomic_path, write_atomically
from fdconv_deploy.errors import ImageError, in_the_way
from fdconv_deploy.runtime.detection import SHOWN_SCORE, Detection
from fdconv_deploy.runtime.input_files import CLASSES_NAME, LEGEND_NAME, AnyPath, Source
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.preprocessing import Prepared
from fdconv_deploy.runtime.segmentation import MultiScale, Segmentation
from fdconv_deploy.runtime.session import Session
from fdconv_deploy.runtime.video import VideoReader, VideoWriter
from fdconv_deploy.runtime.visualization import encode, legend

Answer = Segmentation | Detection
Failed = Callable[[PurePath, ImageError], None]
# A video, the number of frames answered, and the number its container announces, if any.
Progress = Callable[[PurePath, int, int | None], None]
_FRAME_MASK = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class ResultOptions:
    """Which results are written, and how.

    Attributes:
        fit: how a segmentor's images of another aspect ratio are fitted; as `Session.segment`.
        scales: of a segmentor, at which sizes each image is looked at, if at several.
        min_score: leave out a detector's objects that score less, 0 to 1.
        opacity: of the colours over the image, 0 to 1.
        overlays: whether to write overlays.
        mask_video: write a video's masks as a video in the classes' colours, not as a folder of
            one PNG a frame.
        overwrite: replace results that exist.
        skip_existing: skip files whose results all exist, to go on with a run that was stopped.
    """

    fit: Fit | None = None
    scales: MultiScale | None = None
    min_score: float = SHOWN_SCORE
    opacity: float = 0.5
    overlays: bool = True
    mask_video: bool = False
    overwrite: bool = False
    skip_existing: bool = False


@dataclass(frozen=True)
class ImageResult:
    """What was written for one image.

    Attributes:
        image: the file.
        places: each file written, by its kind: "mask", "overlay", a detector's "objects", or a
            panoptic network's "panoptic" and "objects".
        answer: the network's answer.
    """

    image: PurePath
    places: Mapping[str, PurePath]
    answer: Answer

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, size, how the image was fitted, seconds, and what was found."""
        found: dict[str, Any]
        if isinstance(self.answer, Detection):
            height, width = self.answer.image_size
            found = {
                "resized_to": list(self.answer.resized_to),
                "instances": self.answer.as_dicts(),
            }
        else:
            height, width = self.answer.labels.shape
            shares = {name: round(share, 4) for name, share in self.answer.shares().items()}
            found = {"mode": self.answer.mode, "classes": shares}
            if isinstance(self.answer, PanopticSegmentation):
                # An entry of the annotations of a COCO panoptic file.
                found["image_id"] = self.image.stem
                found["file_name"] = self.places["panoptic"].name
                found |= _segments_of(self.answer)
        return {
            "image": str(self.image),
            "mask": None,
            "overlay": None,
            **{kind: str(path) for kind, path in self.places.items()},
            "height": height,
            "width": width,
            "fit": self.answer.fit,
            "seconds": {k: round(v, 4) for k, v in self.answer.timings.items()},
            **found,
        }

    def as_line(self) -> str:
        """For a person: the most frequent classes, how the image was fitted, and the time."""
        if isinstance(self.answer, Detection):
            counts = Counter(self.answer.classes[label] for label in self.answer.labels.tolist())
            found = [f"{number} {name}" for name, number in counts.most_common(6)]
        else:
            shares = sorted(self.answer.shares().items(), key=lambda item: -item[1])
            found = [f"{name} {share:.0%}" for name, share in shares[:4]]
        milliseconds = sum(self.answer.timings.values()) * 1e3
        place = [*self.places.values()][-1]
        what = ", ".join(found) or "nothing"
        return f"{place}: {what} ({self.answer.fit}, {milliseconds:.0f} ms)"


@dataclass(frozen=True)
class VideoResult:
    """What was written for one video.

    Attributes:
        video: the file.
        places: what was written, by its kind: "masks" (a folder of one PNG a frame, or a video),
            "overlay" (a video), or a detector's "objects" (one JSON line a frame).
        frames: number of frames that were decoded and answered.
        expected: number of frames that the container announces; None where it does not.
        seconds: from the first frame to the last, decoding and encoding included.
    """

    video: PurePath
    places: Mapping[str, Path]
    frames: int
    expected: int | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, frames, seconds."""
        return {
            "video": str(self.video),
            "frames": self.frames,
            "expected_frames": self.expected,
            "masks": None,
            "overlay": None,
            "objects": None,
            **{kind: str(path) for kind, path in self.places.items()},
            "seconds": round(self.seconds, 3),
        }

    def as_line(self) -> str:
        """For a person: where the results are, how many frames, and how fast."""
        written = ", ".join(map(str, self.places.values()))
        rate = self.frames / self.seconds if self.seconds else 0.0
        cut = ""
        if self.expected is not None and self.frames < self.expected:
            cut = f" of {self.expected} announced: the file is cut off"
        return f"{written}: {self.frames} frames{cut} ({rate:.1f} frames/s)"


def segment_files(
    session: Session,
    sources: Sequence[Source],
    folder: Path,
    options: ResultOptions | None = None,
    *,
    skipped: Callable[[PurePath], None] | None = None,
    failed: Failed | None = None,
    progress: Progress | None = None,
) -> Iterator[ImageResult | VideoResult]:
    """Run inference on images, then on videos, and write each one's results as it is done.

    Of an image, a segmentor's mask ``NAME.png`` and ``NAME_overlay.png``; or a detector's
    ``NAME.json``, ``NAME_overlay.png`` and, where the network gives masks, ``NAME.png``, which
    numbers the objects in the order of the JSON, from 1. A panoptic network's ``NAME.png`` holds
    classes, ``NAME_panoptic.png`` segments as COCO's does, and ``NAME.json`` lists segments and
    objects. Of a video, see :class:`VideoResult`. A segmentor's ``classes.json`` and
    ``legend.png`` give each mask value's class and colour.

    Args:
        session: on a segmentor's or detector's bundle.
        sources: see `sources_at`. Their names may have folders, which are made.
        folder: where results go; made if it does not exist.
        options: which results, and how.
        skipped: called with each file skipped for its results, before the first result.
        failed: called with a file that cannot be decoded, instead of ending the rest.
        progress: called after each frame of a video.

    Raises:
        ImageError: a file cannot be decoded, or two would be written to one name; before
            anything is written, also if a result exists already.
    """
    options = options or ResultOptions()
    places = places_of(session, sources, folder, options, skipped, size_of)
    classes = folder / CLASSES_NAME
    existing = classes.read_bytes() if classes.exists() else None
    legends = legends_of(session, folder, existing, options.overwrite)

    @cache
    def write_classes() -> None:
        for name, data in legends.items():
            write_result(folder / name, data)

    images = {source: places[source] for source in places if not source.is_video}
    for result, contents in image_results(session, images, options, failed):
        write_classes()
        for path, data in contents:
            write_result(Path(path), data)
        yield result
    for source in places:
        if source.is_video:
            try:
                yield _segment_video(
                    session, source, places[source], options, progress, write_classes
                )
            except ImageError as error:
                if failed is None:
                    raise
                failed(source.path, error)


def image_results(
    session: Session,
    images: Mapping[Source, Mapping[str, PurePath]],
    options: ResultOptions,
    failed: Failed | None,
    read: Callable[[Source], npt.NDArray[Any]] | None = None,
) -> Iterator[tuple[ImageResult, Iterator[tuple[PurePath, bytes]]]]:
    """Answer images, and give what is to be written for each, in the order of writing.

    Args:
        images: where each image's results go, by kind, as :func:`places_of` has it.
        failed: as :func:`segment_files`.
        read: gives an image's pixels; by default its file is decoded.

    Yields:
        An image's result, and its files' paths and contents, each encoded as it is asked for.
    """
    read = read or (lambda source: session.read_image(Path(source.path)))
    for source, picture, answer in _answered(session, list(images), options, failed, read):
        result = ImageResult(source.path, images[source], answer)
        yield result, _contents(result, picture, options)


def _contents(
    result: ImageResult, picture: npt.NDArray[Any], options: ResultOptions
) -> Iterator[tuple[PurePath, bytes]]:
    answer = result.answer
    encoders: dict[str, Callable[[], bytes]] = {
        "overlay": lambda: encode(answer.overlay(picture, options.opacity), "PNG"),
        "mask": answer.mask_png,
        "panoptic": lambda: _panoptic_png(answer),
        "objects": lambda: json.dumps(result.as_dict(), indent=1).encode(),
    }
    for kind, path in result.places.items():
        yield path, encoders[kind]()


def _answer(session: Session, picture: npt.NDArray[Any], options: ResultOptions) -> Answer:
    if session.detects:
        return session.detect(picture).kept(options.min_score)
    return _kept(session.segment(picture, fit=options.fit, scales=options.scales), options)


def _kept(answer: Answer, options: ResultOptions) -> Answer:
    """Without objects that score too little."""
    if isinstance(answer, Detection | PanopticSegmentation):
        return answer.kept(options.min_score)
    return answer


def _panoptic_png(answer: Answer) -> bytes:
    assert isinstance(answer, PanopticSegmentation)
    return answer.panoptic_png()


def _segments_of(answer: PanopticSegmentation) -> dict[str, Any]:
    """For JSON: segments in COCO's words, and objects as a detector's."""
    found: dict[str, Any] = {"segments_info": answer.segments_info()}
    if answer.instances is not None:
        found["instances"] = answer.instances.as_dicts()
    return found


def _answered(
    session: Session,
    images: Sequence[Source],
    options: ResultOptions,
    failed: Failed | None,
    read: Callable[[Source], npt.NDArray[Any]],
) -> Iterator[tuple[Source, npt.NDArray[Any], Answer]]:
    """Each image, its pixels and its answer, in order; several images a run."""
    # A run is of one image then: of its crops, or of one of its sizes.
    slides = not session.detects and session.segmentation.mode == "slide"
    alone = slides or options.scales is not None
    waiting: list[tuple[Source, npt.NDArray[Any], Prepared]] = []

    def flush() -> Iterator[tuple[Source, npt.NDArray[Any], Answer]]:
        answers = session.finish_all([prepared for *_, prepared in waiting]) if waiting else []
        for (source, picture, _), answer in zip(waiting, answers, strict=True):
            yield source, picture, _kept(answer, options)
        waiting.clear()

    for source in images:
        try:
            picture = read(source)
            if alone:
                yield source, picture, _answer(session, picture, options)
            elif session.detects:
                waiting.append((source, picture, session.detection.prepare(picture)))
            else:
                prepared = session.segmentation.prepare(picture, fit=options.fit)
                waiting.append((source, picture, prepared))
        except ImageError as error:
            if str(source.path) not in str(error):
                error = type(error)(f"{source.path}: {error}")
            if failed is None:
                raise error from None
            yield from flush()
            failed(source.path, error)
        if len(waiting) == session.batch_sizes[-1]:
            yield from flush()
    yield from flush()


def _segment_video(
    session: Session,
    source: Source,
    places: Mapping[str, Path],
    options: ResultOptions,
    progress: Progress | None,
    last: Callable[[], None],
) -> VideoResult:
    """Answer every frame of a video and write the results; all of them or none.

    ``last`` is called when all that can fail is done.
    """
    start, frames = time.perf_counter(), 0
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(Path(source.path)))
        writers: dict[str, VideoWriter] = {}
        masks = objects = None
        for kind, path in places.items():
            _make_folder(path.parent)
            if path.suffix == ".mp4":
                partial = stack.enter_context(atomic_path(path))
                writers[kind] = stack.enter_context(VideoWriter(partial, reader.size, reader.rate))
            elif kind == "objects":
                objects = stack.enter_context(
                    stack.enter_context(atomic_path(path)).open("x", encoding="utf-8")
                )
            else:
                masks = stack.enter_context(_atomic_masks(path))
        for frame in reader:
            answer = _answer(session, frame, options)
            if "overlay" in writers:
                writers["overlay"].write(answer.overlay(frame, options.opacity))
            if "masks" in writers:
                mask = Image.open(io.BytesIO(answer.mask_png()))
                writers["masks"].write(np.asarray(mask.convert("RGB")))
            if masks is not None:
                (masks / f"{frames:06}.png").write_bytes(answer.mask_png())
            if objects is not None and isinstance(answer, Detection | PanopticSegmentation):
                found = (
                    {"instances": answer.as_dicts()}
                    if isinstance(answer, Detection)
                    else _segments_of(answer)
                )
                line = {"frame": frames, **found}
                objects.write(json.dumps(line) + "\n")
            frames += 1
            if progress is not None:
                progress(source.path, frames, reader.count)
        expected = reader.count
        last()
    return VideoResult(source.path, places, frames, expected, time.perf_counter() - start)


@contextmanager
def _atomic_masks(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` if the block ends without an error."""
    if folder.is_dir() and not all(_FRAME_MASK.fullmatch(path.name) for path in folder.iterdir()):
        raise ImageError(
            f"The folder {folder} holds other files than masks of frames, so it is not replaced. "
            "Give another output folder."
        )
    with atomic_folder(folder) as made:
        yield made


def _endings(session: Session, source: Source, options: ResultOptions) -> dict[str, str]:
    """What is written for a file, in that order, and the ends of its names.

    The last file marks an image as done.
    """
    gives_masks = not session.detects or session.detection.finds_masks
    endings: dict[str, str] = {}
    if not source.is_video:
        endings |= {"overlay": "_overlay.png"} if options.overlays else {}
        endings |= {"mask": ".png"} if gives_masks else {}
        endings |= {"panoptic": "_panoptic.png"} if session.panoptic else {}
        endings |= {"objects": ".json"} if session.detects or session.panoptic else {}
        return endings
    masks = "_masks.mp4" if options.mask_video else "_masks"
    endings |= {"masks": masks} if gives_masks else {}
    endings |= {"overlay": "_overlay.mp4"} if options.overlays else {}
    endings |= {"objects": ".jsonl"} if session.detects or session.panoptic else {}
    return endings


def places_of(
    session: Session,
    sources: Sequence[Source],
    folder: AnyPath,
    options: ResultOptions,
    skipped: Callable[[PurePath], None] | None,
    size_of: Callable[[AnyPath], int | None],
) -> dict[Source, dict[str, AnyPath]]:
    """Where each file's results go, by kind, without the files that are skipped.

    Args:
        size_of: gives the bytes that a result has already; None where there is none.

    Raises:
        ImageError: a file would be overwritten, a result exists already, or two files' results
            would be written to one name.
    """
    places: dict[Source, dict[str, AnyPath]] = {}
    taken: dict[AnyPath, PurePath] = {}
    given = {_real(source.path): source.path for source in sources}
    for source in sources:
        endings = _endings(session, source, options)
        targets = {kind: folder / f"{source.name}{ending}" for kind, ending in endings.items()}
        for target in targets.values():
            if target in taken:
                raise ImageError(
                    f"{taken[target]} and {source.path} would both be written to "
                    f"{target.relative_to(folder)}. Segment them into two folders."
                )
            if _real(target) in given:
                raise ImageError(
                    f"{given[_real(target)]} would be overwritten by results. Give another "
                    "output folder."
                )
            taken[target] = source.path
        # An empty file is what a full disk leaves.
        if options.skip_existing and all(map(size_of, targets.values())):
            if skipped is not None:
                skipped(source.path)
            continue
        places[source] = targets
        for target in targets.values():
            refused = not (options.overwrite or options.skip_existing)
            if refused and size_of(target) is not None:
                raise in_the_way(ImageError, f"The result {target} exists already.")
    return places


def _real(path: PurePath) -> PurePath:
    return path.resolve() if isinstance(path, Path) else path


def size_of(result: Path) -> int | None:
    """The bytes of a result's file, 1 of a folder; None where there is nothing."""
    if result.is_dir():
        return 1
    return result.stat().st_size if result.exists() else None


def legends_of(
    session: Session, folder: PurePath, existing: bytes | None, overwrite: bool
) -> dict[str, bytes]:
    """What tells the class and colour of each mask value: files' names and contents.

    Args:
        existing: what the folder's ``classes.json`` holds; None where there is none.

    Raises:
        ImageError: the folder holds those of other classes, and ``overwrite`` is False.
    """
    if session.detects:
        return {}
    entries = [
        {"id": number, "name": name, "color": list(colour)}
        for number, (name, colour) in enumerate(zip(session.classes, session.palette, strict=True))
    ]
    text = json.dumps(entries, indent=1, ensure_ascii=False).encode() + b"\n"
    if existing not in (None, text) and not overwrite:
        file = folder / CLASSES_NAME
        raise in_the_way(ImageError, f"{file} exists already, and lists other classes.")
    picture = encode(legend(session.classes, session.palette), "PNG")
    return {LEGEND_NAME: picture, CLASSES_NAME: text}


def write_result(path: Path, data: bytes) -> None:
    """Write or replace a result, whole or not at all; its folders are made.

    Raises:
        ImageError: a file is in a folder's place.
        OSError: the file cannot be written.
    """
    _make_folder(path.parent)
    write_atomically(path, data)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ImageError(
            f"Results cannot be written to the folder {folder}: a file is in the way. Give "
            "another output folder."
        ) from None
