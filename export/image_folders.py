"""Folders of images, with or without masks, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.evaluation.datasets import DatasetError, read_mask
from fdconv_deploy.runtime.images import ImageFile, ImageTooLargeError, image_size
from fdconv_deploy.runtime.input_files import MASK_ENDING as MASK
from fdconv_deploy.runtime.input_files import images_of
from fdconv_deploy.runtime.multiband import load_image

Picture = NDArray[Any]


class Pictures(Sequence[Picture]):
    """Image files, or those of a folder, decoded when they are asked for.

    Files of a folder that are named like another with ``_labels.png`` at the end are its masks,
    not images.

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
            _size(path)

    def for_network(self, preprocessing: Preprocessing) -> Pictures:
        """The same, decoded as a network's images are."""
        found = copy(self)
        found.preprocessing = preprocessing
        return found

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [load_image(path, self.preprocessing) for path in self.paths[index]]
        return load_image(self.paths[index], self.preprocessing)

    def masks(self) -> list[NDArray[np.integer] | None]:
        """Of each image, its labels ``(H, W)`` if there is such a file.

        Raises:
            ImageError: a mask cannot be read, has more than one channel or another size.
        """
        return [_mask(path) for path in self.paths]


def for_network(pictures: Sequence[Picture], preprocessing: Preprocessing) -> Sequence[Picture]:
    """Images as a network takes them: `Pictures` are decoded accordingly, arrays are already."""
    if isinstance(pictures, Pictures):
        return pictures.for_network(preprocessing)
    return pictures


def _size(image: Path) -> tuple[int, int] | None:
    """Height and width of a picture; None where the network's reader alone can tell them.

    Raises:
        ImageError: it is no picture, or too large.
    """
    if ImageFile.of(image).is_array:
        return None
    try:
        return image_size(image)
    except ImageTooLargeError:
        raise
    except ImageError:
        if image.suffix.lower() in (".tif", ".tiff"):
            return None  # Pillow does not know TIFF files of any number of bands
        raise


def _mask(image: Path) -> NDArray[np.integer] | None:
    path = image.with_name(image.stem + MASK)
    if not path.is_file():
        return None
    try:
        labels = read_mask(path)
    except DatasetError as error:
        raise ImageError(str(error)) from error
    size = _size(image) or labels.shape
    if labels.shape != size:
        raise ImageError(
            f"The mask {path} must hold one class index for each pixel of its image, "
            f"{size[0]}x{size[1]} (height x width); it is {'x'.join(map(str, labels.shape))}."
        )
    return labels
