"""A detector's tensors: a second input, and its graph's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.schemas import InputSize, InstanceLimits

from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.preprocessing import normalise

if TYPE_CHECKING:
    from fdconv_deploy.serve.kserve.inference import InferRequest


def output_metadata(limits: InstanceLimits) -> list[dict[str, Any]]:
    """The outputs as the protocol describes them; -1 is the batch."""
    most, side = limits.most, limits.mask_size
    shapes: dict[str, tuple[str, list[int]]] = {
        "boxes": ("FP32", [-1, most, 4]),
        "scores": ("FP32", [-1, most]),
        "labels": ("INT64", [-1, most]),
        "count": ("INT64", [-1]),
    }
    if limits.masks:
        shapes["masks"] = ("FP32", [-1, most, side, side])
    return [
        {"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in shapes.items()
    ]


def check_sizes(datatype: str, shape: list[int], most: int) -> None:
    """Refuse what is not a height and a width for each image.

    :raises RefusedError: 400.
    """
    if datatype != "FP32" or len(shape) != 2 or shape[1] != 2 or not 1 <= shape[0] <= most:
        raise RefusedError(
            400,
            "The input 'sizes' is FP32 of the shape [N, 2], height and width of each image "
            f"within its input, with N from 1 to {most}; not {datatype[:20]} {shape[:8]}.",
        )


def check_size_values(sizes: npt.NDArray[Any], images: int, size: InputSize) -> None:
    """Refuse sizes that are not those of so many images within an input.

    :raises RefusedError: 400.
    """
    if len(sizes) != images:
        raise RefusedError(
            400, f"Every image has a size: {images} images came with {len(sizes)} sizes."
        )
    most = np.array([size.height, size.width])
    if not ((sizes >= 1) & (sizes <= most) & (sizes % 1 == 0)).all():
        raise RefusedError(
            400,
            "The input 'sizes' holds whole numbers of pixels, heights from 1 to "
            f"{size.height} and widths from 1 to {size.width}.",
        )


def rows_of(session: Session, request: InferRequest) -> npt.NDArray[Any]:
    """A request's images as a detector runs them; what lies past their sizes is zero."""
    images, sizes = request.images, request.sizes
    rows = np.empty(len(images), session.row_type)
    rows["sizes"] = session.input_size if sizes is None else sizes
    if images.dtype != np.uint8:
        rows["images"] = images
        return rows
    detector = session.bundle.manifest.detector
    assert detector is not None
    for image, row in zip(images, rows, strict=True):
        height, width = row["sizes"].astype(int)
        part = image[:height, :width]
        normalise(part, detector.preprocessing, session.input_size, out=row["images"])
    return rows
