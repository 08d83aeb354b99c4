"""Decoding of image files to RGB pixels, as the published pipelines see them, and its limits.

Those decode with ``cv2.imread``, so the conventions here are its conventions: EXIF orientation
applied, gray repeated over three channels, 16 bits cut to the upper eight, CMYK by the plain
formula without its colour profile, and **alpha dropped**, not blended: what lies under transparent
pixels shows. Pillow decodes instead of OpenCV because it tells a picture's size before it decodes
one, and says when a file is cut off. Images of other bands: see :mod:`.multiband`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fdconv_deploy.errors import ImageError

Result = TypeVar("Result")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIX = ".npy"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# The decoding limit: larger images are refused before they are decoded.
MAX_PIXELS = 64_000_000
_FORMATS_TEXT = "JPEG, PNG, WebP, BMP or TIFF"
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF
# Where the pixels of a picture lie in one that is to be looked at, by its EXIF orientation.
_PLACES: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
# Memory per pixel that decoding takes at most, in bytes: what Pillow and the libraries under it
# hold, and the result. Measured over the kinds of each format by benchmarks.serving.big_pictures.
_DECODING = {"PNG": 9, "BMP": 9, "JPEG": 9, "TIFF": 11, "WEBP": 17}
# Pixels that are converted at a time.
_STRIP = 1 << 20


class UnsupportedImageError(ImageError):
    """The data is not an image of an accepted format."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than accepted."""


