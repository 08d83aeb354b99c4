"""A bundle, opened and ready to answer: a pipeline around a runner of graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import DetectorConfig, Preprocessing, SegmentorConfig
from fdconv_deploy.errors import BackendError, BundleError, ImageError
from fdconv_deploy.ops.native import Native
from fdconv_deploy.runtime.backends import BackendOptions, Tensors, select
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.detection import Detection, DetectionPipeline
from fdconv_deploy.runtime.graph_runner import GraphRunner, Runner, SizedRunner
from fdconv_deploy.runtime.images import MAX_PIXELS, ImageFile, load_image
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.panoptic import PanopticPipeline
from fdconv_deploy.runtime.preprocessing import (
    Prepared,
    Size,
    best_size,
    check_image,
    padded,
    scaled_size,
)
from fdconv_deploy.runtime.segmentation import (
    Mode,
    MultiScale,
    Segmentation,
    SegmentationPipeline,
    listed,
)

ImageSource = npt.NDArray[Any] | str | os.PathLike[str]


def open_session(
    bundle: str | os.PathLike[str] | Bundle,
    backend: str = "auto",
    *,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    native: Native = None,
    tf32: bool | None = None,
    verify: bool = True,
) -> Session:
    """Open a bundle to run inference on it.

    Its files are read into memory once, and what was hashed is what runs: replacing, changing or
    deleting the folder afterwards changes no answer. Their bytes are let go of when every graph is
    loaded.

    Args:
        bundle: the bundle's folder, or a ``Bundle`` already opened, which is read when a graph is
            first loaded unless it holds its files already.
        backend: "auto", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt" (engines
            made by ``fdconv build``), "openvino" or "openvino-bf16".
        threads: number of CPU threads of a run. By default, as many as there are physical cores
            this process may use, by its affinity and its cgroup's quota.
        providers: ONNX Runtime execution providers, in its own notation.
        native: on a CPU, in ONNX Runtime and OpenVINO, use the ``fdconv`` operators in C (True),
            or the functions of standard operators that every bundle carries (False). By default
            ``FDCONV_NATIVE`` (1, 0 or nchw) decides, else whether they are built. Features are in
            ONNX Runtime's blocked layout where they can be, with "nchw" in that of the export;
            ``Session.operators`` tells what is used. See docs/native.md.
        tf32: whether float32 products on a GPU may round their factors to ten bits (TF32). By
            default ``FDCONV_TF32`` (1 or 0) decides, else they may not, whatever the backend. Of
            TensorRT's engines it was settled as they were built; one built with it is taken only
            where it is asked for.
        verify: False skips hashing the bundle's files.

    Raises:
        BundleError: the bundle is damaged, unsafe or of a newer format.
        BackendError: the backend is unknown, not installed, or cannot run the bundle.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle, verify=verify, hold=True)
    if threads is not None and threads < 1:
        raise BackendError(f"A run takes 1 thread or more, not {threads}.")
    given = None if providers is None else tuple(providers)
    options = BackendOptions(threads, given, native, tf32)
    used, choice, graphs = select(bundle, backend, options)
    if len(bundle.manifest.sizes) < 2:
        return Session(bundle, GraphRunner(bundle, used, choice, graphs))
    bundle.hold()  # once, for all sizes
    views = {size: bundle.at(size) for size in bundle.manifest.sizes}
    bundle.release()
    runners = {
        size: GraphRunner(view, used, choice, graphs if size == bundle.manifest.sizes[0] else {})
        for size, view in views.items()
    }
    return Session(bundle, SizedRunner(runners))


def make_pipeline(
    config: SegmentorConfig | DetectorConfig, sizes: Sequence[Size], fit: Fit
) -> SegmentationPipeline | DetectionPipeline:
    """The steps before and after a run of a network with inputs of ``sizes`` (height, width)."""
    if isinstance(config, DetectorConfig):
        return DetectionPipeline(config, sizes)
    kind = SegmentationPipeline if config.panoptic is None else PanopticPipeline
    return kind(config, sizes, fit)


