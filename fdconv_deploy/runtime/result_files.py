"""Results of ``fdconv segment``: images and videos in, masks, overlays and objects out."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.atomic_write import atomic_folder, atomic_path, write_atomically
from fdconv_deploy.errors import ImageError, in_the_way
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.images import MAX_PIXELS, ImageTooLargeError
from fdconv_deploy.runtime.input_files import CLASSES_NAME, LEGEND_NAME, AnyPath, Source
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.preprocessing import Prepared
from fdconv_deploy.runtime.segmentation import MultiScale
from fdconv_deploy.runtime.session import Session
from fdconv_deploy.runtime.visualization import encode, legend

Picture = npt.NDArray[Any]
# A video, the number of frames answered, and the number its container announces, if any.
Progress = Callable[[PurePath, int, int | None], None]
_FRAME_MASK = re.compile(r"\d{6,}\.png")
# MPEG-4 part 2: the one codec that OpenCV's wheels write on every platform.
_CODEC = "mp4v"


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
class Result:
    """What was written for one image or video.

    Attributes:
        places: each file written, by its kind. Of an image "mask", "overlay", a detector's
            "objects", a panoptic network's "panoptic" and "objects"; of a video "masks" (a folder
            of one PNG a frame, or a video), "overlay" (a video), or "objects" (one JSON line a
            frame).
        record: for JSON: paths, size, how the image was fitted, seconds, and what was found; of a
            video its frames.
        backend: of the session.
        operators: of the session.
    """

    places: Mapping[str, PurePath]
    record: dict[str, Any]
    backend: str
    operators: str

    @property
    def line(self) -> str:
        """For a person: a video's frames, or what is most frequent in an image, and how fast."""
        told, written = self.record, [*map(str, self.places.values())]
        if "frames" in told:
            frames, expected, seconds = (
                told[key] for key in ("frames", "expected_frames", "seconds")
            )
            cut = ""
            if expected is not None and frames < expected:
                cut = f" of {expected} announced: the file is cut off"
            rate = frames / seconds if seconds else 0.0
            return f"{', '.join(written)}: {frames} frames{cut} ({rate:.1f} frames/s)"
        if "classes" in told:
            shares = sorted(told["classes"].items(), key=lambda item: -item[1])
            found = [f"{name} {share:.0%}" for name, share in shares[:4]]
        else:
            counts = Counter(one["class"] for one in told["instances"])
            found = [f"{number} {name}" for name, number in counts.most_common(6)]
        spent = f"{sum(told['seconds'].values()) * 1e3:.0f} ms"
        return f"{written[-1]}: {', '.join(found) or 'nothing'} ({told['fit']}, {spent})"


@dataclass(frozen=True)
class Failure:
    """A file that cannot be decoded, and why."""

    path: PurePath
    error: ImageError


# A result, and its files' paths and contents.
Written = tuple[Result, Iterator[tuple[PurePath, bytes]]]


class ResultFolder:
    """A local folder for results, ``root``, made as they are written."""

    def __init__(self, root: Path) -> None:
        self.root: PurePath = root

    def size_of(self, path: PurePath) -> int | None:
        """The bytes of a result's file, 1 of a folder; None where there is nothing."""
        result = Path(path)
        if result.is_dir():
            return 1
        return result.stat().st_size if result.exists() else None

    def read(self, path: PurePath) -> bytes:
        """A file's bytes."""
        return Path(path).read_bytes()

    def write(self, path: PurePath, data: bytes) -> None:
        """Write or replace a file, whole or not at all; ``ImageError`` if its folder is a file."""
        _make_folder(Path(path).parent)
        write_atomically(Path(path), data)


