"""Decoding of image files as a network's images were loaded in training, and its limits.

Photographs are decoded to RGB pixels as the published pipelines see them. Those decode with
``cv2.imread``, so the conventions here are its conventions: EXIF orientation applied, gray repeated
over three channels, 16 bits cut to the upper eight, CMYK by the plain formula without its colour
profile, and **alpha dropped**, not blended: what lies under transparent pixels shows. Pillow
decodes instead of OpenCV because it tells a picture's size before it decodes one, and says when a
file is cut off.

Of images of other bands, ``Preprocessing.loading`` says how they were loaded. TIFF files are read
by tifffile, as by mmcv's ``imdecode_backend="tifffile"``: of the libraries at hand it alone takes
any number of bands and type in either layout. (OpenCV 5.0 gives one band of eight bits for two of
sixteen, and nothing at all for five.) What GDAL, and so mmsegmentation 1.2.2's
``LoadSingleRSImageFromFile``, takes for bands are the samples of a file's first page, and so they
are here; a file whose bands are pages, which GDAL gives one by one, is read too.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.environment import install
from fdconv_deploy.errors import FDConvError, ImageError

Result = TypeVar("Result")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARRAY_SUFFIX = ".npy"
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Every format there is a reader for.
FORMATS = (*PICTURE_FORMATS, "NPY")
# The decoding limit: larger images are refused before they are decoded.
MAX_PIXELS = 64_000_000
_FORMATS_TEXT = "JPEG, PNG, WebP, BMP or TIFF"
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF
# Memory per pixel that decoding takes at most, in bytes: what Pillow and the libraries under it
# hold, and the result. Measured over the kinds of each format by benchmarks.serving.big_pictures.
# MPO is JPEG with further pictures behind the first, as phones write them.
_DECODING = {"PNG": 9, "BMP": 9, "JPEG": 9, "MPO": 9, "TIFF": 11, "WEBP": 17}
# Pixels that are converted at a time.
_STRIP = 1 << 20
_FLAGS = {"grayscale": cv2.IMREAD_GRAYSCALE, "unchanged": cv2.IMREAD_UNCHANGED}
# A file of more pages is not searched for its bands: walking through them takes time.
_MOST_PAGES = 20_000


class UnsupportedImageError(ImageError):
    """The data is not an image of an accepted format."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than accepted."""


