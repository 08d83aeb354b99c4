"""A bundle, opened and ready to answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.architecture import Architecture, Preprocessing
from fdconv_deploy.errors import BackendError, BundleError, ImageError

from .backends import Backend, BackendOptions, Graph, feeds_problem, select
from .batching import plan_batches
from .bundle import Bundle
from .graphs import LazyGraphs
from .interpolation import Labels, Logits
from .manifest import Fit
from .postprocessing import check_classes, label_map
from .preprocessing import FitDone, Placement, check_image, normalise, place, resize
from .segmentation import Segmentation, class_names, class_palette
from .sliding import slide

Mode = Literal["whole", "slide"]


@dataclass(frozen=True)
class Prepared:
    """An image ready for a ``whole`` run: see :meth:`Session.prepare`."""

    input: Logits
    placement: Placement
    image_size: tuple[int, int]
    seconds: float


def open_session(
    bundle: str | os.PathLike[str] | Bundle,
    backend: str = "auto",
    *,
    threads: int | None = None,
    spinning: bool = True,
    providers: Sequence[Any] | None = None,
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
    :param verify: False skips hashing the bundle's files.
    :raises BundleError: the bundle is damaged, unsafe or of a newer format.
    :raises BackendError: the backend is unknown, not installed, or cannot run the bundle.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
    if threads is not None and threads < 1:
        raise BackendError(f"A run takes 1 thread or more, not {threads}.")
    given = None if providers is None else tuple(providers)
    options = BackendOptions(threads, given, spinning)
    return Session(opened, *select(opened, backend, options))


class Session:
    """Answers from a bundle. Any method may be called from several threads at once.

    Graphs are loaded at their first use, or by :meth:`warm_up`. A context manager; after
    :meth:`close` every use is a ``BackendError``.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, choice: str, graphs: Mapping[int, Graph]
    ) -> None:
        self.bundle = bundle
        self.choice = choice
        self._backend = backend
        self._graphs = LazyGraphs(lambda batch: backend.load(bundle, batch), graphs)

    @property
    def backend(self) -> str:
        """The name of the backend in use; ``choice`` says why it is."""
        return self._backend.name

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return self.bundle.batch_sizes

    @property
    def loaded_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes whose graphs are in memory, ascending."""
        return self._graphs.loaded

    @property
    def batch_cost(self) -> Callable[[int], float]:
        """What one run costs by its batch size, in any unit; see ``plan_batches``."""
        return self._backend.batch_cost

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a segmentor's input."""
        size = self.bundle.manifest.input
        if size is None:
            raise self._not_a_segmentor()
        return size.height, size.width

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of a segmentor's classes."""
        return class_names(self._architecture)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """An RGB colour for each of a segmentor's classes."""
        return class_palette(self._architecture)

    @property
    def _architecture(self) -> Architecture:
        if self.bundle.manifest.architecture is None:
            raise self._not_a_segmentor()
        return self.bundle.manifest.architecture

    @property
    def _preprocessing(self) -> Preprocessing:
        return self._architecture.preprocessing

    @property
    def mode(self) -> Mode:
        """How the network was tested, and so how :meth:`segment` runs it by default."""
        return self._architecture.test.mode

    def segment(
        self,
        image: npt.NDArray[np.uint8],
        *,
        fit: Fit | None = None,
        mode: Mode | None = None,
    ) -> Segmentation:
        """Label every pixel of an image.

        :param image: (H, W, 3) uint8 RGB, any size.
        :param fit: how an image of other proportions is brought to the bundle's size in
            ``whole`` mode; the bundle's own choice when not given.
        :param mode: ``whole`` or ``slide``; the mode the network was tested in when not given.
        :raises ImageError: ``image`` is not such an array.
        :raises BundleError: the bundle is not a segmentor of two classes or more, or cannot
            slide.
        """
        mode = mode or self.mode
        if mode == "slide":
            arguments = self._architecture, self.input_size, self.run, self.batch_sizes[-1]
            labels, fitted, timings = slide(image, *arguments)
            return self._answer(labels, fitted, "slide", timings)
        if mode != "whole":
            raise ImageError(f"An image is segmented in mode 'whole' or 'slide', not {mode!r}.")
        prepared = self.prepare(image, fit=fit)
        start = time.perf_counter()
        logits = self.run(prepared.input[None])[0]
        return self.finish(prepared, logits, inference_seconds=time.perf_counter() - start)

    def prepare(self, image: npt.NDArray[np.uint8], *, fit: Fit | None = None) -> Prepared:
        """The first third of a ``whole`` :meth:`segment`: resize and normalise.

        ``Prepared.input`` is (3, H, W) float32; those of several images may be stacked and
        run together, each answer being the one it would have alone.
        """
        start = time.perf_counter()
        check_classes(self._architecture.decode_head.num_classes)
        image = check_image(image)
        size, network = (image.shape[0], image.shape[1]), self.input_size
        fit = fit or self.bundle.manifest.fit
        if fit not in ("stretch", "pad"):
            raise ImageError(f"An image is fitted by 'stretch' or 'pad', not {fit!r}.")
        placement = place(size, network, self._preprocessing, fit)
        resized = resize(image, placement.height, placement.width)
        tensor = normalise(resized, self._preprocessing, network)
        return Prepared(tensor, placement, size, time.perf_counter() - start)

    def finish(
        self, prepared: Prepared, logits: Logits, *, inference_seconds: float = 0.0
    ) -> Segmentation:
        """The last third of a ``whole`` :meth:`segment`: (classes, h, w) logits to labels."""
        start = time.perf_counter()
        labels = label_map(
            logits,
            self.input_size,
            (prepared.placement.height, prepared.placement.width),
            prepared.image_size,
            align_corners=self._architecture.decode_head.align_corners,
        )
        timings = {
            "preprocess": prepared.seconds,
            "inference": inference_seconds,
            "postprocess": time.perf_counter() - start,
        }
        return self._answer(labels, prepared.placement.fit, "whole", timings)

    def run(self, batch: npt.NDArray[np.uint8] | Logits) -> Logits:
        """A segmentor's logits for a batch of images of exactly the bundle's size.

        :param batch: (N, H, W, 3) uint8 RGB, or (N, 3, H, W) float32 normalised; any N. It
            is divided over the bundle's batch sizes; slots left over in the last run hold
            repeated images, whose answers are dropped.
        :returns: (N, classes, h, w) float32 at the head's resolution.
        :raises ImageError: another shape or type.
        """
        inputs = self._as_input(batch)
        count, position, parts = len(inputs), 0, []
        for size in plan_batches(count, self.batch_sizes, self.batch_cost):
            part = inputs[position : position + size]
            if len(part) < size:
                part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            logits = self._graphs.get(size).run({"images": np.ascontiguousarray(part)})["logits"]
            parts.append(logits[: count - position])
            position += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run_raw(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run a graph on exactly its inputs, by name; which batch size, their shapes tell.

        :raises BackendError: no graph of the bundle takes these names, shapes and types.
        """
        problems = []
        for batch in self.batch_sizes:
            problem = feeds_problem(self.bundle.manifest.inputs[batch], feeds)
            if problem is None:
                return self._graphs.get(batch).run(feeds)
            problems.append(f"at batch {batch}, {problem}")
        raise BackendError(f"No graph of this bundle takes these inputs: {'; '.join(problems)}.")

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> float:
        """Load the graphs and run each once, so that the first request is as fast as any.

        A segmentor's pre- and postprocessing run once as well.

        :param batch_sizes: those to warm up; all when not given.
        :returns: the seconds it took.
        """
        start = time.perf_counter()
        for batch in batch_sizes or self.batch_sizes:
            specs = self.bundle.manifest.inputs.get(batch)
            if specs is None:
                raise BackendError(
                    f"The bundle has no graph of batch {batch}, only {list(self.batch_sizes)}."
                )
            feeds = {s.name: np.zeros(s.shape, dtype=s.dtype) for s in specs}
            answers = self._graphs.get(batch).run(feeds)
        if self.bundle.manifest.kind == "segmentor" and len(self.classes) > 1:
            black = self.prepare(np.zeros((*self.input_size, 3), np.uint8))
            self.finish(black, answers["logits"][0])
        return time.perf_counter() - start

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._graphs.closed

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self._graphs.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _as_input(self, batch: npt.NDArray[Any]) -> Logits:
        height, width = self.input_size
        shape: tuple[int, ...] = getattr(batch, "shape", ())
        kind = getattr(batch, "dtype", type(batch).__name__)
        if len(shape) == 4 and shape[0] > 0:
            if kind == np.float32 and shape[1:] == (3, height, width):
                return batch
            if kind == np.uint8 and shape[1:] == (height, width, 3):
                out = np.empty((len(batch), 3, height, width), dtype=np.float32)
                for image, slot in zip(batch, out, strict=True):
                    normalise(image, self._preprocessing, out=slot)
                return out
        raise ImageError(
            f"This bundle runs batches (N, {height}, {width}, 3) uint8 RGB or "
            f"(N, 3, {height}, {width}) float32, N ≥ 1; found {shape} {kind}. segment() takes "
            "an image of any size."
        )

    def _answer(
        self, labels: Labels, fit: FitDone, mode: Mode, timings: dict[str, float]
    ) -> Segmentation:
        return Segmentation(labels, self.classes, self.palette, fit, mode, timings)

    def _not_a_segmentor(self) -> BundleError:
        return BundleError(
            f"The bundle {self.bundle.path} is of a {self.bundle.manifest.kind}, which does not "
            "segment images. Use run_raw with its own inputs."
        )
