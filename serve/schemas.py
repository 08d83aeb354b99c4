"""The JSON of a segment request's answer. These models are also its OpenAPI description."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.serve.model_cards import ModelClass


class ClassArea(ModelClass):
    """One class of a segmentor, and how much of the image it covers."""

    area: int = Field(description="Pixels of this class in the image.")
    share: float = Field(description="`area` over the image's pixels, 0–1.")


class ClassCount(ModelClass):
    """One class of a detector, and how many of its objects the answer holds."""

    count: int


class RunLengthMask(BaseModel):
    """A label map as runs of equal pixels, read row by row from the top left.

    COCO's uncompressed RLE for many classes at once: run i is `counts[i]` pixels long and
    all of class `values[i]`. Unlike COCO's it runs along rows, not down columns. In numpy:
    `numpy.repeat(values, counts).reshape(size)`.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"size": [2, 4], "counts": [5, 3], "values": [0, 2]}]}
    )

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    counts: list[int] = Field(description="Lengths of the runs; they sum to height × width.")
    values: list[int] = Field(description="The class id of each run.")


class ClassPolygons(BaseModel):
    """The outlines of one class."""

    id: int = Field(description="The class id.")
    rings: list[list[int]] = Field(
        description="Closed rings x0, y0, x1, y1, ... of pixel corners: (0, 0) is the image's "
        "top left corner, (width, height) its bottom right one. Filled by the even-odd rule "
        "they give exactly the class's pixels."
    )


class PolygonMask(BaseModel):
    """A label map as polygons along the pixels' edges, of the classes that occur."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"size": [2, 4], "polygons": [{"id": 2, "rings": [[1, 0, 4, 0, 4, 2, 1, 2]]}]}
            ]
        }
    )

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    polygons: list[ClassPolygons]


class CocoMask(BaseModel):
    """An object's pixels as COCO's compressed run lengths, which pycocotools decodes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"size": [2, 4], "counts": "042"}]})

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    counts: str


class InstancePolygons(BaseModel):
    """An object's outlines along the pixels' edges; see `ClassPolygons`."""

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    rings: list[list[int]]


class Instance(BaseModel):
    """One object."""

    id: int = Field(description="Its pixels' value in the mask PNG: 1 for the best score.")
    label: int = Field(description="Its class id.")
    class_: str = Field(alias="class", description="The name of its class.")
    score: float = Field(description="0–1.")
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image; (0, 0) is its top left corner."
    )
    area: int | None = Field(description="Pixels of the mask, if the answer has masks.")
    mask: CocoMask | InstancePolygons | None = Field(
        description="As ?mask= asks: COCO's run lengths, polygons, or null for none; null also "
        "where the network gives no masks."
    )


class _ImageAnswer(BaseModel):
    model: str = Field(examples=["street"])
    file: str | None = Field(description="The file's name in the form, if it came with one.")
    height: int = Field(description="The image's in pixels; the mask's where size=network.")
    width: int
    timings_ms: dict[str, float] = Field(
        description="Milliseconds by stage.",
        examples=[{"decode": 4.1, "queue": 0.1, "preprocess": 2.0, "inference": 35.2}],
    )


class PanopticSegment(BaseModel):
    """One segment, in the words of COCO's panoptic files."""

    id: int = Field(description="Its pixels' value in segments_mask, from 1.")
    category_id: int = Field(description="Its class id.")
    isthing: bool = Field(description="Whether it is one object, not all of a class.")
    class_: str = Field(alias="class", description="The name of its class.")
    score: float = Field(description="0–1.")
    area: int = Field(description="Its pixels.")


class Segmentation(_ImageAnswer):
    """A segmentor's answer to one image."""

    fit: Literal["resized", "stretched", "letterboxed"] = Field(
        description="How the image was brought to the network's size. 'resized': in its own "
        "aspect ratio; 'stretched' and 'letterboxed' change the network's answer somewhat."
    )
    mode: Literal["whole", "slide"] = Field(
        description="The network saw the whole image at once, or crops whose logits were averaged."
    )
    classes: list[ClassArea]
    mask: RunLengthMask | PolygonMask | None = Field(
        description="As ?mask= asks: run lengths, polygons, or null for none."
    )
    segments: list[PanopticSegment] | None = Field(
        default=None, description="Of a panoptic network alone, as are the next two."
    )
    segments_mask: RunLengthMask | None = Field(
        default=None, description="The segment of each pixel, 0 for none; null for ?mask=none."
    )
    instances: list[Instance] | None = Field(
        default=None, description="Objects, which may overlap, the best score first."
    )


class Segmentations(BaseModel):
    """A segmentor's answers to several images, in the order they were sent."""

    results: list[Segmentation]


class Detection(_ImageAnswer):
    """A detector's answer to one image."""

    fit: Literal["resized", "letterboxed"] = Field(
        description="'resized': the image was padded as published. 'letterboxed': further, "
        "which changes the network's answer somewhat."
    )
    resized_to: tuple[int, int] = Field(
        description="Height and width of the image within the network's input."
    )
    classes: list[ClassCount]
    instances: list[Instance] = Field(description="The best score first.")


class Detections(BaseModel):
    """A detector's answers to several images, in the order they were sent."""

    results: list[Detection]
