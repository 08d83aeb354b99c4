"""Semantic segmentation: what is done with an image before and after a run, and the answer.

At several sizes and mirrored as mmsegmentation 1.2.2's test-time augmentation (``SegTTAModel``
behind ``TestTimeAug``): the image is resized by each factor in its own aspect ratio, then mirrored
or not; each answer's logits are mirrored back, resized to the image's own size, and made
probabilities by softmax; their mean's highest class wins. Of a head with one output mmsegmentation
takes the sigmoid twice, which leaves no probability below a half; here it is taken once, and the
mean is above the threshold or not. Scores of detectron2's Mask2Former and MaskDINO are sums of
probabilities already, and averaged as they are, as their own ``SemanticSegmentorWithTTA`` does;
mmsegmentation's go through the softmax.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import DetectorConfig, QueryHeadConfig, SegmentorConfig
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import (
    Labels,
    Logits,
    View,
    labels_of,
    row_blocks,
    view_of,
)
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    Prepared,
    Size,
    check_image,
    keep_ratio_size,
    normalise,
    padded,
    prepare_image,
    published_size,
    resize,
    scaled_size,
)
from fdconv_deploy.runtime.sliding_window import Run, SlidingRows, slide_stride
from fdconv_deploy.runtime.visualization import RGB, default_palette, mask_png, overlay

Mode = Literal["whole", "slide"]
# The class of pixels that are in no segment of a panoptic answer.
VOID = "void"
_BLACK: RGB = (0, 0, 0)
_LARGEST_FACTOR = 16.0


@dataclass(frozen=True)
class MultiScale:
    """At which sizes an image is looked at.

    Attributes:
        factors: of the image's size, or of the size that images are fitted to.
        flip: whether its mirror image (left for right) is looked at too, at each of them.
    """

    factors: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Refuse factors that are none."""
        if not self.factors or not all(0 < one <= _LARGEST_FACTOR for one in self.factors):
            raise FDConvError(
                f"Factors of several scales are numbers above 0 and up to {_LARGEST_FACTOR:g}, "
                f"e.g. 0.5, 0.75, 1; found {', '.join(map('{:g}'.format, self.factors))}."
            )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"multi_scale": list(self.factors), "flip": self.flip}

    @property
    def mirrored(self) -> tuple[bool, ...]:
        """What is done at each size, in mmsegmentation's order."""
        return (False, True) if self.flip else (False,)


