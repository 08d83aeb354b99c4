"""Image files of any number of bands to arrays, as a network's images were loaded in training.

Which way that was says ``Preprocessing.loading``; photographs' way is :mod:`.decoding`. TIFF files
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
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.environment import install
from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime.images import FORMATS as PICTURE_FORMATS
from fdconv_deploy.runtime.images import (
    MAX_PIXELS,
    UnsupportedImageError,
    checked_source,
    damaged,
    first_bytes,
    is_array,
    read_image,
    too_large,
    with_picture,
)

# Every format there is a reader for.
FORMATS = (*PICTURE_FORMATS, "NPY")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_INSTALL = install("tifffile", "imagecodecs")
_FLAGS = {"grayscale": cv2.IMREAD_GRAYSCALE, "unchanged": cv2.IMREAD_UNCHANGED}
# A file of more pages is not searched for its bands: walking through them takes time.
_MOST_PAGES = 20_000


def load_image(
    source: bytes | str | os.PathLike[str],
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

    :param max_pixels: refuse an image of more pixels, before it is decoded. Bands beyond three
        count as so many more pixels.
    :returns: (H, W, C) of the file's own type.
    :raises UnsupportedImageError: of another format.
    :raises ImageTooLargeError: over ``max_pixels``.
    :raises ImageError: no such file, empty, cut off, damaged, or of other bands than the
        network's.
    :raises FDConvError: a package that reads TIFF files is not installed.
    """
    if preprocessing.loading == "color":
        return read_image(source, max_pixels=max_pixels)
    file, name = checked_source(source)
    bands = preprocessing.channels
    if is_array(file):
        image = _array(file, name, max_pixels)
    elif preprocessing.loading in _FLAGS:
        image = _by_opencv(file, name, max_pixels, preprocessing)
    elif first_bytes(file, 4) in _TIFF_STARTS:
        image = _tiff(file, name, max_pixels, bands)
    else:
        image = with_picture(file, name, max_pixels, lambda found: _channels(found, file))
    image = image[:, :, None] if image.ndim == 2 else image
    if bands == 1 and image.shape[2] == 3 and (image == image[:, :, :1]).all():
        image = image[:, :, :1]  # gray, stored as colours
    if image.shape[2] != bands:
        raise wrong_bands(name, image.shape, bands)
    return image


def check_format(data: bytes, formats: Sequence[str]) -> None:
    """Refuse an image file that is of none of ``formats``, which are some of ``FORMATS``.

    :raises UnsupportedImageError: it is of another.
    """
    file = io.BytesIO(data)
    known = "NPY" if is_array(file) else "TIFF" if data[:4] in _TIFF_STARTS else None
    accepted = known in formats
    if known is None:
        try:
            with Image.open(file, formats=[f for f in formats if f in PICTURE_FORMATS]):
                accepted = True
        except Exception:  # decoders of hostile data raise almost anything
            accepted = False
    if not accepted:
        raise UnsupportedImageError(
            f"The image is not of a format accepted here ({', '.join(formats)}). Convert it to one."
        )


def wrong_bands(name: str, shape: Sequence[int], bands: int) -> ImageError:
    """The refusal of a file of other bands than the network's."""
    found = "x".join(map(str, shape[:2]))
    if len(shape) == 3 and shape[0] == bands:
        hint = " Its first axis is as long as that: save it with the bands last (H, W, C)."
    else:
        hint = " Give a file of the bands the network was trained on, in their order."
    return ImageError(
        f"{name} has {shape[2]} band{'s' * (shape[2] != 1)} ({found} pixels), and the network "
        f"takes {bands}.{hint}"
    )


def _array(file: io.BytesIO | Path, name: str, max_pixels: int) -> npt.NDArray[Any]:
    """A .npy file's array, (H, W) or (H, W, C)."""
    data = io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file
    try:
        version = np.lib.format.read_magic(data)
        header = np.lib.format.read_array_header_1_0
        shape, _, kind = (header if version == (1, 0) else np.lib.format.read_array_header_2_0)(
            data
        )
        rest = len(data.getbuffer()) - data.tell()
    except Exception as error:
        raise UnsupportedImageError(
            f"{name} is not a .npy file of one array. Save it by numpy.save; of an .npz archive, "
            "save the image's array alone."
        ) from error
    if kind.kind not in "uif" or len(shape) not in (2, 3) or not math.prod(shape):
        raise UnsupportedImageError(
            f"{name} holds an array {shape} {kind}. Expected (H, W, C) real numbers, or (H, W) of "
            "one band."
        )
    _check_values(name, shape, max_pixels)
    if rest < math.prod(shape) * kind.itemsize:
        raise damaged(name)
    data.seek(0)
    array: npt.NDArray[Any] = np.load(data, allow_pickle=False)
    return array