def read_image(
    source: bytes | str | os.PathLike[str] | ImageFile, *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image file to colours.

    A session's own ``read_image`` does it as its network's images were loaded in training, of
    any number of bands.

    Args:
        source: the file's bytes or its path.
        max_pixels: refuse an image of more pixels; its header is read, nothing decoded.

    Returns:
        (H, W, 3) uint8, RGB, as it is meant to be looked at (EXIF applied). Of an animation or a
        multi-page file, the first picture.

    Raises:
        UnsupportedImageError: not JPEG, PNG, WebP, BMP or TIFF, or of a pixel type without a
            fixed range (32-bit integers, floats).
        ImageTooLargeError: over ``max_pixels``.
        ImageError: no such file, empty, cut off or damaged.
    """
    file = ImageFile.of(source)
    if file.is_array:
        raise UnsupportedImageError(
            f"{file.name} is a NumPy file, which holds bands and not colours. This network takes "
            f"{_FORMATS_TEXT} files; one trained on arrays says so by preprocessing.loading=bands."
        )
    return file.decode(max_pixels, lambda image: _to_rgb(image, file.name))


def image_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header alone.

    Raises:
        ImageError: as `read_image`, as far as a header tells.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        try:
            # Of a TIFF file, Pillow gives the size as it is to be looked at.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        except Exception:  # as in _upright
            turned = False
        return (image.width, image.height) if turned else (image.height, image.width)

    return ImageFile.of(source).decode(MAX_PIXELS, size, load=False)


@dataclass
class ImageFile:
    """An image file that is not empty; the header of one in memory is read once.

    Attributes:
        source: its bytes or its path.
        name: what messages call it.
        start: its first bytes.
    """

    source: bytes | Path
    name: str
    start: bytes
    _header: Image.Image | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, source: bytes | str | os.PathLike[str] | ImageFile) -> ImageFile:
        """Take a file's bytes or path; one that was taken is given back.

        Raises:
            ImageError: no such file, or empty.
        """
        if isinstance(source, ImageFile):
            return source
        if isinstance(source, bytes):
            if not source:
                raise ImageError("The image is empty: 0 bytes were given.")
            return cls(source, "The image", source[:32])
        path, name = Path(source), f"The image {source}"
        try:
            if not path.is_file():
                found = "is not a file" if path.exists() else "does not exist"
                raise ImageError(f"{name} {found}. Give the path of a {_FORMATS_TEXT} file.")
            with path.open("rb") as file:
                start = file.read(32)
        except OSError as error:  # such as a name that is too long
            raise ImageError(f"{name} cannot be opened: {error.strerror}.") from None
        if not start:
            raise ImageError(f"{name} is an empty file.")
        return cls(path, name, start)

    @property
    def is_array(self) -> bool:
        """Whether it is NumPy's, an array or an archive of them (.npz, a zip)."""
        return self.start.startswith((b"\x93NUMPY", b"PK\x03\x04"))

    @property
    def is_tiff(self) -> bool:
        """Whether it begins as TIFF and BigTIFF files do, in either byte order."""
        return self.start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))

    def read(self) -> bytes:
        """All its bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def decode(
        self, max_pixels: int, use: Callable[[Image.Image], Result], *, load: bool = True
    ) -> Result:
        """What ``use`` makes of the picture, decoded where ``load`` is True, else of its header.

        Raises:
            ImageError: as :func:`read_image`.
        """
        try:
            # Decoders of hostile data raise almost anything (struct.error, SyntaxError,
            # ZeroDivisionError ...), hence `except Exception`; each is the file's fault.
            with ExitStack() as stack:
                image, self._header = self._header, None
                image = image or Image.open(self._open(stack), formats=FORMATS)
                if load or isinstance(self.source, Path):
                    stack.enter_context(image)
                else:
                    self._header = image
                if image.width * image.height > max_pixels:
                    raise self.too_large(f"{image.width} x {image.height} pixels", max_pixels)
                if load:
                    image.load()
                return use(image)
        except (ImageError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self.too_large("more pixels than Pillow decodes", max_pixels) from error
        except Exception as error:
            if self.is_tiff:
                raise UnsupportedImageError(
                    f"{self.name} is a TIFF file that cannot be decoded as an 8-bit gray or RGB "
                    "picture: it has other bands, other number types, or is damaged. Save it as "
                    "8-bit RGB, or give it to a network of its bands."
                ) from error
            if isinstance(error, UnidentifiedImageError):
                raise UnsupportedImageError(
                    f"{self.name} is not a {_FORMATS_TEXT} file, or its header is damaged. "
                    "Convert it to one of these formats."
                ) from error
            raise self.damaged() from error

    def cost(self, max_pixels: int) -> tuple[tuple[int, int], int]:
        """(height, width) as the file says, and the bytes of memory that decoding it takes.

        Raises:
            ImageError: as :func:`read_image`, as far as a header tells.
        """

        def cost(image: Image.Image) -> tuple[tuple[int, int], int]:
            each = _DECODING[image.format or "WEBP"]
            if image.info.get("progressive"):  # its coefficients are kept, two bytes each
                each += 2 * len(image.getbands()) - 2
            return (image.height, image.width), each * image.width * image.height

        return self.decode(max_pixels, cost, load=False)

    def damaged(self) -> ImageError:
        """The refusal of a file that a decoder fails at."""
        return ImageError(
            f"{self.name} cannot be decoded: the file is cut off or damaged. Send the whole file, "
            "or save it again."
        )

    def too_large(self, found: str, limit: int) -> ImageTooLargeError:
        """The refusal of an image of more pixels than ``limit``."""
        return ImageTooLargeError(
            f"{self.name} has {found}; at most {limit:,} pixels are accepted. Make it smaller, or "
            "raise the limit."
        )

    def _open(self, stack: ExitStack) -> io.BytesIO | _BoundedReader:
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        return stack.enter_context(_BoundedReader(self.source))


class _BoundedReader(io.BufferedReader):
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


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Unreadable EXIF says nothing about the pixels; cv2.imread ignores it as well.
        return 1


def _to_rgb(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"{name} has 32-bit pixels, whose range is not fixed. Convert it to 8 or 16 bits a "
            "channel."
        )
    # In strips, straight to where they belong: of a large picture, each whole copy more would be
    # as large as itself.
    turned = _orientation(image)
    size = (image.width, image.height) if turned in _ON_ITS_SIDE else (image.height, image.width)
    upright = np.empty((*size, 3), np.uint8)
    pixels = _PLACES[turned](upright) if turned in _PLACES else upright
    step = max(_STRIP // image.width, 1)
    for top in range(0, image.height, step):
        strip = image.crop((0, top, image.width, min(top + step, image.height)))
        if image.mode.startswith("I;16"):
            found = (np.asarray(strip).astype(np.uint16) >> 8)[:, :, None]
        else:
            found = np.asarray(strip.convert("RGB"))
        pixels[top : top + step] = found
    return upright
