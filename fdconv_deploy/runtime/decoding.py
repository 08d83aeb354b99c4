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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fdconv_deploy.errors import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
_FORMATS_TEXT = "JPEG, PNG, WebP, BMP or TIFF"
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF


class UnsupportedImageError(ImageError):
    """The data is not an image of an accepted format."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than accepted."""


def read_image(
    source: bytes | str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image file, given as its bytes or its path.

    :param max_pixels: refuse an image of more pixels; its header is read, nothing decoded.
    :returns: (H, W, 3) uint8, RGB, as it is meant to be looked at (EXIF applied). Of an
        animation or a multi-page file, the first picture.
    :raises UnsupportedImageError: not JPEG, PNG, WebP, BMP or TIFF, or of a pixel type
        without a fixed range (32-bit integers, floats).
    :raises ImageTooLargeError: over ``max_pixels``.
    :raises ImageError: no such file, empty, cut off or damaged.
    """
    with _opened(source, max_pixels) as (image, name):
        image.load()
        return _to_rgb(_upright(image), name)


def image_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header alone.

    :raises ImageError: as `read_image` raises it, of what a header tells.
    """
    with _opened(source, MAX_PIXELS) as (image, _):
        try:
            turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        except Exception:  # as in _upright
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def _opened(
    source: bytes | str | os.PathLike[str], max_pixels: int
) -> Iterator[tuple[Image.Image, str]]:
    """An image whose header is read, and its name; what Pillow raises in there as our errors."""
    if isinstance(source, bytes):
        name = "The image"
        if not source:
            raise ImageError("The image is empty: 0 bytes were given.")
        file: io.BytesIO | Path = io.BytesIO(source)
    else:
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
    try:
        # Decoders of hostile data raise almost anything (struct.error, SyntaxError,
        # ZeroDivisionError ...), hence `except Exception`; each is the file's fault.
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
            yield image, name
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "more pixels than Pillow decodes", max_pixels) from error
    except UnidentifiedImageError as error:
        raise UnsupportedImageError(
            f"{name} is not a {_FORMATS_TEXT} file, or its header is damaged. Convert it to one "
            "of these formats."
        ) from error
    except Exception as error:
        raise ImageError(
            f"{name} cannot be decoded: the file is cut off or damaged. Send the whole file, or "
            "save it again."
        ) from error


def _too_large(name: str, found: str, limit: int) -> ImageTooLargeError:
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
