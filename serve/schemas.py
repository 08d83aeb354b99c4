"""The JSON the service speaks. These models are also its OpenAPI description."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RGB = tuple[int, int, int]


class Problem(BaseModel):
    """Why a request was not answered (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(description="The HTTP status in words.", examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(
        description="A sentence for a person: what was expected, what was found, what to do.",
        examples=[
            "The image cannot be decoded: the file is cut off or damaged. Send the whole "
            "file, or save it again."
        ],
    )
    request_id: str = Field(description="As in the X-Request-ID header and the server's log.")


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


class Segmentation(BaseModel):
    """The answer to one image."""

    model: str = Field(examples=["street"])
    height: int = Field(description="Of the image and its mask, in pixels.")
    width: int
    fit: Literal["exact", "stretch", "pad"] = Field(
        description="How the image was brought to the network's size. 'exact': in its own "
        "proportions; 'stretch' and 'pad' change the network's answer somewhat."
    )
    mode: Literal["whole", "slide"] = Field(
        description="The network saw the whole image at once, or crops whose answers were averaged."
    )
    classes: list[ClassArea]
    mask: RunLengthMask
    timings_ms: dict[str, float] = Field(
        description="Milliseconds by stage.",
        examples=[{"decode": 4.1, "queue": 0.1, "preprocess": 2.0, "inference": 35.2}],
    )


class ModelClass(BaseModel):
    """One class a model tells apart."""

    id: int
    name: str
    color: RGB


class InputSize(BaseModel):
    """The network's input in pixels."""

    height: int
    width: int


class OutputParity(BaseModel):
    """The exported graph against the network it came from, when it was exported."""

    name: str
    batch: int
    max_abs: float
    max_rel: float = Field(description="Largest difference over the largest reference value.")
    argmax_agreement: float | None = Field(description="Share of positions of the same class.")


class ModelCard(BaseModel):
    """What a model is and how it runs here."""

    name: str
    default: bool = Field(description="Whether /v1/segment uses this model.")
    classes: list[ModelClass]
    input: InputSize
    batch_sizes: list[int]
    mode: Literal["whole", "slide"] = Field(description="Used when a request names none.")
    modes: list[Literal["whole", "slide"]]
    fit: Literal["stretch", "pad"] = Field(description="Used when a request names none.")
    precision: str
    backend: str = Field(examples=["onnxruntime-cpu"])
    checkpoint: str | None = Field(description="File name of the checkpoint it was made from.")
    checkpoint_sha256: str | None
    parity: list[OutputParity]
    created_at: datetime
    created_by: str


class ModelList(BaseModel):
    """The models being served, the default first."""

    models: list[ModelCard]


class Health(BaseModel):
    """Whether the service lives, or is ready."""

    status: Literal["ok", "ready"]
