"""The options of an export, pictures among them, and what is refused before anything is loaded.

Imports neither torch nor onnx, so that the command line finds mistakes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ExportError, ImageError
from fdconv_deploy.export.validation.tolerance import TOLERANCES, Precision
from fdconv_deploy.runtime.images import ImageFile, ImageTooLargeError, image_size, load_image
from fdconv_deploy.runtime.input_files import images_of
from fdconv_deploy.runtime.manifest import Fit

Picture = NDArray[Any]
Activations = Literal["unsigned", "signed"]
Progress = Callable[[str], None]

LARGEST_SIDE = 16384


def _silent(_step: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportOptions:
    """How a network is exported. Impossible options raise an `ExportError` as this is made.

    Attributes:
        size: height and width of the graphs in pixels, or several such pairs for graphs of each
            over the same weights; an image then takes that nearest to its proportions. If not
            given: the crop of a network tested in ``slide`` mode, what a detector's published
            resize makes of a landscape image, or the example's of any other module.
        batches: batch sizes, one graph each. If not given: 1, or the example's.
        fit: how a segmentor's images of another aspect ratio are brought to ``size``. Detectors
            always pad.
        pictures: ``(H, W, 3)`` uint8 RGB or of the network's bands, of any size, to compare the
            graphs with the network on; packaged pictures if none are given.
        precision: ``fp16`` computes plain parts in float16, ``int8`` plain convolutions in eight
            bits; what makes FDConv's kernels stays float32. Inputs and outputs are float32 in all.
        tolerance: largest error kept, as a share of an output's largest value; in int8 the largest
            share of positions of another class. `tolerance.TOLERANCES` if not given.
        keep_fp32: paths of modules, or shell patterns of them, that stay float32.
        calibration: pictures that int8 learns the ranges of activations from; of any other module
            its inputs, ``(B, …)`` float32.
        activations: ``unsigned`` int8 for ONNX Runtime, ``signed`` for TensorRT.
        overwrite: replace a bundle that exists.
        progress: called with a sentence as each step begins.
    """

    size: tuple[int, int] | Sequence[tuple[int, int]] | None = None
    batches: Sequence[int] | None = None
    fit: Fit = "stretch"
    pictures: Sequence[Any] = ()
    precision: Precision = "fp32"
    tolerance: float | None = None
    keep_fp32: Sequence[str] = ()
    calibration: Sequence[Any] = ()
    activations: Activations = "unsigned"
    overwrite: bool = False
    progress: Progress | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        for name, choices in (("fit", Fit), ("precision", Precision), ("activations", Activations)):
            expected, found = get_args(choices), getattr(self, name)
            if found not in expected:
                listed = f"{', '.join(expected[:-1])} or {expected[-1]}"
                raise ExportError(f"{name} is {listed}, not {found!r}.")
        for size in self.sizes:
            check_size(size)
        if len(set(self.sizes)) < len(self.sizes) or (self.size is not None and not self.sizes):
            raise ExportError(
                "sizes are pairs of height and width, one or more and each once, got "
                f"{', '.join(f'{h}x{w}' for h, w in self.sizes) or 'none'}."
            )
        if self.batches is not None:
            unique = tuple(sorted(set(self.batches)))
            if not unique or unique[0] < 1:
                raise ExportError(f"batch sizes must be 1 or more, got {list(self.batches)}.")
            object.__setattr__(self, "batches", unique)
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ExportError(
                "the tolerance is a share, 0 or more, "
                f"e.g. {TOLERANCES[self.precision]:g}; got {self.tolerance:g}."
            )
        if self.precision == "int8" and not len(self.calibration):
            raise ExportError(
                "int8 needs images to learn the activations' ranges from: give some hundred "
                "pictures of the kind the network will see, as calibration (--calibrate FOLDER)."
            )
        if self.precision != "int8" and len(self.calibration):
            raise ExportError(
                f"calibration images are for int8, and the precision is {self.precision}. Choose "
                "int8, or leave them out."
            )
        if self.precision == "fp32" and self.keep_fp32:
            raise ExportError(
                "keep_fp32 names modules that stay float32 in an fp16 or int8 bundle; in fp32 all "
                "do. Choose another precision, or leave it out."
            )

    @classmethod
    def of(cls, options: ExportOptions | None, fields: dict[str, Any]) -> ExportOptions:
        """Options with some fields changed; defaults where none are given."""
        return cls(**fields) if options is None else replace(options, **fields)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every ``size`` that was given, the bundle's own first; empty where none was."""
        if self.size is None or not self.size:
            return ()
        first, *others = self.size
        if isinstance(first, int):
            (second,) = others
            assert isinstance(second, int)
            return ((first, second),)
        return tuple((height, width) for height, width in (first, *others))

    @property
    def allowed(self) -> float:
        """The tolerance given, or the precision's own."""
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance

    @property
    def say(self) -> Progress:
        """``progress``, or what does nothing."""
        return self.progress or _silent


def check_size(size: tuple[int, int]) -> None:
    """Refuse a height and width in pixels that no graph could have.

    Raises:
        ExportError: out of range.
    """
    if min(size) < 1 or max(size) > LARGEST_SIDE:
        raise ExportError(
            f"height and width must be 1 to {LARGEST_SIDE} pixels, got {size[0]}x{size[1]}."
        )


class Pictures(Sequence[Picture]):
    """Image files, or those of a folder, decoded when they are asked for.

    Files of a folder that are named like another with ``_labels.png`` at the end are masks, and
    left out.

    Args:
        source: a folder, or files.

    Raises:
        ImageError: on making it: no such folder, no images in it, or one whose header cannot
            be read. On reading: one that is cut off, or not of the network's bands.
    """

    def __init__(self, source: Path | Sequence[Path]) -> None:
        self.paths = images_of(source) if isinstance(source, Path) else list(source)
        self.preprocessing = Preprocessing()
        for path in self.paths:
            _check_header(path)

    def for_network(self, preprocessing: Preprocessing) -> Pictures:
        """The same, decoded as a network's images are."""
        found = copy(self)
        found.preprocessing = preprocessing
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return load_image(self.paths[index], self.preprocessing)


def _check_header(image: Path) -> None:
    """Refuse a file that is no picture, or too large, as far as its header can tell."""
    if ImageFile.of(image).is_array:
        return
    try:
        image_size(image)
    except ImageTooLargeError:
        raise
    except ImageError:
        # Pillow does not know TIFF files of any number of bands; the network's reader does.
        if image.suffix.lower() not in (".tif", ".tiff"):
            raise
