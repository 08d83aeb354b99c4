"""Pixels to the network's input, with the arithmetic of the published pipelines.

Published: keep-ratio resize (``mmcv.imrescale``: cv2 bilinear in the image's own type, uint8
mostly), then ``(image - mean) / std`` in float32, band by band. Images of other than three bands
go the same way, as in mmsegmentation 1.2.2, whose ``SegDataPreProcessor`` swaps red and blue of
three bands alone. A bundle's graph has one static size, so an image whose
resize is not that size must be fitted to it. FDConv layers build their kernels from an
average over the whole image: both ways of fitting change the answer, everywhere in the
image, and the answer says which was used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.config import SIZE_DIVISOR, Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.manifest import Fit

FitDone = Literal["resized", "stretched", "letterboxed"]
"""As published; in another aspect ratio; or padded further than published."""
Size = tuple[int, int]
Pixels = npt.NDArray[Any]
"""(H, W, C), uint8 mostly."""
# What cv2.resize takes: types, and bands at a time (CV_CN_MAX, 512 before OpenCV 5).
_RESIZABLE = tuple(map(np.dtype, ("uint8", "uint16", "int16", "float32", "float64")))
_MOST_BANDS = 128


@dataclass(frozen=True)
class Prepared:
    """An image ready for a run. The inputs of several may be stacked and run together.

    Attributes:
        inputs: the network's inputs by name, without their batch axis.
        network: (H, W) of the input.
        fit: how the image was put into it, see `FitDone`.
        covered: (H, W) of the input's part that it covers, at the top left.
        image: (H, W) of the image.
        seconds: what preparing it took.
        mirrored: whether the input holds its mirror image, left for right.
    """

    inputs: dict[str, npt.NDArray[Any]]
    network: Size
    fit: FitDone
    covered: Size
    image: Size
    seconds: float = 0.0
    mirrored: bool = False

    def timings(self, inference: float, start: float) -> dict[str, float]:
        """Seconds by stage: of preparing, of a run, and since ``start`` by ``perf_counter``."""
        postprocess = time.perf_counter() - start
        return {"preprocess": self.seconds, "inference": inference, "postprocess": postprocess}


def check_image(image: npt.NDArray[Any], preprocessing: Preprocessing | None = None) -> Pixels:
    """``image`` as it is to be resized: of the network's bands, and float32 where that is asked.

    Args:
        image: (H, W, 3) uint8 in RGB order; for a network of another ``loading``, (H, W, C) of any
            real numbers, for one band (H, W) as well. Types that OpenCV cannot resize become
            float32, as all do for ``to_float32``.

    Raises:
        ImageError: it is not such an array, or holds numbers that are not finite.
    """
    how = preprocessing or Preprocessing()
    bands, color = how.channels, how.loading == "color"
    array = isinstance(image, np.ndarray)
    found = f"{image.shape} {image.dtype}" if array else type(image).__name__
    if array and not color and image.ndim == 2 and bands == 1:
        image = image[:, :, None]
    if (
        not array
        or image.ndim != 3
        or image.shape[2] != bands
        or (image.dtype != np.uint8 if color else image.dtype.kind not in "uif")
        or image.size == 0
    ):
        if color:
            raise ImageError(
                f"An image must be a numpy array (H, W, 3) uint8 in RGB order, found {found}. "
                "read_image makes one from a file."
            )
        hint = f"The network takes {bands} band{'s' * (bands > 1)}."
        if array and image.ndim == 3 and image.shape[0] == bands:
            hint = "Its bands come first: np.moveaxis(image, 0, -1) puts them last."
        raise ImageError(
            f"An image for this network must be an array (H, W, {bands}) of real numbers, found "
            f"{found}. {hint}"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ImageError(
            "The image holds values that are not finite, as some files mark missing data. Fill "
            "them as for training: one of them would spoil the whole answer."
        )
    if how.to_float32 or image.dtype.newbyteorder("=") not in _RESIZABLE:
        return image.astype(np.float32)
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def scene_bands(scene: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Pixels:
    """A drawn scene (H, W, 3) uint8 RGB as an image of the network's bands, to try it on.

    Itself for a network of ``color``, else (H, W, C) float32: bands repeat red, green and blue.
    They have the network's own mean and deviation as the scene has ImageNet's, for its bands may
    be in any unit; where the network does not normalise, they keep the scene's values.
    """
    if preprocessing.loading == "color":
        return scene
    order = np.arange(preprocessing.channels) % 3
    bands = scene[:, :, order].astype(np.float32)
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    if not mean.any() and (std == 1).all():
        return bands
    usual = Preprocessing()
    centre, spread = (np.asarray(v, np.float32)[order] for v in (usual.mean, usual.std))
    return (bands - centre) / spread * std + mean


def keep_ratio_size(height: int, width: int, scale: Size) -> Size:
    """The (height, width) ``mmcv.imrescale`` gives an image for ``scale``, in any order.

    The longer side stays within the larger number and the shorter side within the smaller.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return scaled_size((height, width), factor)


def scaled_size(size: Size, factor: float) -> Size:
    """(height, width) times a factor, rounded as mmcv rounds.

    The lower bound is ours, for slivers that would vanish.
    """
    height, width = (max(1, int(length * float(factor) + 0.5)) for length in size)
    return height, width