class Session:
    """Runs inference on a bundle. Any method may be called from several threads at once.

    A segmentor's labels images (:meth:`segment`), a detector's finds objects in them
    (:meth:`detect`), and any takes its network's own inputs (:meth:`run_batches`,
    :meth:`run_raw`). Graphs are loaded at their first use, or by :meth:`warm_up`. A context
    manager; after :meth:`close` every use is a ``BackendError``.

    Attributes:
        bundle: the bundle.
        runner: what runs its graphs: here, or in a service's worker processes.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.bundle = bundle
        self.runner = runner
        manifest = bundle.manifest
        configs = {"segmentor": manifest.architecture, "detector": manifest.detector}
        config = configs.get(manifest.kind)
        self._pipeline: SegmentationPipeline | DetectionPipeline | None = None
        if config is not None:
            self._pipeline = make_pipeline(config, self.sizes, manifest.fit)

    @property
    def segmentation(self) -> SegmentationPipeline:
        """The steps before and after a segmentor's run; ``BundleError`` for other bundles."""
        if not isinstance(self._pipeline, SegmentationPipeline):
            raise self._other_kind("segment images")
        return self._pipeline

    @property
    def detection(self) -> DetectionPipeline:
        """The steps before and after a detector's run; ``BundleError`` for other bundles."""
        if not isinstance(self._pipeline, DetectionPipeline):
            raise self._other_kind("detect objects")
        return self._pipeline

    @property
    def images(self) -> SegmentationPipeline | DetectionPipeline:
        """The steps before and after a run on images; ``BundleError`` for a module's bundle."""
        return self._pipeline or self.segmentation

    @property
    def detects(self) -> bool:
        """Whether the bundle is of a detector."""
        return self.bundle.manifest.kind == "detector"

    @property
    def panoptic(self) -> bool:
        """Whether :meth:`segment` answers with a `PanopticSegmentation`."""
        return isinstance(self._pipeline, PanopticPipeline)

    @property
    def backend(self) -> str:
        """The name of the backend in use."""
        return self.runner.backend

    @property
    def choice(self) -> str:
        """Why that backend is used, as a sentence."""
        return self.runner.choice

    @property
    def operators(self) -> str:
        """What runs the ``fdconv`` operators, and why; empty where the backend settles it."""
        return self.runner.operators

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return self.bundle.batch_sizes

    @property
    def input_size(self) -> Size:
        """(height, width) in pixels of the images a segmentor or detector takes, see ``sizes``."""
        if not self.sizes:
            raise self._other_kind("segment images")
        return self.sizes[0]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of every input size there are graphs for, ``input_size`` first."""
        return self.bundle.manifest.sizes

    def at(self, size: Size) -> Session:
        """A session of one (height, width)'s graphs alone, shared with this one, as is closing.

        Raises:
            BundleError: there are none.
        """
        if size not in self.sizes:
            raise BundleError(
                f"The bundle {self.bundle.path} has no graphs of {listed([size])} (height x "
                f"width); it has {listed(self.sizes) or 'none'}. Export it with --size "
                f"{listed([size])} as well."
            )
        runner = self.runner
        runner = runner.runners[size] if isinstance(runner, SizedRunner) else runner
        return Session(self.bundle.at(size), runner)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of a segmentor's or detector's classes."""
        return self.images.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """An RGB colour for each of a segmentor's or detector's classes."""
        return self.images.palette

    @property
    def preprocessing(self) -> Preprocessing:
        """How a segmentor's or detector's images become its input."""
        return self.images.preprocessing

    def read_image(
        self, source: bytes | str | os.PathLike[str] | ImageFile, *, max_pixels: int = MAX_PIXELS
    ) -> npt.NDArray[Any]:
        """Decode an image file as the network's images were loaded in training: (H, W, C).

        See :func:`load_image`, also for what it raises.
        """
        return load_image(source, self.preprocessing, max_pixels=max_pixels)

    def segment(
        self,
        image: ImageSource,
        *,
        fit: Fit | None = None,
        mode: Mode | None = None,
        scales: MultiScale | None = None,
    ) -> Segmentation:
        """Label every pixel of an image.

        Args:
            image: (H, W, 3) uint8 RGB, any size; of a network that loads otherwise, (H, W, C) of
                any real type with its bands (see ``Preprocessing.loading``). Or an image file's
                path.
            fit: how an image of another aspect ratio is brought to the bundle's size in ``whole``
                mode; by default as the bundle says.
            mode: ``whole`` or ``slide``; by default the mode the network was tested in.
            scales: sizes and mirror images to look at and merge; one look if not given. In
                ``slide`` mode factors of the image's own size, and any is computed as published;
                in ``whole`` mode of the input size that it takes (see `best_size`), with a graph
                for each.

        Raises:
            ImageError: ``image`` is not such an array, or its file cannot be decoded.
            BundleError: the bundle is not a segmentor's, records no stride to slide by, or lacks a
                graph that ``scales`` need, with what to export.
        """
        pipeline, pixels = self.segmentation, self._pixels(image)
        mode = mode or pipeline.mode
        if mode not in ("whole", "slide"):
            raise ImageError(f"An image is segmented in mode 'whole' or 'slide', not {mode!r}.")
        if scales is not None and self.panoptic:
            raise BundleError(
                f"The bundle {self.bundle.path} gives panoptic segments, which are not merged over "
                "several sizes or mirror images. Leave scales out, on the command line "
                "--multi-scale and --flip."
            )
        if mode == "slide":
            return pipeline.slide(pixels, self.run, self.batch_sizes[-1], scales=scales)
        if scales is not None:
            base = self._base_of(check_image(pixels, self.preprocessing), scales)
            return pipeline.at_scales(pixels, scales, self.run, base, fit)
        answer: Segmentation
        (answer,) = self.finish_all([pipeline.prepare(pixels, fit=fit)])
        return answer

    def _base_of(self, image: npt.NDArray[Any], scales: MultiScale) -> Size:
        """The input size that factors multiply; refuses those that there are no graphs for."""
        base = best_size((image.shape[0], image.shape[1]), self.sizes)
        divisor = self.preprocessing.size_divisor
        sizes = [padded(scaled_size(base, factor), divisor) for factor in scales.factors]
        missing = [size for size in sizes if size not in self.sizes]
        if missing:
            graphs = "a graph" if len(self.sizes) == 1 else "graphs"
            raise BundleError(
                f"The bundle {self.bundle.path} has {graphs} of {listed(self.sizes)} (height x "
                f"width), and these factors need {listed(missing)} too. Export it with --size "
                f"{listed(missing, ' --size ')} as well, leave such factors out, or evaluate the "
                "checkpoint, which takes any size."
            )
        return base

    def detect(self, image: ImageSource) -> Detection:
        """Find the objects in an image.

        Args:
            image: (H, W, 3) uint8 RGB, any size, or an image file's path. It is resized in its
                own aspect ratio as published, or smaller where it would not fit the bundle's size.

        Raises:
            ImageError: as :meth:`segment`.
            BundleError: the bundle is not a detector's.
        """
        answer: Detection
        (answer,) = self.finish_all([self.detection.prepare(self._pixels(image))])
        return answer

    def finish_all(self, prepared: Sequence[Prepared]) -> list[Any]:
        """Run prepared images, those of one input size together, and finish each."""
        found: list[Any] = [None] * len(prepared)
        for size in dict.fromkeys(one.network for one in prepared):
            at = [number for number, one in enumerate(prepared) if one.network == size]
            start, names = time.perf_counter(), prepared[at[0]].inputs
            feeds = {
                name: np.stack([prepared[number].inputs[name] for number in at]) for name in names
            }
            outputs = self.run_batches(feeds)
            seconds = (time.perf_counter() - start) / len(at)
            for row, number in enumerate(at):
                own = {name: value[row] for name, value in outputs.items()}
                found[number] = self.images.finish(prepared[number], own, seconds)
        return found

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """A segmentor's logits (N, classes, h, w) for images of exactly the bundle's size.

        Args:
            batch: (N, H, W, C) uint8, RGB where C is 3, or (N, C, H, W) float32 normalised; any N.

        Raises:
            ImageError: another shape or type.
            BundleError: the bundle is not a segmentor's.
        """
        if self.panoptic:
            raise self._other_kind("give a logit for each class and pixel")
        try:
            images = np.asarray(batch)
        except (RuntimeError, TypeError, ValueError):
            images = np.empty((), object)  # refused below
        images = self.segmentation.normalise_batch(images)
        return self.run_batches({"images": images})["logits"]

    def run_batches(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """The network's outputs for any number of images; see :meth:`GraphRunner.run_batches`.

        Args:
            feeds: every input by name, as the manifest describes them, but with any number of
                images N along each first axis; so are the outputs.

        Raises:
            ImageError: the inputs have other names, shapes or types.
        """
        images, manifest = feeds.get("images"), self.bundle.manifest
        if images is not None and images.ndim == 4 and images.shape[2:] in self.sizes:
            manifest = manifest.at((images.shape[2], images.shape[3]))
        specs = manifest.inputs[self.batch_sizes[0]]
        wanted: dict[str, Any] = {s.name: (s.shape[1:], s.dtype) for s in specs}
        given = {name: (value.shape[1:], value.dtype) for name, value in feeds.items()}
        counts = {value.shape[:1] for value in feeds.values()}
        if given != wanted or len(counts) != 1 or counts & {(), (0,)}:
            takes = [f"{s.name} {('N', *s.shape[1:])} {s.dtype}".replace("'", "") for s in specs]
            found = [f"{name} {value.shape} {value.dtype}" for name, value in feeds.items()]
            more = listed(self.sizes[1:], " or ")
            raise ImageError(
                f"This bundle runs {' and '.join(takes)}, with one N ≥ 1"
                f"{more and f', or of {more} pixels'}; found "
                f"{' and '.join(found)}. segment() and detect() take an image of any size, and "
                "run() images (N, H, W, C) uint8, too."
            )
        return self.runner.run_batches(feeds)

    def run_raw(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run one graph on exactly its inputs; see :meth:`GraphRunner.run_raw`."""
        return self.runner.run_raw(feeds)

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> float:
        """Load the graphs and run each once, so that the first request is as fast as any.

        The pipeline's steps run once as well. Returns the seconds it took.
        """
        start = time.perf_counter()
        self.runner.warm_up(batch_sizes)
        if self._pipeline is not None:
            image = np.zeros((*self.input_size, self.preprocessing.channels), np.uint8)
            specs = self.bundle.manifest.outputs[self.batch_sizes[0]]
            outputs = {spec.name: np.zeros(spec.shape[1:], spec.dtype) for spec in specs}
            self._pipeline.finish(self._pipeline.prepare(image), outputs)
        return time.perf_counter() - start

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self.runner.closed

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self.runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pixels(self, image: ImageSource) -> npt.NDArray[Any]:
        return self.read_image(image) if isinstance(image, (str, os.PathLike)) else image

    def _other_kind(self, does: str) -> BundleError:
        """The refusal of what a bundle of this kind does not do."""
        found = self.bundle.manifest.kind
        uses = {"segmentor": "segment(image)", "detector": "detect(image)"}
        return BundleError(
            f"The bundle {self.bundle.path} is of a {found}, which does not {does}. Use "
            f"{uses.get(found, 'run_raw with its own inputs')}."
        )
