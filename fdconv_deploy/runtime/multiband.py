"""Decoding of image files of any number of bands, as a network's images were loaded in training.

``Preprocessing.loading`` says which way that was; photographs' way is :mod:`.images`. TIFF files
are read by tifffile, as by mmcv's ``imdecode_backend="tifffile"``: of the libraries at hand it
alone takes any number of bands and type in either layout. (OpenCV 5.0 gives one band of eight bits
for two of sixteen, and nothing at all for five.) What GDAL, and so mmsegmentation 1.2.2's
``LoadSingleRSImageFromFile``, takes for bands are the samples of a file's first page, and so they
are here; a file whose bands are pages, which GDAL gives one by one, is read too.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.environment import install
from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime.images import FORMATS as PICTURE_FORMATS
from fdconv_deploy.runtime.images import MAX_PIXELS, ImageFile, UnsupportedImageError, read_image

Result = TypeVar("Result")
# Every format there is a reader for.
FORMATS = (*PICTURE_FORMATS, "NPY")
_FLAGS = {"grayscale": cv2.IMREAD_GRAYSCALE, "unchanged": cv2.IMREAD_UNCHANGED}
# A file of more pages is not searched for its bands: walking through them takes time.
_MOST_PAGES = 20_000


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

    Raises:
        UnsupportedImageError: of another format.
        ImageTooLargeError: over ``max_pixels``.
        ImageError: no such file, empty, cut off, damaged, or of other bands than the network's.
        FDConvError: a package that reads TIFF files is not installed.
    """
    if preprocessing.loading == "color":
        return read_image(source, max_pixels=max_pixels)
    file, bands = ImageFile.of(source), preprocessing.channels
    if file.is_array:
        image = _array(file, max_pixels)
    elif preprocessing.loading in _FLAGS:
        image = _by_opencv(file, max_pixels, preprocessing.loading)
    elif file.is_tiff:
        image = _tiff(file, max_pixels, bands)
    else:
        image = file.decode(max_pixels, lambda picture: _channels(picture, file))
    image = image[:, :, None] if image.ndim == 2 else image
    if bands == 1 and image.shape[2] == 3 and (image == image[:, :, :1]).all():
        image = image[:, :, :1]  # gray, stored as colours
    if image.shape[2] != bands:
        raise _wrong_bands(file, image.shape, bands)
    return image


@dataclass(frozen=True)
class ImageCost:
    """What an image takes, as its header says.

    Attributes:
        size: (height, width) as stored.
        decoding: bytes of memory while it is decoded, its pixels among them.
        pixels: bytes of its decoded pixels, and as what the network is given them.
    """

    size: tuple[int, int]
    decoding: int
    pixels: int