def segment_files(
    session: Session,
    sources: Sequence[Source],
    folder: Path,
    options: ResultOptions | None = None,
    *,
    skipped: Callable[[PurePath], None] | None = None,
    progress: Progress | None = None,
) -> Iterator[Result | Failure]:
    """Run inference on images, then on videos, and write each one's results as it is done.

    Of an image, a segmentor's mask ``NAME.png`` and ``NAME_overlay.png``; or a detector's
    ``NAME.json``, ``NAME_overlay.png`` and, where the network gives masks, ``NAME.png``, which
    numbers the objects in the order of the JSON, from 1. A panoptic network's ``NAME.png`` holds
    classes, ``NAME_panoptic.png`` segments as COCO's does, and ``NAME.json`` lists segments and
    objects. Of a video, see :class:`Result`. A segmentor's ``classes.json`` and ``legend.png``
    give each mask value's class and colour.

    Args:
        session: on a segmentor's or detector's bundle.
        sources: see `sources_at`. Their names may have folders, which are made.
        folder: where results go; made if it does not exist.
        options: which results, and how.
        skipped: called with each file skipped for its results, before the first result.
        progress: called after each frame of a video.

    Raises:
        ImageError: before anything is written, two files' results would be written to one name, or
            a result exists already.
    """
    options, to = options or ResultOptions(), ResultFolder(folder)
    places = places_of(session, sources, folder, options, skipped, to.size_of)
    legends = legends_of(session, to, options.overwrite)
    images = {source: places[source] for source in places if not source.is_video}

    def write(contents: Iterable[tuple[PurePath, bytes]] = ()) -> None:
        for path, data in chain(legends.items(), contents):
            to.write(path, data)
        legends.clear()

    videos = (
        _segment_video(session, source.path, places[source], options, progress, write)
        for source in places
        if source.is_video
    )
    for answer in chain(image_results(session, images, options), videos):
        if isinstance(answer, tuple):
            result, contents = answer
            write(contents)
            yield result
        else:
            yield answer


def image_results(
    session: Session,
    images: Mapping[Source, Mapping[str, PurePath]],
    options: ResultOptions,
    read: Callable[[Source], Picture] | None = None,
) -> Iterator[Written | Failure]:
    """Answer images, several a run, and give what is to be written for each, in their order.

    ``images`` are as :func:`places_of` has them; ``read`` gives one's pixels, by default of its
    file. Files' contents are encoded as they are asked for.
    """
    read = read or (lambda source: session.read_image(Path(source.path)))
    # A run is of one image then: of its crops, or of one of its sizes.
    alone = session.images.mode == "slide" or options.scales is not None
    waiting: list[tuple[Source, Picture, Prepared]] = []

    def written(source: Source, picture: Picture, answer: Any) -> Written:
        places = images[source]
        record = {
            "image": str(source.path),
            "mask": None,
            "overlay": None,
            **{kind: str(path) for kind, path in places.items()},
            "fit": answer.fit,
            "seconds": {k: round(v, 4) for k, v in answer.timings.items()},
            **answer.as_dict(),
        }
        if "panoptic" in places:  # an entry of the annotations of a COCO panoptic file
            record |= {"image_id": source.path.stem, "file_name": places["panoptic"].name}
        result = Result(places, record, session.backend, session.operators)
        return result, _contents(result, picture, answer, options)

    def flush() -> Iterator[Written]:
        answers = session.finish_all([prepared for *_, prepared in waiting])
        for (source, picture, _), answer in zip(waiting, answers, strict=True):
            yield written(source, picture, answer.kept(options.min_score))
        waiting.clear()

    for source in images:
        try:
            picture = read(source)
            if alone:
                yield written(source, picture, _answer(session, picture, options))
            else:
                prepared = session.images.prepare(picture, fit=options.fit)
                waiting.append((source, picture, prepared))
        except ImageError as error:
            if str(source.path) not in str(error):
                error = type(error)(f"{source.path}: {error}")
            yield from flush()
            yield Failure(source.path, error)
        if len(waiting) == session.batch_sizes[-1]:
            yield from flush()
    yield from flush()


def _answer(session: Session, picture: Picture, options: ResultOptions) -> Any:
    if session.detects:
        return session.detect(picture).kept(options.min_score)
    found = session.segment(picture, fit=options.fit, scales=options.scales)
    return found.kept(options.min_score)