def published_size(height: int, width: int, preprocessing: Preprocessing) -> Size:
    """The (height, width) the published pipeline resizes an image to; its own without a scale.

    ``scale`` is (width, height) in pixels where ``keep_ratio`` is off, as in mmcv.
    """
    if preprocessing.scale is None:
        return height, width
    if not preprocessing.keep_ratio:
        return preprocessing.scale[1], preprocessing.scale[0]
    return keep_ratio_size(height, width, preprocessing.scale)


def best_size(image: Size, sizes: Sequence[Size]) -> Size:
    """Of several input sizes, the one whose proportions are nearest to an image's, all (H, W).

    Of those that leave within 5 % as much of the input empty as the best, the first.
    """

    def covered(size: Size) -> float:
        ratio = image[0] * size[1] / (image[1] * size[0])
        return min(ratio, 1 / ratio)

    most = max(map(covered, sizes))
    return next(size for size in sizes if covered(size) > most - 0.05)


def place(
    size: Size, network: Size, preprocessing: Preprocessing, fit: Fit | None
) -> tuple[FitDone, Size]:
    """Decide how an image of ``size`` goes into an input of ``network``, and what it covers there.

    A segmentor's by ``fit``: where it is letterboxed or padded as published, the rest of the input
    holds the mean colour. A detector's, where that is None, at the published size if it fits, else,
    or if the checkpoint records none, as large as fits; zeros fill the rest. All (H, W).
    """
    factor = min(network[0] / size[0], network[1] / size[1])
    height, width = scaled_size(size, factor)
    inside = min(height, network[0]), min(width, network[1])  # the largest in its proportions
    published, divisor = published_size(*size, preprocessing), preprocessing.size_divisor
    if fit is None:
        too_large = published[0] > network[0] or published[1] > network[1]
        chosen = inside if too_large or preprocessing.scale is None else published
        whole = network in (chosen, padded(chosen, SIZE_DIVISOR))
        return "resized" if whole else "letterboxed", chosen
    if divisor > 1 and network == padded(published, divisor):
        return "resized", published
    # Rounding can part the two by a pixel; either way the aspect ratio is kept.
    if network in (inside, published):
        return "resized", network
    return ("stretched", network) if fit == "stretch" else ("letterboxed", inside)


def prepare_image(
    image: Pixels,
    preprocessing: Preprocessing,
    sizes: Sequence[Size],
    fit: Fit | None,
    *,
    mirrored: bool = False,
) -> Prepared:
    """Resize and normalise an image for a run, whose input is ``images`` (C, H, W) float32.

    Args:
        image: as `check_image` takes it.
        preprocessing: the network's.
        sizes: (H, W) of its inputs; the image takes that nearest to its proportions.
        fit: how a segmentor's image of another aspect ratio is brought to the input's size; None
            for a detector's, which is padded.
        mirrored: left for right, once it is resized.
    """
    start = time.perf_counter()
    image = check_image(image, preprocessing)
    if fit not in ("stretch", "pad", None):
        raise ImageError(f"An image is fitted by 'stretch' or 'pad', not {fit!r}.")
    size = (image.shape[0], image.shape[1])
    network = best_size(size, sizes)
    done, covered = place(size, network, preprocessing, fit)
    resized = resize(image, *covered, preprocessing.resample)
    tensor = normalise(resized[:, ::-1] if mirrored else resized, preprocessing, network)
    seconds = time.perf_counter() - start
    return Prepared({"images": tensor}, network, done, covered, size, seconds, mirrored)


def padded(size: Size, divisor: int) -> Size:
    """(height, width) brought up to multiples of a number."""
    height, width = (-(-length // divisor) * divisor for length in size)
    return height, width


def resize(image: Pixels, height: int, width: int, resample: str = "opencv") -> Pixels:
    """(h, w, C) to (height, width, C) of the same type, bilinear as published.

    Pillow (see `Preprocessing.resample`) resizes RGB of 8 bits alone; of other images OpenCV
    computes what detectron2 does then, which is torch's bilinear interpolation.
    """
    if image.shape[:2] == (height, width):
        return image
    if resample == "pillow" and image.dtype == np.uint8 and image.shape[2] == 3:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    resized = [
        cv2.resize(np.ascontiguousarray(part), (width, height), interpolation=cv2.INTER_LINEAR)
        # All bands in one call: float answers differ in rounding from those of one by one.
        for part in np.split(image, range(_MOST_BANDS, image.shape[2], _MOST_BANDS), axis=2)
    ]
    parts = [part.reshape(height, width, -1) for part in resized]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def normalise(
    image: Pixels,
    preprocessing: Preprocessing,
    size: Size | None = None,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """(h, w, C) to (C, H, W) float32: ``(image - mean) / std``, zeros where padded.

    Args:
        image: RGB where ``loading`` is "color", uint8 or any real type.
        size: (H, W) of the result, its own if not given; the image lies at the top left.
        out: a (C, H, W) float32 array to write into.
    """
    height, width, channels = image.shape
    full = size or (height, width)
    if out is None:
        out = np.empty((channels, *full), dtype=np.float32)
    values = np.arange(256, dtype=np.float32)
    for channel in range(channels):
        mean = np.float32(preprocessing.mean[channel])
        std = np.float32(preprocessing.std[channel])
        band = image[:, :, channels - 1 - channel if preprocessing.reversed else channel]
        plane = out[channel]
        if image.dtype == np.uint8:
            # 256 answers, looked up: the same float32 operations as on every pixel, faster.
            plane[:height, :width] = ((values - mean) / std)[band]
        else:
            plane[:height, :width] = (band.astype(np.float32) - mean) / std
        plane[height:] = 0
        plane[:height, width:] = 0
    return out