def read_image(
    source: bytes | str | os.PathLike[str] | ImageFile, *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image file to colours; a session's ``read_image`` does it as :func:`load_image`.

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


def load_image(
    source: bytes | str | os.PathLike[str] | ImageFile,
    preprocessing: Preprocessing,
    *,
    max_pixels: int = MAX_PIXELS,
) -> npt.NDArray[Any]:
    """Decode an image file for a network, by its ``Preprocessing.loading``.

    - ``color``: see :func:`read_image`.
    - ``grayscale``, ``unchanged``: what ``cv2.imread`` makes of the file, as in mmcv 2.1.0's
      ``LoadImageFromFile``, but that three bands are red, green and blue here.
    - ``bands``: a NumPy file's array, (H, W, C) or for one band (H, W); a TIFF file's bands; of
      a picture its channels in their order. EXIF orientation, which belongs to photographs, is
      left alone, as GDAL does.

    A NumPy file is taken in either of the last two. Nothing pickled is ever loaded.

    Args:
        source: the file's bytes or its path.
        preprocessing: the network's.
        max_pixels: refuse an image of more pixels, before it is decoded. Bands beyond three count
            as so many more pixels.

    Returns:
        (H, W, C) of the file's own type.

    Raises as :func:`read_image`; ``ImageError`` also for other bands than the network's, and
    ``FDConvError`` where a package that reads TIFF files is not installed.
    """
    if preprocessing.loading == "color":
        return read_image(source, max_pixels=max_pixels)
    file, bands = ImageFile.of(source), preprocessing.channels
    if file.is_array:
        image = _array(file, max_pixels)
    elif preprocessing.loading in _FLAGS:
        loading = preprocessing.loading
        image = file.decode(max_pixels, lambda _: _by_opencv(file, loading))
    elif file.is_tiff:
        image = _open_tiff(file, max_pixels, lambda at: _tiff_bands(at, file, max_pixels, bands))
    else:
        image = file.decode(max_pixels, lambda picture: _channels(picture, file))
    image = image.astype(np.uint8) if image.dtype == bool else image
    image = image[:, :, None] if image.ndim == 2 else image
    if bands == 1 and image.shape[2] == 3 and (image == image[:, :, :1]).all():
        image = image[:, :, :1]  # gray, stored as colours
    if image.shape[2] != bands:
        raise _wrong_bands(file, image.shape, bands)
    return image


def image_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header alone."""

    def size(image: Image.Image) -> tuple[int, int]:
        # Of a TIFF file, Pillow gives the size as it is to be looked at.
        turned = image.format != "TIFF" and _orientation(image) in _ON_ITS_SIDE
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
        """Take a file's bytes or path, or one taken before; ``ImageError`` if missing or empty."""
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
        """What ``use`` makes of the picture, decoded where ``load`` is True, else of its header."""
        try:
            # Decoders of hostile data raise almost anything (struct.error, SyntaxError,
            # ZeroDivisionError ...), hence `except Exception`; each is the file's fault.
            with ExitStack() as stack:
                image, self._header = self._header, None
                if isinstance(self.source, Path):
                    file: Any = stack.enter_context(_BoundedReader(self.source))
                else:
                    file = io.BytesIO(self.source)
                image = image or Image.open(file, formats=PICTURE_FORMATS)
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

    def check_size(self, shape: Sequence[int], max_pixels: int) -> None:
        """Refuse an image (H, W, bands) of too many pixels; bands beyond three count as more."""
        bands = shape[2] if len(shape) == 3 else 1
        if shape[0] * shape[1] * max(bands, 3) > 3 * max_pixels:
            raise self.too_large(f"{shape[1]} x {shape[0]} pixels of {bands} bands", max_pixels)


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


class ImageCost(NamedTuple):
    """What an image takes, as its header says, in bytes."""

    size: tuple[int, int]  # height and width as stored
    decoding: int  # memory while it is decoded, its pixels among them
    pixels: int  # its decoded pixels, and as what the network is given them


def image_cost(
    file: ImageFile, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> ImageCost:
    """The memory that :func:`load_image` will take, from the header alone; raises what it does."""
    loading, bands = preprocessing.loading, preprocessing.channels

    def picture(image: Image.Image) -> ImageCost:
        each = _DECODING[image.format or "WEBP"]
        if image.info.get("progressive"):  # its coefficients are kept, two bytes each
            each += 2 * len(image.getbands()) - 2
        # By OpenCV it is decoded again, into four channels of 16 bits at most.
        pixels = 3 if loading == "color" else 4 * 4
        each += 0 if loading == "color" else pixels
        count = image.height * image.width
        return ImageCost((image.height, image.width), each * count, pixels * count)

    if file.is_array:
        shape, kind, _, _ = _array_header(file, max_pixels)
        itemsize = kind.itemsize
    elif file.is_tiff and loading == "bands":
        shape, itemsize = _open_tiff(file, max_pixels, lambda at: _tiff_shape(at, bands))
    else:
        return file.decode(max_pixels, picture, load=False)
    values = math.prod(shape)
    # The file's own, as the array, and what OpenCV resizes, float32 at the widest.
    return ImageCost((shape[0], shape[1]), values * itemsize * 3, values * max(itemsize, 4))


def check_format(data: bytes, formats: Sequence[str]) -> None:
    """Refuse (``UnsupportedImageError``) a file that is of none of these of ``FORMATS``."""
    file = ImageFile.of(data)
    accepted = ("NPY" if file.is_array else "TIFF") in formats
    if not (file.is_array or file.is_tiff):
        try:
            pictures = [name for name in formats if name in PICTURE_FORMATS]
            with Image.open(io.BytesIO(data), formats=pictures):
                accepted = True
        except Exception:  # decoders of hostile data raise almost anything
            accepted = False
    if not accepted:
        raise UnsupportedImageError(
            f"The image is not of a format accepted here ({', '.join(formats)}). Convert it to one."
        )


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
    # The picture as its file has it: with rows for columns, from the bottom, from the right.
    pixels = upright.swapaxes(0, 1) if turned in _ON_ITS_SIDE else upright
    pixels = pixels[::-1] if turned in (3, 4, 6, 7) else pixels
    pixels = pixels[:, ::-1] if turned in (2, 3, 7, 8) else pixels
    step = max(_STRIP // image.width, 1)
    for top in range(0, image.height, step):
        strip = image.crop((0, top, image.width, min(top + step, image.height)))
        if image.mode.startswith("I;16"):
            found = (np.asarray(strip).astype(np.uint16) >> 8)[:, :, None]
        else:
            found = np.asarray(strip.convert("RGB"))
        pixels[top : top + step] = found
    return upright


def _wrong_bands(file: ImageFile, shape: Sequence[int], bands: int) -> ImageError:
    found = "x".join(map(str, shape[:2]))
    if len(shape) == 3 and shape[0] == bands:
        hint = " Its first axis is as long as that: save it with the bands last (H, W, C)."
    else:
        hint = " Give a file of the bands the network was trained on, in their order."
    return ImageError(
        f"{file.name} has {shape[2]} band{'s' * (shape[2] != 1)} ({found} pixels), and the network "
        f"takes {bands}.{hint}"
    )


def _array(file: ImageFile, max_pixels: int) -> npt.NDArray[Any]:
    """A .npy file's array, (H, W) or (H, W, C)."""
    shape, kind, data, rest = _array_header(file, max_pixels)
    if rest < math.prod(shape) * kind.itemsize:
        raise file.damaged()
    data.seek(0)
    array: npt.NDArray[Any] = np.load(data, allow_pickle=False)
    return array


def _array_header(
    file: ImageFile, max_pixels: int
) -> tuple[Sequence[int], np.dtype[Any], io.BytesIO, int]:
    """Shape and type of a .npy file's array, the file, and how many bytes of it are numbers."""
    data = io.BytesIO(file.read())
    try:
        version = np.lib.format.read_magic(data)
        header = np.lib.format.read_array_header_1_0
        header = header if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(data)
        rest = len(data.getbuffer()) - data.tell()
    except Exception as error:
        raise UnsupportedImageError(
            f"{file.name} is not a .npy file of one array. Save it by numpy.save; of an .npz "
            "archive, save the image's array alone."
        ) from error
    if kind.kind not in "uif" or len(shape) not in (2, 3) or not math.prod(shape):
        raise UnsupportedImageError(
            f"{file.name} holds an array {shape} {kind}. Expected (H, W, C) real numbers, or (H, "
            "W) of one band."
        )
    file.check_size(shape, max_pixels)
    return shape, kind, data, rest


def _by_opencv(file: ImageFile, loading: str) -> npt.NDArray[Any]:
    """A picture as OpenCV loads it; Pillow has checked its size, and that the file is whole."""
    found = cv2.imdecode(np.frombuffer(file.read(), np.uint8), _FLAGS[loading])
    if found is None:
        raise ImageError(
            f"OpenCV, which loads images for preprocessing.loading={loading}, cannot decode "
            f"{file.name[0].lower()}{file.name[1:]}. Give a PNG or JPEG file."
        )
    return found[:, :, ::-1] if found.ndim == 3 and found.shape[2] == 3 else found


def _channels(image: Image.Image, file: ImageFile) -> npt.NDArray[Any]:
    """A picture's channels as its file has them."""
    if image.format == "PNG" and file.start[24] == 16 and image.mode in ("RGB", "RGBA"):
        # Pillow cuts them to eight bits.
        deep = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        assert deep is not None  # Pillow has decoded it
        return np.concatenate([deep[:, :, 2::-1], deep[:, :, 3:]], axis=2)
    return np.asarray(image)


def _tiff_shape(opened: Any, bands: int) -> tuple[Sequence[int], int]:
    """(H, W, bands) of a TIFF file's first page, or of all where they are bands; bytes of each."""
    page = opened.pages[0]
    count = page.samplesperpixel * (len(opened.pages) if _bands_are_pages(opened, bands) else 1)
    return (page.imagelength, page.imagewidth, count), page.dtype.itemsize if page.dtype else 1


def _bands_are_pages(opened: Any, bands: int) -> bool:
    """Whether a TIFF file's first page lacks bands that its other pages may be."""

    def has_page(number: int) -> bool:
        try:
            return opened.pages[number] is not None
        except IndexError:
            return False

    other = opened.pages[0].samplesperpixel != bands
    return other and has_page(1) and not has_page(_MOST_PAGES)


def _open_tiff(file: ImageFile, max_pixels: int, use: Callable[[Any], Result]) -> Result:
    packages = install("tifffile", "imagecodecs")
    try:
        import tifffile
    except ImportError as error:
        raise FDConvError(f"Reading a TIFF file of bands needs tifffile: {packages}") from error
    try:
        # The bytes, not the path: OME-TIFF files may name others beside them.
        with tifffile.TiffFile(io.BytesIO(file.read())) as opened:
            _check_page(file, opened.pages[0], max_pixels, 1)
            return use(opened)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        if "imagecodecs" in str(error) and find_spec("imagecodecs") is None:
            # No fault of the file: tifffile itself decodes few compressions.
            raise FDConvError(
                f"{file.name} is compressed, and decoding it needs imagecodecs: {packages}"
            ) from error
        raise file.damaged() from error


def _tiff_bands(opened: Any, file: ImageFile, max_pixels: int, bands: int) -> npt.NDArray[Any]:
    """(H, W, C) of the first page's samples, or of the pages where they are the bands."""
    page = opened.pages[0]
    if page.dtype is None or page.dtype.kind not in "uifb" or page.imagedepth != 1:
        raise UnsupportedImageError(
            f"{file.name} holds {page.dtype or 'pixels of an unknown type'}. Expected bands of "
            "real numbers."
        )
    if not _bands_are_pages(opened, bands):
        found = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            found = np.moveaxis(found, 0, -1)
        return found.reshape(*found.shape[:2], -1)
    series = opened.series[0]
    if len(series.shape) != 3 or bands not in (series.shape[0], series.shape[2]):
        raise _wrong_bands(file, (page.imagelength, page.imagewidth, page.samplesperpixel), bands)
    file.check_size(series.shape, max_pixels)
    for keyframe in {each.keyframe for each in series.pages if each is not None}:
        _check_page(file, keyframe, max_pixels, len(series.pages))
    found = series.asarray(maxworkers=1)
    return found if series.shape[2] == bands else np.moveaxis(found, 0, -1)


def _check_page(file: ImageFile, page: Any, max_pixels: int, pages: int) -> None:
    """Refuse a page that would be too large, or be decoded in pieces larger than itself."""
    shape = (page.imagelength, page.imagewidth, page.imagedepth * page.samplesperpixel)
    if not math.prod(shape):
        raise file.damaged()
    file.check_size(shape, max_pixels)
    # Tiles at the border may be larger than the image: two times each way, of a small one.
    piece = math.prod(page.chunks)
    if piece > max(4 * math.prod(shape), 1 << 22) or piece * pages > 1 << 34:
        raise file.damaged()
