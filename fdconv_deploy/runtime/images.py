"""Image files to pixels, as the published pipelines see them.

Those decode with ``cv2.imread``, so the conventions here are its conventions: EXIF
orientation applied, gray repeated over three channels, 16 bits cut to the upper eight,
CMYK by the plain formula without its colour profile, and **alpha dropped**, not blended:
what lies under transparent pixels shows. Pillow decodes instead of OpenCV because it
tells a picture's size before it decodes one, and says when a file is cut off.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fdconv_deploy.errors import ImageError

Result = TypeVar("Result")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIX = ".npy"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
# How TIFF and BigTIFF files begin, in either byte order.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS_TEXT = "JPEG, PNG, WebP, BMP or TIFF"
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF


class UnsupportedImageError(ImageError):
    """The data is not an image of an accepted format."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than accepted."""


def read_image(
    source: bytes | str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image file, given as its bytes or its path, to colours.

    A session's own ``read_image`` does it as its network's images were loaded in training, of
    any number of bands.

    :param max_pixels: refuse an image of more pixels; its header is read, nothing decoded.
    :returns: (H, W, 3) uint8, RGB, as it is meant to be looked at (EXIF applied). Of an
        animation or a multi-page file, the first picture.
    :raises UnsupportedImageError: not JPEG, PNG, WebP, BMP or TIFF, or of a pixel type
        without a fixed range (32-bit integers, floats).
    :raises ImageTooLargeError: over ``max_pixels``.
    :raises ImageError: no such file, empty, cut off or damaged.
    """
    file, name = checked_source(source)
    if is_array(file):
        raise UnsupportedImageError(
            f"{name} is a NumPy file, which holds bands and not colours. This network takes "
            f"{_FORMATS_TEXT} files; one trained on arrays says so by preprocessing.loading=bands."
        )
    return with_picture(file, name, max_pixels, lambda image: _to_rgb(_upright(image), name))


def image_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header alone.

    :raises ImageError: as `read_image` raises it, of what a header tells.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        try:
            # Of a TIFF file, Pillow gives the size as it is to be looked at.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        except Exception:  # as in _upright
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)

    return with_picture(*checked_source(source), MAX_PIXELS, size, load=False)


def checked_source(
    source: bytes | str | os.PathLike[str],
) -> tuple[io.BytesIO | Path, str]:
    """The file of a source that is not empty, and what messages call it.

    :raises ImageError: no such file, or empty.
    """
    if isinstance(source, bytes):
        if not source:
            raise ImageError("The image is empty: 0 bytes were given.")
        return io.BytesIO(source), "The image"
    file = Path(source)
    name = f"The image {file}"
    try:
        if not file.is_file():
            found = "is not a file" if file.exists() else "does not exist"
            raise ImageError(f"{name} {found}. Give the path of a {_FORMATS_TEXT} file.")
        empty = file.stat().st_size == 0
    except OSError as error:  # such as a name that is too long
        raise ImageError(f"{name} cannot be opened: {error.strerror}.") from None
    if empty:
        raise ImageError(f"{name} is an empty file.")
    return file, name


def first_bytes(file: io.BytesIO | Path, count: int) -> bytes:
    """What a file begins with."""
    if isinstance(file, io.BytesIO):
        return bytes(file.getbuffer()[:count])
    with file.open("rb") as opened:
        return opened.read(count)


def is_array(file: io.BytesIO | Path) -> bool:
    """Whether a file is NumPy's, an array or an archive of them (.npz, a zip)."""
    start = first_bytes(file, 6)
    return start == b"\x93NUMPY" or start[:4] == b"PK\x03\x04"


def with_picture(
    file: io.BytesIO | Path,
    name: str,
    max_pixels: int,
    use: Callable[[Image.Image], Result],
    *,
    load: bool = True,
) -> Result:
    """What ``use`` makes of a picture, decoded where ``load`` is True, else of its header.

    :raises ImageError: as :func:`read_image`.
    """
    tiff = False
    with contextlib.suppress(OSError):  # what cannot be read is named below
        tiff = first_bytes(file, 4) in _TIFF
    try:
        # Decoders of hostile data raise almost anything (struct.error, SyntaxError,
        # ZeroDivisionError ...), hence `except Exception`; each is the file's fault.
        with (
            file if isinstance(file, io.BytesIO) else _File(file) as opened,
            Image.open(opened, formats=FORMATS) as image,
        ):
            if image.width * image.height > max_pixels:
                raise too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
            if load:
                image.load()
            return use(image)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(name, "more pixels than Pillow decodes", max_pixels) from error
    except UnidentifiedImageError as error:
        if tiff:
            raise _other_tiff(name) from error
        raise UnsupportedImageError(
            f"{name} is not a {_FORMATS_TEXT} file, or its header is damaged. Convert it to one "
            "of these formats."
        ) from error
    except Exception as error:
        if tiff:
            raise _other_tiff(name) from error
        raise damaged(name) from error


def _other_tiff(name: str) -> UnsupportedImageError:
    """The refusal of a TIFF file that is damaged, or no picture of eight bits for a screen."""
    return UnsupportedImageError(
        f"{name} is a TIFF file that cannot be decoded as an 8-bit gray or RGB picture: it has "
        "other bands, other number types, or is damaged. Save it as 8-bit RGB, or give it to a "
        "network of its bands."
    )


class _File(io.BufferedReader):
    """A file of which no more is asked than it has.

    Pillow asks for as many bytes as a damaged length says there are, and Python takes memory for
    all of them before it reads the first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def damaged(name: str) -> ImageError:
    """The refusal of a file that a decoder fails at."""
    return ImageError(
        f"{name} cannot be decoded: the file is cut off or damaged. Send the whole file, or save "
        "it again."
    )


def too_large(name: str, found: str, limit: int) -> ImageTooLargeError:
    """The refusal of an image of more pixels than ``limit``."""
    return ImageTooLargeError(
        f"{name} has {found}; at most {limit:,} pixels are accepted. Make it smaller, or raise "
        "the limit."
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Unreadable EXIF says nothing about the pixels; cv2.imread ignores it as well.
        return image


def _to_rgb(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        gray = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"{name} has 32-bit pixels, whose range is not fixed. Convert it to 8 or 16 bits a "
            "channel."
        )
    return np.array(image.convert("RGB"), dtype=np.uint8)