def _contents(
    result: Result, picture: Picture, answer: Any, options: ResultOptions
) -> Iterator[tuple[PurePath, bytes]]:
    for kind, path in result.places.items():
        if kind == "objects":
            yield path, json.dumps(result.record, indent=1).encode()
        elif kind == "overlay":
            yield path, encode(answer.overlay(picture, options.opacity), "PNG")
        else:
            yield path, answer.mask_png() if kind == "mask" else answer.panoptic_png()


def _segment_video(
    session: Session,
    path: PurePath,
    places: Mapping[str, Path],
    options: ResultOptions,
    progress: Progress | None,
    last: Callable[[], None],
) -> Result | Failure:
    """Answer every frame of a video and write the results; all of them or none.

    ``last`` is called when all else that can fail is done.
    """
    start, count = time.perf_counter(), 0
    try:
        with ExitStack() as stack:
            video = stack.enter_context(_open_video(Path(path)))
            writers = [
                stack.enter_context(_frame_writer(kind, place, video, options))
                for kind, place in places.items()
            ]
            for count, frame in enumerate(video.frames, 1):
                answer = _answer(session, frame, options)
                for write in writers:
                    write(count - 1, frame, answer)
                if progress is not None:
                    progress(path, count, video.expected)
            last()
    except ImageError as error:
        return Failure(path, error)
    record = {
        "video": str(path),
        "frames": count,
        "expected_frames": video.expected,
        **dict.fromkeys(("masks", "overlay", "objects")),
        **{kind: str(place) for kind, place in places.items()},
        "seconds": round(time.perf_counter() - start, 3),
    }
    return Result(places, record, session.backend, session.operators)


@contextmanager
def _frame_writer(
    kind: str, place: Path, video: _Video, options: ResultOptions
) -> Iterator[Callable[[int, Picture, Any], None]]:
    """What writes a frame's results of one kind: its number, pixels and answer.

    They take their place if the block ends without an error.
    """
    _make_folder(place.parent)
    if kind == "objects":
        with atomic_path(place) as partial, partial.open("w", encoding="utf-8") as file:

            def write_line(number: int, _: Picture, answer: Any) -> None:
                found = answer.as_dict()
                told = {key: found[key] for key in ("segments_info", "instances") if key in found}
                file.write(json.dumps({"frame": number, **told}) + "\n")

            yield write_line
    elif place.suffix == ".mp4":
        with atomic_path(place) as partial, _write_video(partial, video) as write:

            def write_picture(_: int, frame: Picture, answer: Any) -> None:
                if kind == "overlay":
                    write(answer.overlay(frame, options.opacity))
                else:
                    write(np.asarray(Image.open(io.BytesIO(answer.mask_png())).convert("RGB")))

            yield write_picture
    else:
        if place.is_dir() and not all(_FRAME_MASK.fullmatch(path.name) for path in place.iterdir()):
            raise ImageError(
                f"The folder {place} holds other files than masks of frames, so it is not "
                "replaced. Give another output folder."
            )
        with atomic_folder(place) as folder:

            def write_mask(number: int, _: Picture, answer: Any) -> None:
                (folder / f"{number:06}.png").write_bytes(answer.mask_png())

            yield write_mask


class _Video(NamedTuple):
    """A video file, whose frames (H, W, 3) uint8 RGB are decoded as they are asked for.

    ``size`` is (height, width) in pixels, as shown (rotation applied); ``rate`` frames per second,
    25 where the container does not say; ``expected`` the number of frames that it announces.
    """

    frames: Iterator[Picture]
    size: tuple[int, int]
    rate: float
    expected: int | None


