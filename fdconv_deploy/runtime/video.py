"""Video files in, overlay video and masks out, frame by frame."""

from __future__ import annotations

import io
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fdconv_deploy.errors import ImageError, in_the_way
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.images import MAX_PIXELS, ImageTooLargeError
from fdconv_deploy.runtime.input_files import Source
from fdconv_deploy.runtime.result_files import Answering, Picture, make_folder, write_whole
from fdconv_deploy.runtime.segmentation import Segmentation

Progress = Callable[[int, int | None], None]
# MPEG-4 part 2: the one codec that OpenCV's wheels write on every platform.
_CODEC = "mp4v"
_FRAME = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class VideoResult:
    """What was written for one video.

    Attributes:
        video: the file.
        frames: how many frames were decoded and answered.
        expected: how many the container announces; None where it does not say.
        masks: the folder of one PNG a frame, or the mask video; None without masks.
        overlay: the overlay video; None where none was asked for.
        objects: a detector's objects, one JSON line a frame; None for segmentors.
        seconds: from the first frame to the last, decoding and encoding included.
    """

    video: Path
    frames: int
    expected: int | None
    masks: Path | None
    overlay: Path | None
    objects: Path | None
    seconds: float

    @property
    def is_cut(self) -> bool:
        """Whether decoding ended before the number of frames that the container announces."""
        return self.expected is not None and self.frames < self.expected

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths, frames, seconds."""
        paths = {"masks": self.masks, "overlay": self.overlay, "objects": self.objects}
        return {
            "video": str(self.video),
            "frames": self.frames,
            "expected_frames": self.expected,
            **{name: None if path is None else str(path) for name, path in paths.items()},
            "seconds": round(self.seconds, 3),
        }

    def as_line(self) -> str:
        """For a person: where the results are, how many frames, and how fast."""
        written = ", ".join(str(p) for p in (self.masks, self.overlay, self.objects) if p)
        rate = self.frames / self.seconds if self.seconds else 0.0
        cut = f" of {self.expected} announced: the file is cut off" if self.is_cut else ""
        return f"{written}: {self.frames} frames{cut} ({rate:.1f} frames/s)"


class VideoReader:
    """Frames of a video file, decoded one by one by OpenCV's FFmpeg.

    A context manager.

    Attributes:
        rate: frames per second as the container says; 25 where it does not.
        count: frames that the container announces; None where it does not say.
        size: (height, width) in pixels, as shown (rotation applied).

    Raises:
        ImageError: on making it: there is no such file, or it is no video that can be decoded.
        ImageTooLargeError: a frame has more than ``MAX_PIXELS`` pixels.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ImageError(f"The video {path} does not exist. Check the path.")
        self._first: Any
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        found, self._first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not found:
            self._capture.release()
            raise ImageError(
                f"The video {path} cannot be decoded: it is damaged, or its codec is not one of "
                "OpenCV's. Convert it to MP4 (H.264)."
            )
        height, width = self._first.shape[:2]
        self.size = int(height), int(width)
        if height * width > MAX_PIXELS:
            self._capture.release()
            raise ImageTooLargeError(
                f"The video {path} has frames of {width} x {height} pixels; at most "
                f"{MAX_PIXELS:,} pixels are accepted. Make it smaller."
            )
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if np.isfinite(rate) and 0 < rate <= 1000 else 25.0
        self.count = int(count) if np.isfinite(count) and count > 0 else None

    def __iter__(self) -> Iterator[Picture]:
        """(H, W, 3) uint8 RGB, in order."""
        found, frame = True, self._first
        while found and frame is not None:
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)
            found, frame = self._capture.read()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()


class _VideoWriter:
    """An MP4 file, written under a temporary name and renamed when it is complete."""

    def __init__(self, path: Path, reader: VideoReader) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.mp4")
        height, width = reader.size
        codec = cv2.VideoWriter.fourcc(*_CODEC)
        self._writer = cv2.VideoWriter(str(self._partial), codec, reader.rate, (width, height))
        if not self._writer.isOpened():
            raise ImageError(
                f"The video {path} cannot be written: OpenCV has no {_CODEC} encoder here. Use "
                "--no-overlay and masks as PNGs, or install opencv-python-headless from PyPI."
            )

    def write(self, picture: Picture) -> None:
        """Add a frame, (H, W, 3) uint8 RGB."""
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def commit(self) -> None:
        """Finish the file and move it into place."""
        self._writer.release()
        self._partial.replace(self.path)

    def close(self) -> None:
        """Remove what was not committed."""
        self._writer.release()
        self._partial.unlink(missing_ok=True)