def _by_opencv(
    file: io.BytesIO | Path, name: str, max_pixels: int, preprocessing: Preprocessing
) -> npt.NDArray[Any]:
    def decode(_: Image.Image) -> npt.NDArray[Any]:
        # Pillow has told the size by now, and that the file is whole.
        found = cv2.imdecode(_data(file), _FLAGS[preprocessing.loading])
        if found is None:
            raise ImageError(
                f"OpenCV, which loads images for preprocessing.loading={preprocessing.loading}, "
                f"cannot decode {name[0].lower()}{name[1:]}. Give a PNG or JPEG file."
            )
        return found[:, :, ::-1] if found.ndim == 3 and found.shape[2] == 3 else found

    return with_picture(file, name, max_pixels, decode)


def _channels(image: Image.Image, file: io.BytesIO | Path) -> npt.NDArray[Any]:
    """A picture's channels as its file has them."""
    start = first_bytes(file, 25)
    if image.format == "PNG" and start[24] == 16 and image.mode in ("RGB", "RGBA"):
        deep = cv2.imdecode(_data(file), cv2.IMREAD_UNCHANGED)  # Pillow cuts them to eight bits
        assert deep is not None  # Pillow has decoded it
        return np.concatenate([deep[:, :, 2::-1], deep[:, :, 3:]], axis=2)
    pixels = np.asarray(image)
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _tiff(file: io.BytesIO | Path, name: str, max_pixels: int, bands: int) -> npt.NDArray[Any]:
    try:
        import tifffile
    except ImportError as error:
        raise FDConvError(f"Reading a TIFF file of bands needs tifffile: {_INSTALL}") from error
    try:
        # The bytes, not the path: OME-TIFF files may name others beside them.
        with tifffile.TiffFile(io.BytesIO(_data(file).tobytes())) as opened:
            return _tiff_bands(opened, name, max_pixels, bands)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        if "imagecodecs" in str(error) and find_spec("imagecodecs") is None:
            # No fault of the file: tifffile itself decodes few compressions.
            raise FDConvError(
                f"{name} is compressed, and decoding it needs imagecodecs: {_INSTALL}"
            ) from error
        raise damaged(name) from error


def _tiff_bands(opened: Any, name: str, max_pixels: int, bands: int) -> npt.NDArray[Any]:
    """(H, W, C) of the first page's samples, or of the pages where they are the bands."""
    page = opened.pages[0]
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    _check_page(page, name, max_pixels, 1)
    if page.dtype is None or page.dtype.kind not in "uifb" or page.imagedepth != 1:
        raise UnsupportedImageError(
            f"{name} holds {page.dtype or 'pixels of an unknown type'}. Expected bands of real "
            "numbers."
        )
    if shape[2] == bands or not _more_pages(opened):
        found = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and shape[2] > 1:
            found = np.moveaxis(found, 0, -1)
        return _whole_numbers(found.reshape(*found.shape[:2], -1))
    series = opened.series[0]
    if len(series.shape) != 3 or bands not in (series.shape[0], series.shape[2]):
        raise wrong_bands(name, shape, bands)
    _check_values(name, series.shape, max_pixels)
    for keyframe in {each.keyframe for each in series.pages if each is not None}:
        _check_page(keyframe, name, max_pixels, len(series.pages))
    found = series.asarray(maxworkers=1)
    return _whole_numbers(found if series.shape[2] == bands else np.moveaxis(found, 0, -1))


def _more_pages(opened: Any) -> bool:
    """Whether there are further pages, few enough to be looked through."""
    try:
        _ = opened.pages[1]
    except IndexError:
        return False
    try:
        _ = opened.pages[_MOST_PAGES]
    except IndexError:
        return True
    return False


def _check_page(page: Any, name: str, max_pixels: int, pages: int) -> None:
    """Refuse a page that would be too large, or be decoded in pieces larger than itself."""
    shape = (page.imagelength, page.imagewidth, page.imagedepth * page.samplesperpixel)
    if not math.prod(shape):
        raise damaged(name)
    _check_values(name, shape, max_pixels)
    # Tiles at the border may be larger than the image: two times each way, of a small one.
    piece = math.prod(page.chunks)
    if piece > max(4 * math.prod(shape), 1 << 22) or piece * pages > 1 << 34:
        raise damaged(name)


def _check_values(name: str, shape: Sequence[int], max_pixels: int) -> None:
    bands = shape[2] if len(shape) == 3 else 1
    pixels = shape[0] * shape[1]
    if pixels * max(bands, 3) > 3 * max_pixels:
        raise too_large(name, f"{shape[1]} x {shape[0]} pixels of {bands} bands", max_pixels)


def _whole_numbers(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return image.astype(np.uint8) if image.dtype == bool else image


def _data(file: io.BytesIO | Path) -> npt.NDArray[np.uint8]:
    """A file's bytes, uint8."""
    raw = file.read_bytes() if isinstance(file, Path) else file.getbuffer()
    return np.frombuffer(raw, np.uint8)