@dataclass(frozen=True)
class Segmentation:
    """Labels of an image, and how they were computed.

    Attributes:
        labels: (H, W) at the image's own size, uint8, or uint16 above 256 classes; indices into
            ``classes`` and ``palette``.
        classes: the names of the classes.
        palette: an RGB colour for each class.
        fit: "resized" when the network saw the image in its own aspect ratio and nothing else,
            "stretched" or "letterboxed" when it had to be fitted, which changes the answer.
        mode: "whole" or "slide".
        timings: seconds, by stage.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    fit: FitDone
    mode: str
    timings: dict[str, float]

    def areas(self) -> npt.NDArray[np.int64]:
        """How many pixels each class has: (classes,) int64."""
        counts = np.zeros(len(self.classes), np.int64)
        for rows in row_blocks(self.labels.shape):
            counts += np.bincount(self.labels[rows].reshape(-1), minlength=len(counts))
        return counts

    def kept(self, min_score: float) -> Segmentation:
        """Without objects that score less than ``min_score``."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON: size, mode, and the share of the pixels of each class that is there."""
        height, width = self.labels.shape
        shares = zip(self.classes, self.areas() / self.labels.size, strict=True)
        found = {name: round(float(share), 4) for name, share in shares if share}
        return {"height": height, "width": width, "mode": self.mode, "classes": found}

    def mask_png(self) -> bytes:
        """An indexed PNG whose pixel values are the labels."""
        return mask_png(self.labels, self.palette)

    def overlay(self, image: npt.NDArray[Any], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image, as `as_rgb` shows it, with the classes' colours: (H, W, 3) uint8 RGB."""
        return overlay(image, self.labels, self.palette, opacity)


class SegmentationPipeline:
    """A segmentor's steps before and after a run of its network.

    Args:
        segmentor: what the network is made of.
        sizes: (height, width) of its inputs: the first is that of a sliding crop; an image takes
            that nearest to its proportions, see ``best_size``.
        fit: how images of another aspect ratio are brought to an input by default.
    """

    def __init__(
        self, segmentor: SegmentorConfig, sizes: Sequence[Size], fit: Fit = "stretch"
    ) -> None:
        self.preprocessing = segmentor.preprocessing
        self.sizes, self.fit = tuple(sizes), fit
        self.mode: Mode = segmentor.test.mode
        self.classes, self.palette = classes_of(segmentor)
        self._head, self._test = segmentor.decode_head, segmentor.test

    def prepare(self, image: npt.NDArray[Any], *, fit: Fit | None = None) -> Prepared:
        """Resize and normalise an image for a ``whole`` run; see `prepare_image`."""
        return prepare_image(image, self.preprocessing, self.sizes, fit or self.fit)

    def finish(
        self,
        prepared: Prepared,
        outputs: Mapping[str, npt.NDArray[Any]],
        inference_seconds: float = 0.0,
        *,
        size: Size | None = None,
    ) -> Segmentation:
        """Choose the class of each pixel.

        Args:
            prepared: the image, as :meth:`prepare` gave it.
            outputs: the network's output for it: ``logits`` (classes, h, w) float32.
            inference_seconds: what the run took, for the answer's ``timings``.
            size: (H, W) of the answer; the image's by default.
        """
        start = time.perf_counter()
        view = view_of(outputs["logits"], prepared, size, align_corners=self._head.align_corners)
        labels = labels_of(view, threshold=self._head.label_threshold)
        timings = prepared.timings(inference_seconds, start)
        return Segmentation(labels, self.classes, self.palette, prepared.fit, "whole", timings)

    def slide(
        self,
        image: npt.NDArray[Any],
        run: Run,
        batch: int,
        *,
        scales: MultiScale | None = None,
        any_size: bool = False,
    ) -> Segmentation:
        """Label an image by sliding a crop of the input's size over it, ``batch`` crops a run.

        ``scales`` are factors of the image's own size; it is looked at in its published size alone
        if None. With ``any_size``, ``run`` takes inputs of any size, and an image that is smaller
        than the crop is one, as published; otherwise it is padded to the crop. ``BundleError``
        where the network records no stride.
        """
        timed, how = _TimedRun(run), self.preprocessing
        image = check_image(image, how)
        own, crop = (image.shape[0], image.shape[1]), self.sizes[0]
        stride = slide_stride(self._test, crop)
        sizes = [published_size(*own, how)]
        if scales is not None:
            sizes = [_scaled(own, factor) for factor in scales.factors]
        views: list[View] = []
        fit: FitDone = "resized"
        for size in sizes:
            resized = resize(image, *size, how.resample)
            within = (min(crop[0], size[0]), min(crop[1], size[1])) if any_size else crop
            for mirrored in scales.mirrored if scales else (False,):
                pixels = resized[:, ::-1] if mirrored else resized
                rows = SlidingRows(pixels, how, within, stride, timed, self._head, batch)
                views.append(rows.view(*own, mirrored=mirrored))
                fit = "letterboxed" if rows.padded else fit
        return self._merged(views, timed, fit, "slide")

    def at_scales(
        self,
        image: npt.NDArray[Any],
        scales: MultiScale,
        run: Run,
        base: Size | None = None,
        fit: Fit | None = None,
    ) -> Segmentation:
        """Label an image at several sizes, each as one input.

        ``scales`` are factors of ``base`` (height, width), of the image's own size if it is None.
        """
        timed, how = _TimedRun(run), self.preprocessing
        image = check_image(image, how)
        own = (image.shape[0], image.shape[1])
        published = own if base is None else published_size(*own, how)
        views: list[View] = []
        done: FitDone = "resized"
        for factor in scales.factors:
            height, width = _scaled(published, factor)
            scaled = how.model_copy(update={"scale": (width, height), "keep_ratio": False})
            size = (height, width) if base is None else scaled_size(base, factor)
            size = padded(size, how.size_divisor)
            for mirrored in scales.mirrored:
                prepared = prepare_image(image, scaled, [size], fit or self.fit, mirrored=mirrored)
                (logits,) = timed(prepared.inputs["images"][None])
                align_corners = self._head.align_corners
                views.append(view_of(logits, prepared, align_corners=align_corners))
                done = done if prepared.fit == "resized" else prepared.fit
        return self._merged(views, timed, done, "whole")

    def _merged(self, views: list[View], run: _TimedRun, fit: FitDone, mode: Mode) -> Segmentation:
        prepared = run.others()
        # Which framework a network is of shows in the library that resizes its images.
        detectron2 = self.preprocessing.resample == "pillow"
        scores = detectron2 and isinstance(self._head, QueryHeadConfig)
        labels = labels_of(*views, threshold=self._head.label_threshold, scores=scores)
        timings = {
            "preprocess": prepared,
            "inference": run.seconds,
            "postprocess": run.others() - prepared,
        }
        return Segmentation(labels, self.classes, self.palette, fit, mode, timings)

    def normalise_batch(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images (N, H, W, C) uint8 of an input's size as the network takes them; else ``batch``.

        They are RGB where C is 3, and become (N, C, H, W) float32.
        """
        bands, shape = self.preprocessing.channels, batch.shape
        if batch.dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[3] != bands:
            return batch
        if shape[1:3] not in self.sizes:
            return batch
        out = np.empty((len(batch), bands, *shape[1:3]), np.float32)
        for image, slot in zip(batch, out, strict=True):
            normalise(image, self.preprocessing, out=slot)
        return out


class _TimedRun:
    """A network's run, and how many seconds it takes in all."""

    def __init__(self, run: Run) -> None:
        self._run, self._start, self.seconds = run, time.perf_counter(), 0.0

    def __call__(self, inputs: Logits) -> Logits:
        start = time.perf_counter()
        logits = self._run(inputs)
        self.seconds += time.perf_counter() - start
        return logits

    def others(self) -> float:
        """The seconds since the beginning that were no run's."""
        return time.perf_counter() - self._start - self.seconds


def _scaled(size: Size, factor: float) -> Size:
    """As ``Resize(scale_factor=…, keep_ratio=True)``: within the rounded size, in proportion."""
    return keep_ratio_size(*size, scaled_size(size, factor))


def listed(sizes: Sequence[Size], between: str = ", ") -> str:
    """Sizes as they are given on the command line, height x width."""
    return between.join(f"{height}x{width}" for height, width in sizes)


def classes_of(
    config: SegmentorConfig | DetectorConfig,
) -> tuple[tuple[str, ...], tuple[RGB, ...]]:
    """The name and the RGB colour of each label; generated where the checkpoint gave none.

    Of a head with one output whose checkpoint names one class, that is label 1, and label 0 is
    called "background", and black. Panoptic answers have one label more, black as well, of what is
    in no segment. A detector's generated colours are never black.
    """
    if isinstance(config, DetectorConfig):
        labels, panoptic = config.bbox_head.num_classes, False
        colours = config.palette or default_palette(labels + 1)[1:]
    else:
        labels, panoptic = config.decode_head.labels, config.panoptic is not None
        colours = config.palette or default_palette(labels)
    names = config.classes or tuple(f"class {number}" for number in range(labels))
    names = ("background",) * (labels - len(names)) + names
    colours = (_BLACK,) * (labels - len(colours)) + colours
    return ((*names, VOID), (*colours, _BLACK)) if panoptic else (names, colours)
