"""Reading and writing of video files, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import MAX_PIXELS, ImageTooLargeError

# MPEG-4 part 2: the one codec that OpenCV's wheels write on every platform.
_CODEC = "mp4v"


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

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        """(H, W, 3) uint8 RGB, in order."""
        found, frame = True, self._first
        while found and frame is not None:
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)
            found, frame = self._capture.read()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()


class VideoWriter:
    """An MP4 file. A context manager."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        """Start the file.

        Args:
            path: the file.
            size: (height, width) of its frames.
            rate: frames per second.

        Raises:
            ImageError: it cannot be written.
        """
        codec = cv2.VideoWriter.fourcc(*_CODEC)
        self._writer = cv2.VideoWriter(str(path), codec, rate, (size[1], size[0]))
        if not self._writer.isOpened():
            raise ImageError(
                f"A video cannot be written to {path.parent}: OpenCV has no {_CODEC} encoder here. "
                "Use --no-overlay and masks as PNGs, or install opencv-python-headless from PyPI."
            )

    def write(self, picture: npt.NDArray[np.uint8]) -> None:
        """Add a frame, (H, W, 3) uint8 RGB."""
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.release()
