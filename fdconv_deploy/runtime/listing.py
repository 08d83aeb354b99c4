"""Which files of a folder are its images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fdconv_deploy.errors import ImageError

from .decoding import SUFFIXES

MASK_ENDING = "_labels.png"


def images_of(folder: Path) -> list[Path]:
    """The images lying in a folder, in the order of their names; told by their endings.

    A file named like another with ``_labels.png`` at the end is that one's mask, not an image.

    :raises ImageError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ImageError(f"a folder of images was expected, but {folder} {found}.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    stems = {path.stem for path in files}
    images = [
        path
        for path in files
        if not (path.name.endswith(MASK_ENDING) and path.name.removesuffix(MASK_ENDING) in stems)
    ]
    if not images:
        raise ImageError(
            f"{folder} holds no images ({', '.join(SUFFIXES)}). Give a folder that does."
        )
    return images


def images_at(paths: Iterable[Path]) -> list[Path]:
    """Images as they are given, and in a folder's place those lying in it.

    :raises ImageError: a folder holds no images.
    """
    return [image for path in paths for image in (images_of(path) if path.is_dir() else [path])]
