"""The JSON the service speaks. These models are also its OpenAPI description."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RGB = tuple[int, int, int]


class ClassArea(BaseModel):
    """One class of the network, and how much of the image it covers."""

    id: int = Field(description="The label: a pixel's value in masks.")
    name: str
    color: RGB = Field(description="Red, green, blue, 0–255.")
    area: int = Field(description="Pixels of this class in the image.")
    share: float = Field(description="``area`` over the image's pixels, 0–1.")


class RunLengthMask(BaseModel):
    """A label map as runs of equal pixels, read row by row from the top left.

    COCO's uncompressed RLE for many classes at once: run i is ``counts[i]`` pixels long and
    all of class ``values[i]``. Unlike COCO's it runs along rows, not down columns. In numpy:
    ``numpy.repeat(values, counts).reshape(size)``.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"size": [2, 4], "counts": [5, 3], "values": [0, 2]}]}
    )

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    counts: list[int] = Field(description="Lengths of the runs; they sum to height × width.")
    values: list[int] = Field(description="The class of each run.")


class ClassPolygons(BaseModel):
    """The outlines of one class."""

    id: int = Field(description="The class.")
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


class Segmentation(BaseModel):
    """The answer to one image."""

    model: str = Field(examples=["street"])
    file: str | None = Field(description="The file's name in the form, if it came with one.")
    height: int = Field(description="Of the mask, in pixels; the image's unless size=network.")
    width: int
    fit: Literal["resized", "stretched", "letterboxed"] = Field(
        description="How the image was brought to the network's size. 'resized': in its own "
        "aspect ratio; 'stretched' and 'letterboxed' change the network's answer somewhat."
    )
    mode: Literal["whole", "slide"] = Field(
        description="The network saw the whole image at once, or crops whose answers were averaged."
    )
    classes: list[ClassArea]
    mask: RunLengthMask | PolygonMask | None = Field(
        description="As ?mask= asks: run lengths, polygons, or null for none."
    )
    timings_ms: dict[str, float] = Field(
        description="Milliseconds by stage.",
        examples=[{"decode": 4.1, "queue": 0.1, "preprocess": 2.0, "inference": 35.2}],
    )


class Segmentations(BaseModel):
    """The answers to several images, in the order they were sent."""

    results: list[Segmentation]


class ClassCount(BaseModel):
    """One class of a detector, and how many of its objects the answer holds."""

    id: int = Field(description="As an instance's ``label``.")
    name: str
    color: RGB = Field(description="Red, green, blue, 0–255.")
    count: int


class CocoMask(BaseModel):
    """An object's pixels as COCO's compressed run lengths, which pycocotools decodes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"size": [2, 4], "counts": "042"}]})

    size: tuple[int, int] = Field(description="Height and width in pixels.")
    counts: str


class InstanceRings(BaseModel):
    """An object's outlines along the pixels' edges; see `ClassPolygons`."""

    size: tuple[int, int]
    rings: list[list[int]]


class Instance(BaseModel):
    """One object."""

    id: int = Field(description="Its pixels' value in the mask PNG: 1 for the best score.")
    label: int = Field(description="The number of its class.")
    class_: str = Field(alias="class", description="The name of its class.")
    score: float = Field(description="0–1.")
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image; (0, 0) is its top left corner."
    )
    area: int | None = Field(description="Pixels of the mask, if it is in the answer.")
    mask: CocoMask | InstanceRings | None = Field(
        description="As ?mask= asks: COCO's run lengths, polygons, or null for none, and where "
        "the network gives none."
    )


class Detection(BaseModel):
    """A detector's answer to one image."""

    model: str
    file: str | None = Field(description="The file's name in the form, if it came with one.")
    height: int = Field(description="Of the image, in pixels.")
    width: int
    fit: Literal["resized", "letterboxed"] = Field(
        description="'resized': the image was padded as published. 'letterboxed': further, "
        "which changes the network's answer somewhat."
    )
    resized_to: tuple[int, int] = Field(
        description="Height and width of the image within the network's input."
    )
    classes: list[ClassCount]
    instances: list[Instance] = Field(description="The best score first.")
    timings_ms: dict[str, float] = Field(description="Milliseconds by stage.")


class Detections(BaseModel):
    """A detector's answers to several images, in the order they were sent."""

    results: list[Detection]


class InstanceLimits(BaseModel):
    """What a detector gives at most, and at least."""

    masks: bool = Field(description="Whether its objects have masks, or boxes alone.")
    mask_size: int = Field(
        description="Of a mask as the network gives it over its box, in cells each way."
    )
    most: int = Field(description="Objects in an image.")
    lowest_score: float = Field(description="The network gives no object that scores less.")
    min_score: float = Field(description="Of the objects in an answer, when a request says none.")


class ModelClass(BaseModel):
    """One class a model tells apart."""

    id: int
    name: str
    color: RGB


class InputSize(BaseModel):
    """The network's input in pixels, or its logits."""

    channels: int = Field(description="Bands of the input; logits a pixel of the output.")
    height: int
    width: int


class OutputParity(BaseModel):
    """The exported graph against the network it came from, when it was exported."""

    name: str
    batch: int
    max_abs: float
    max_rel: float = Field(description="Largest difference over the largest reference value.")
    argmax_agreement: float | None = Field(description="Share of positions of the same class.")


class Benchmark(BaseModel):
    """One run of a batch size through the network, on this machine, timed at loading."""

    batch: int
    milliseconds: float


class ModelCard(BaseModel):
    """What a model is and how it runs here."""

    name: str
    kind: Literal["segmentor", "detector"] = Field(
        description="Whether it labels every pixel, or finds objects."
    )
    default: bool = Field(description="Whether /v1/segment uses this model.")
    state: Literal["ready", "unloaded", "loading", "failed"] = Field(
        description="Models that are not loaded are at their first request, if they can be."
    )
    version: str = Field(description="Counts the times the model was loaded; '0' not yet.")
    classes: list[ModelClass]
    input: InputSize = Field(description="Of the network's input.")
    output: InputSize | None = Field(description="Of a segmentor's logits.")
    threshold: float | None = Field(
        description="Of a segmentor with one output, whose sigmoid is the probability of class 1: "
        "a pixel is of it above this, else of class 0. Null where the highest logit wins."
    )
    instances: InstanceLimits | None = Field(description="Of a detector.")
    preprocessing: dict[str, Any] = Field(
        description="How images become the network's input: (image - mean) / std, band by band; "
        "loading 'color' is of RGB photographs, 'bands' of every band that a file has."
    )
    batch_sizes: list[int]
    mode: Literal["whole", "slide"] = Field(description="Used when a request names none.")
    modes: list[Literal["whole", "slide"]]
    fit: Literal["stretch", "pad"] = Field(description="Used when a request names none.")
    precision: str
    backend: str | None = Field(
        description="What runs it; null while it is not loaded.", examples=["onnxruntime-cpu"]
    )
    bytes: int = Field(description="Memory the loaded model holds at least: graphs and weights.")
    checkpoint: str | None = Field(description="File name of the checkpoint it was made from.")
    checkpoint_sha256: str | None
    parity: list[OutputParity]
    benchmark: list[Benchmark]
    created_at: datetime
    created_by: str


class ModelList(BaseModel):
    """The models being served, the default first."""

    models: list[ModelCard]


class Health(BaseModel):
    """Whether the service lives, or is ready."""

    status: Literal["ok", "ready"]
