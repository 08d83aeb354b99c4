"""Files and folders of images, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import ImageFile, ImageTooLargeError, image_size, load_image
from fdconv_deploy.runtime.input_files import images_of

Picture = NDArray[Any]


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

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [load_image(path, self.preprocessing) for path in self.paths[index]]
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