def image_cost(
    file: ImageFile, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> ImageCost:
    """The memory that :func:`load_image` will take, from the header alone.

    Raises:
        ImageError, FDConvError: as :func:`load_image`, as far as a header tells.
    """
    bands = preprocessing.channels
    if preprocessing.loading == "color" and not file.is_array:
        size, decoding = file.cost(max_pixels)
        return ImageCost(size, decoding, math.prod(size) * 3)
    if file.is_array:
        shape, kind, _, _ = _array_header(file, max_pixels)
        itemsize = kind.itemsize
    elif file.is_tiff and preprocessing.loading not in _FLAGS:
        shape, itemsize = _open_tiff(
            file, lambda opened: _tiff_shape(opened, file, max_pixels, bands)
        )
    else:
        size, decoding = file.cost(max_pixels)
        # By Pillow, whose pixels are still there, and by OpenCV: four channels of 16 bits.
        pixels = math.prod(size) * 4 * 4
        return ImageCost(size, decoding + pixels, pixels)
    values = math.prod(shape)
    # The file's own, as the array, and what OpenCV resizes, float32 at the widest.
    return ImageCost((shape[0], shape[1]), values * itemsize * 3, values * max(itemsize, 4))


def check_format(data: bytes, formats: Sequence[str]) -> None:
    """Refuse an image file that is of none of ``formats``, which are some of ``FORMATS``.

    Raises:
        UnsupportedImageError: it is of another.
        ImageError: it is empty.
    """
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
    _check_size(file, shape, max_pixels)
    return shape, kind, data, rest


def _by_opencv(file: ImageFile, max_pixels: int, loading: str) -> npt.NDArray[Any]:
    def decode(_: Image.Image) -> npt.NDArray[Any]:
        # By now Pillow has checked the size, and that the file is whole.
        found = cv2.imdecode(np.frombuffer(file.read(), np.uint8), _FLAGS[loading])
        if found is None:
            raise ImageError(
                f"OpenCV, which loads images for preprocessing.loading={loading}, cannot decode "
                f"{file.name[0].lower()}{file.name[1:]}. Give a PNG or JPEG file."
            )
        return found[:, :, ::-1] if found.ndim == 3 and found.shape[2] == 3 else found

    return file.decode(max_pixels, decode)


def _channels(image: Image.Image, file: ImageFile) -> npt.NDArray[Any]:
    """A picture's channels as its file has them."""
    if image.format == "PNG" and file.start[24] == 16 and image.mode in ("RGB", "RGBA"):
        # Pillow cuts them to eight bits.
        deep = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        assert deep is not None  # Pillow has decoded it
        return np.concatenate([deep[:, :, 2::-1], deep[:, :, 3:]], axis=2)
    return _no_bools(np.asarray(image))


def _tiff(file: ImageFile, max_pixels: int, bands: int) -> npt.NDArray[Any]:
    return _no_bools(_open_tiff(file, lambda opened: _tiff_bands(opened, file, max_pixels, bands)))


def _tiff_shape(
    opened: Any, file: ImageFile, max_pixels: int, bands: int
) -> tuple[Sequence[int], int]:
    """(H, W, bands) of a TIFF file's first page, or of all where they are bands; bytes of each."""
    page = opened.pages[0]
    _check_page(file, page, max_pixels, 1)
    shape = [page.imagelength, page.imagewidth, page.samplesperpixel]
    if shape[2] != bands and _has_page(opened, 1) and not _has_page(opened, _MOST_PAGES):
        shape[2] *= len(opened.pages)
    return shape, page.dtype.itemsize if page.dtype else 1


def _open_tiff(file: ImageFile, use: Callable[[Any], Result]) -> Result:
    packages = install("tifffile", "imagecodecs")
    try:
        import tifffile
    except ImportError as error:
        raise FDConvError(f"Reading a TIFF file of bands needs tifffile: {packages}") from error
    try:
        # The bytes, not the path: OME-TIFF files may name others beside them.
        with tifffile.TiffFile(io.BytesIO(file.read())) as opened:
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
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    _check_page(file, page, max_pixels, 1)
    if page.dtype is None or page.dtype.kind not in "uifb" or page.imagedepth != 1:
        raise UnsupportedImageError(
            f"{file.name} holds {page.dtype or 'pixels of an unknown type'}. Expected bands of "
            "real numbers."
        )
    if shape[2] == bands or not _has_page(opened, 1) or _has_page(opened, _MOST_PAGES):
        found = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and shape[2] > 1:
            found = np.moveaxis(found, 0, -1)
        return found.reshape(*found.shape[:2], -1)
    series = opened.series[0]
    if len(series.shape) != 3 or bands not in (series.shape[0], series.shape[2]):
        raise _wrong_bands(file, shape, bands)
    _check_size(file, series.shape, max_pixels)
    for keyframe in {each.keyframe for each in series.pages if each is not None}:
        _check_page(file, keyframe, max_pixels, len(series.pages))
    found = series.asarray(maxworkers=1)
    return found if series.shape[2] == bands else np.moveaxis(found, 0, -1)


def _has_page(opened: Any, number: int) -> bool:
    try:
        _ = opened.pages[number]
    except IndexError:
        return False
    return True


def _check_page(file: ImageFile, page: Any, max_pixels: int, pages: int) -> None:
    """Refuse a page that would be too large, or be decoded in pieces larger than itself."""
    shape = (page.imagelength, page.imagewidth, page.imagedepth * page.samplesperpixel)
    if not math.prod(shape):
        raise file.damaged()
    _check_size(file, shape, max_pixels)
    # Tiles at the border may be larger than the image: two times each way, of a small one.
    piece = math.prod(page.chunks)
    if piece > max(4 * math.prod(shape), 1 << 22) or piece * pages > 1 << 34:
        raise file.damaged()


def _check_size(file: ImageFile, shape: Sequence[int], max_pixels: int) -> None:
    bands = shape[2] if len(shape) == 3 else 1
    if shape[0] * shape[1] * max(bands, 3) > 3 * max_pixels:
        raise file.too_large(f"{shape[1]} x {shape[0]} pixels of {bands} bands", max_pixels)


def _no_bools(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return image.astype(np.uint8) if image.dtype == bool else image
