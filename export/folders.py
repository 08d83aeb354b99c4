"""Folders of images, with or without masks, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.decoding import FORMATS, read_image
from fdconv_deploy.runtime.listing import MASK_ENDING as MASK
from fdconv_deploy.runtime.listing import images_of

Picture = NDArray[np.uint8]


class Pictures(Sequence[Picture]):
    """The images of a folder, decoded when they are asked for.

    Files named like another with ``_labels.png`` at the end are its masks, not images.

    Raises:
        ImageError: on making it: no such folder, no images in it, or one whose header cannot
            be read. On reading: one that is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = images_of(folder)
        for path in self.paths:
            _check_header(path)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [read_image(path) for path in self.paths[index]]
        return read_image(self.paths[index])

    def masks(self) -> list[NDArray[np.integer] | None]:
        """Of each image, its labels ``(H, W)`` if there is such a file.

        Raises:
            ImageError: a mask cannot be read, has more than one channel or another size.
        """
        return [_mask(path) for path in self.paths]


def _check_header(path: Path) -> None:
    try:
        Image.open(path, formats=FORMATS).close()
    except OSError as error:
        raise ImageError(
            f"The image {path} cannot be read. Remove it from the folder, or replace it."
        ) from error


def _mask(image: Path) -> NDArray[np.integer] | None:
    path = image.with_name(image.stem + MASK)
    if not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            labels = np.asarray(opened)
            size = Image.open(image).size
    except OSError as error:
        raise ImageError(f"The mask {path} cannot be read. Remove it, or replace it.") from error
    if labels.ndim != 2 or labels.shape != size[::-1]:
        raise ImageError(
            f"The mask {path} must hold one class index for each pixel of its image, "
            f"{size[1]}x{size[0]} (height x width); it is {'x'.join(map(str, labels.shape))}."
        )
    return labels.astype(np.int64)