@contextmanager
def _open_video(path: Path) -> Iterator[_Video]:
    """A video, decoded by OpenCV's FFmpeg; ``ImageError`` where it cannot be."""
    if not path.is_file():
        raise ImageError(f"The video {path} does not exist. Check the path.")
    first: Any
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        found, first = capture.read() if capture.isOpened() else (False, None)
        if not found or first is None:
            raise ImageError(
                f"The video {path} cannot be decoded: it is damaged, or its codec is not one of "
                "OpenCV's. Convert it to MP4 (H.264)."
            )
        height, width = first.shape[:2]
        if height * width > MAX_PIXELS:
            raise ImageTooLargeError(
                f"The video {path} has frames of {width} x {height} pixels; at most "
                f"{MAX_PIXELS:,} pixels are accepted. Make it smaller."
            )

        def frames() -> Iterator[Picture]:
            found, frame = True, first
            while found and frame is not None:
                yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                found, frame = capture.read()

        rate, count = (capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        yield _Video(
            frames(),
            (int(height), int(width)),
            float(rate) if np.isfinite(rate) and 0 < rate <= 1000 else 25.0,
            int(count) if np.isfinite(count) and count > 0 else None,
        )
    finally:
        capture.release()


@contextmanager
def _write_video(path: Path, like: _Video) -> Iterator[Callable[[Picture], object]]:
    """What adds a frame (H, W, 3) uint8 RGB to an MP4 file of another video's size and rate."""
    codec = cv2.VideoWriter.fourcc(*_CODEC)
    writer = cv2.VideoWriter(str(path), codec, like.rate, like.size[::-1])
    if not writer.isOpened():
        raise ImageError(
            f"A video cannot be written to {path.parent}: OpenCV has no {_CODEC} encoder here. "
            "Use --no-overlay and masks as PNGs, or install opencv-python-headless from PyPI."
        )
    try:
        yield lambda picture: writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    finally:
        writer.release()


def _endings(session: Session, source: Source, options: ResultOptions) -> dict[str, str]:
    """What is written for a file, and how its names end; the last one marks it as done."""
    gives_masks = not session.detects or session.detection.finds_masks
    tells_objects = session.detects or session.panoptic
    # Kind, whether it is written, and the ending.
    results = [
        ("overlay", options.overlays, "_overlay.png"),
        ("mask", gives_masks, ".png"),
        ("panoptic", session.panoptic, "_panoptic.png"),
        ("objects", tells_objects, ".json"),
    ]
    if source.is_video:
        results = [
            ("masks", gives_masks, "_masks.mp4" if options.mask_video else "_masks"),
            ("overlay", options.overlays, "_overlay.mp4"),
            ("objects", tells_objects, ".jsonl"),
        ]
    return {kind: ending for kind, written, ending in results if written}


def places_of(
    session: Session,
    sources: Sequence[Source],
    folder: AnyPath,
    options: ResultOptions,
    skipped: Callable[[PurePath], None] | None,
    size_of: Callable[[AnyPath], int | None],
) -> dict[Source, dict[str, AnyPath]]:
    """Where each file's results go, by kind, without the files that are skipped.

    ``size_of`` gives the bytes that a result has already, None where there is none. ``ImageError``
    if a file would be overwritten, a result exists already, or two files' have one name.
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


def legends_of(session: Session, folder: ResultFolder, overwrite: bool) -> dict[PurePath, bytes]:
    """What tells the class and colour of each mask value: files and contents.

    ``ImageError`` if the folder holds those of other classes, unless ``overwrite``.
    """
    if session.detects:
        return {}
    entries = [
        {"id": number, "name": name, "color": list(colour)}
        for number, (name, colour) in enumerate(zip(session.classes, session.palette, strict=True))
    ]
    text = json.dumps(entries, indent=1, ensure_ascii=False).encode() + b"\n"
    file = folder.root / CLASSES_NAME
    if not overwrite and folder.size_of(file) is not None and folder.read(file) != text:
        raise in_the_way(ImageError, f"{file} exists already, and lists other classes.")
    picture = encode(legend(session.classes, session.palette), "PNG")
    return {folder.root / LEGEND_NAME: picture, file: text}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ImageError(
            f"Results cannot be written to the folder {folder}: a file is in the way. Give "
            "another output folder."
        ) from None
