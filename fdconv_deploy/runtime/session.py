"""A bundle, opened and ready to answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime.backends import BackendOptions, select
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.detection import (
    Detecting,
    Detection,
    as_rows,
    detector_classes,
    detector_palette,
)
from fdconv_deploy.runtime.graph_runner import Tensors
from fdconv_deploy.runtime.images import MAX_PIXELS
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.multiband import load_image
from fdconv_deploy.runtime.segmentation import (
    Mode,
    Prepared,
    Segmentation,
    Segmenting,
    class_names,
    class_palette,
)

__all__ = ["Mode", "Prepared", "Session", "open_session"]


def open_session(
    bundle: str | os.PathLike[str] | Bundle,
    backend: str = "auto",
    *,
    threads: int | None = None,
    spinning: bool = True,
    providers: Sequence[Any] | None = None,
    native: bool | None = None,
    verify: bool = True,
) -> Session:
    """Open a bundle to answer from it.

    :param bundle: the bundle's folder, or a ``Bundle`` already opened.
    :param backend: "auto", "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt" or
        "tensorrt" (engines made by ``fdconv build``).
    :param threads: CPU threads per run. When not given, as many as there are physical cores
        this process may use, by its affinity and its cgroup's quota.
    :param spinning: threads wait for each other busily within a run, which saves their waking
        up after every operator. Between runs they always sleep. False suits a machine whose
        cores several runs share at a time.
    :param providers: ONNX Runtime execution providers, in its own notation.
    :param native: on ONNX Runtime's CPU provider, use the ``fdconv`` operators in C (True), or
        the functions of standard operators that every bundle carries (False). When not given,
        ``FDCONV_NATIVE`` (1 or 0) decides, else whether they are built; ``Session.operators``
        says which run. See docs/native.md.
    :param verify: False skips hashing the bundle's files.
    :raises BundleError: the bundle is damaged, unsafe or of a newer format.
    :raises BackendError: the backend is unknown, not installed, or cannot run the bundle.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
    if threads is not None and threads < 1:
        raise BackendError(f"A run takes 1 thread or more, not {threads}.")
    given = None if providers is None else tuple(providers)
    options = BackendOptions(threads, given, spinning, native)
    return Session(opened, *select(opened, backend, options))


class Session(Segmenting, Detecting):
    """Answers from a bundle. Any method may be called from several threads at once.

    A segmentor's labels images (:meth:`segment`), a detector's finds objects in them
    (:meth:`detect`), and a module's takes its own inputs (:meth:`run_raw`). Graphs are loaded at
    their first use, or by :meth:`warm_up`. A context manager; after :meth:`close` every use is
    a ``BackendError``.
    """

    @property
    def detects(self) -> bool:
        """Whether the bundle is of a detector."""
        return self.bundle.manifest.kind == "detector"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of a segmentor's or detector's classes."""
        return detector_classes(self._detector) if self.detects else class_names(self._architecture)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """An RGB colour for each of a segmentor's or detector's classes."""
        if self.detects:
            return detector_palette(self._detector)
        return class_palette(self._architecture)

    @property
    def preprocessing(self) -> Preprocessing:
        """How a segmentor's or detector's images become its input."""
        return self._detector.preprocessing if self.detects else self._preprocessing

    @property
    def channels(self) -> int:
        """Number of bands of the images a segmentor or detector takes."""
        return self.preprocessing.channels

    def read_image(
        self, source: bytes | str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
    ) -> npt.NDArray[Any]:
        """Decode an image file as the network's images were loaded in training.

        :param source: the file's bytes or its path.
        :returns: (H, W, C) as :meth:`segment` and :meth:`detect` take it. See
            :func:`load_image`, for what it raises too.
        """
        return load_image(source, self.preprocessing, max_pixels=max_pixels)

    def segment(
        self,
        image: npt.NDArray[Any] | str | os.PathLike[str],
        *,
        fit: Fit | None = None,
        mode: Mode | None = None,
    ) -> Segmentation:
        """As :meth:`Segmenting.segment`; ``image`` may also be the path of an image file."""
        return super().segment(self._pixels(image), fit=fit, mode=mode)

    def detect(self, image: npt.NDArray[Any] | str | os.PathLike[str]) -> Detection:
        """As :meth:`Detecting.detect`; ``image`` may also be the path of an image file."""
        return super().detect(self._pixels(image))

    def _pixels(self, image: npt.NDArray[Any] | str | os.PathLike[str]) -> npt.NDArray[Any]:
        return self.read_image(image) if isinstance(image, (str, os.PathLike)) else image

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A segmentor's logits for a batch of images of exactly the bundle's size.

        For a detector, :meth:`run_rows`.

        :param batch: (N, H, W, C) uint8, RGB where C is 3, or (N, C, H, W) float32 normalised;
            any N. It is divided over the bundle's batch sizes; slots left over in the last run hold
            repeated images, whose answers are dropped.
        :returns: (N, classes, h, w) float32 at the head's resolution.
        :raises ImageError: another shape or type.
        """
        return self.run_rows(batch) if self.detects else self._logits(batch)

    def blank(self, count: int) -> npt.NDArray[Any]:
        """``count`` images of zeros, as :meth:`run` takes them."""
        if self.detects:
            return np.zeros(count, self.row_type)
        return np.zeros((count, self.channels, *self.input_size), np.float32)

    def _rehearse(self, answers: Tensors) -> None:
        if self.detects:
            black = np.zeros((*self.input_size, 3), np.uint8)
            self.finish_detection(self.prepare_detection(black), as_rows(answers)[0])
        elif self.bundle.manifest.kind == "segmentor":
            blank = self.prepare(np.zeros((*self.input_size, self.channels), np.uint8))
            self.finish(blank, answers["logits"][0])