def video_places(
    videos: Sequence[Source],
    folder: Path,
    *,
    overlays: bool,
    mask_video: bool,
    masks: bool,
    objects: bool,
    overwrite: bool,
) -> dict[Source, dict[str, Path]]:
    """Where each video's results go: a path for each kind that is written.

    Args:
        videos: the files.
        folder: for the results.
        overlays: whether an overlay video is written.
        mask_video: masks as a video in the classes' colours, not as a PNG a frame.
        masks: whether the network gives masks.
        objects: whether the network is a detector.
        overwrite: results that are there may be replaced.

    Raises:
        ImageError: a result is there already, or two videos' would be written to one name.
    """
    endings = {
        "overlay": "_overlay.mp4" if overlays else None,
        "objects": ".jsonl" if objects else None,
        "masks": ("_masks.mp4" if mask_video else "_masks") if masks else None,
    }
    found: dict[Source, dict[str, Path]] = {}
    taken: dict[Path, Path] = {}
    for video in videos:
        found[video] = {k: folder / f"{video.name}{end}" for k, end in endings.items() if end}
        for target in found[video].values():
            if target in taken:
                raise ImageError(
                    f"{taken[target]} and {video.path} would both be written to "
                    f"{target.relative_to(folder)}. Segment them into two folders."
                )
            taken[target] = video.path
            if target.exists() and not overwrite:
                raise in_the_way(ImageError, f"The result {target} is there already.")
    return found


def segment_video(
    answering: Answering[Any, Segmentation] | Answering[Any, Detection],
    source: Source,
    places: dict[str, Path],
    *,
    opacity: float = 0.5,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> VideoResult:
    """Answer every frame of a video and write the results; all of them or none.

    Args:
        answering: how frames are answered; each counts by itself.
        source: the video.
        places: of `video_places`. ``masks`` without an ending is a folder, in which frame N
            (from 0) is ``NNNNNN.png``, as an image's mask.
        opacity: of the colours over the frames, 0 to 1.
        overwrite: replace results that are there.
        progress: called with the frames done and the frames announced, if known.

    Raises:
        ImageError: the video cannot be decoded, or a result is there already.
    """
    for target in places.values():
        if target.exists() and not overwrite:
            raise in_the_way(ImageError, f"The result {target} is there already.")
        if target.is_dir() and not all(_FRAME.fullmatch(path.name) for path in target.iterdir()):
            raise ImageError(
                f"The folder {target} holds other files than masks of frames, so it is not "
                "replaced. Give another output folder."
            )
        make_folder(target.parent)
    start, frames, lines = time.perf_counter(), 0, []
    with VideoReader(source.path) as reader, ExitStack() as cleaning:
        writers = {}
        for kind in ("overlay", "masks"):
            if kind in places and places[kind].suffix == ".mp4":
                writers[kind] = _VideoWriter(places[kind], reader)
                cleaning.callback(writers[kind].close)
        folder = places.get("masks") if "masks" not in writers else None
        partial = None
        if folder is not None:
            partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
            partial.mkdir()
            cleaning.callback(shutil.rmtree, partial, ignore_errors=True)
        for frame in reader:
            answer = answering(frame)
            if "overlay" in writers:
                writers["overlay"].write(answer.overlay(frame, opacity))
            if "masks" in writers:
                mask = Image.open(io.BytesIO(answer.mask_png()))
                writers["masks"].write(np.asarray(mask.convert("RGB")))
            if partial is not None:
                (partial / f"{frames:06}.png").write_bytes(answer.mask_png())
            if isinstance(answer, Detection):
                entry = {"frame": frames, "instances": answer.as_dicts()}
                lines.append(json.dumps(entry))
            frames += 1
            if progress is not None:
                progress(frames, reader.count)
        for writer in writers.values():
            writer.commit()
        if folder is not None and partial is not None:
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
        if "objects" in places:
            write_whole(places["objects"], ("\n".join(lines) + "\n").encode())
        seconds = time.perf_counter() - start
        return VideoResult(
            source.path,
            frames,
            reader.count,
            places.get("masks"),
            places.get("overlay"),
            places.get("objects"),
            seconds,
        )
