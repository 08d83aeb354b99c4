"""A model's card: what its bundle says about it, and how it runs here (``/v1/models``)."""

from __future__ import annotations

import math
import re
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.manifest import Manifest, OutputParity
from fdconv_deploy.runtime.segmentation import classes_of
from fdconv_deploy.runtime.sliding_window import slide_stride

RGB = tuple[int, int, int]
Mode = Literal["whole", "slide"]
# The protocol's names of the types of networks' tensors.
_DATATYPES = {"float32": "FP32", "int64": "INT64"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ModelClass(BaseModel):
    """One class of a model."""

    id: int = Field(description="The class id: a pixel's value in masks, an instance's `label`.")
    name: str
    color: RGB = Field(description="Red, green, blue, 0–255.")


class TensorSize(BaseModel):
    """Size of the network's input, or of its logits, without the batch."""

    channels: int = Field(description="Bands of the input; logits per pixel of the output.")
    height: int
    width: int


class TensorMetadata(BaseModel):
    """KServe v2: one input or output of a model; -1 in its shape is any size."""

    name: str
    datatype: str
    shape: list[int]


class InstanceLimits(BaseModel):
    """Limits of a detector's answers."""

    masks: bool = Field(description="Whether its objects have masks, or boxes alone.")
    mask_size: int = Field(description="Height and width of the network's mask over each box.")
    most: int = Field(description="Objects in an image at most.")
    lowest_score: float = Field(description="The network gives no object that scores less.")
    min_score: float = Field(description="Used when a request names none.")


class QueryOutputs(BaseModel):
    """Size of a panoptic network's outputs, without the batch."""

    number: int = Field(description="Queries, each of which has logits of classes and a mask.")
    classes: int = Field(description="Class logits of a query.")
    height: int = Field(description="Of a query's mask logits.")
    width: int


class BatchParity(OutputParity):
    """The exported graph compared with the network it came from, at export."""

    batch: int


class Benchmark(BaseModel):
    """Time of one run of a batch size through the network, measured here when it was loaded."""

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
        description="Models that are not loaded are loaded at their first request, if they can be."
    )
    version: str = Field(description="Counts the times the model was loaded; '0' if never.")
    classes: list[ModelClass]
    input: TensorSize = Field(
        description="Size of the network's input, and of the tensors that /v2 takes."
    )
    other_sizes: list[TensorSize] = Field(
        description="Further input sizes: an image takes that nearest to its proportions."
    )
    output: TensorSize | None = Field(description="Size of a segmentor's logits.")
    queries: QueryOutputs | None = Field(
        description="For a panoptic network, which has no logits for each pixel; null for others."
    )
    threshold: float | None = Field(
        description="For a segmentor with one output, whose sigmoid is the probability of class "
        "1: pixels above it are of class 1, others of class 0. Null where the highest logit wins."
    )
    instances: InstanceLimits | None = Field(description="Null for a segmentor.")
    preprocessing: dict[str, Any] = Field(
        description="How images become the network's input: (image - mean) / std, band by band. "
        "Loading 'color' reads RGB photographs, 'bands' every band that a file has."
    )
    batch_sizes: list[int]
    mode: Mode = Field(description="Used when a request names none.")
    modes: list[Mode]
    fit: Literal["stretch", "pad"] = Field(description="Used when a request names none.")
    precision: str
    backend: str | None = Field(
        description="The inference backend; null while the model is not loaded.",
        examples=["onnxruntime-cpu"],
    )
    bytes: int = Field(description="Memory the loaded model holds at least: graphs and weights.")
    checkpoint: str | None = Field(description="File name of the checkpoint it was made from.")
    checkpoint_sha256: str | None
    parity: list[BatchParity]
    benchmark: list[Benchmark]
    created_at: datetime
    created_by: str
    _manifest: Manifest = PrivateAttr()

    @cached_property
    def tensors(self) -> tuple[list[TensorMetadata], list[TensorMetadata]]:
        """The inputs and outputs that /v2 takes and gives."""
        manifest, batch = self._manifest, min(self.batch_sizes)
        inputs, outputs = (
            [
                TensorMetadata(
                    name=one.name, datatype=_DATATYPES[one.dtype], shape=[-1, *one.shape[1:]]
                )
                for one in side[batch]
            ]
            for side in (manifest.inputs, manifest.outputs)
        )
        if self.kind == "segmentor":
            datatype = "UINT8" if len(self.classes) <= 256 else "UINT16"
            shape = [-1, self.input.height, self.input.width]
            labels = TensorMetadata(name="labels", datatype=datatype, shape=shape)
            outputs = [*(one for one in outputs if one.name != "boxes"), labels]
        return inputs, outputs

    @cached_property
    def input_numbers(self) -> int:
        """How many numbers the inputs of one image are."""
        return sum(math.prod(one.shape[1:]) for one in self.tensors[0])


class ModelList(BaseModel):
    """The models being served, the default first."""

    models: list[ModelCard]


def model_name(path: Path) -> str:
    """The name a bundle is served under: its folder's, if that can be part of an address."""
    if not _NAME.fullmatch(path.name):
        raise BundleError(
            f"The bundle {path} is served under its folder's name, which may hold letters, "
            "digits, '.', '_' and '-' only. Rename the folder."
        )
    return path.name


def model_card(name: str, bundle: Bundle, *, default: bool) -> ModelCard:
    """The card of a detector or segmentor that is not loaded; BundleError for other bundles."""
    manifest = bundle.manifest
    if manifest.input is None or manifest.kind == "module":
        raise BundleError(
            f"The bundle {bundle.path} is of a {manifest.kind}, which does not segment images, "
            "so it cannot be served. Name a segmentor's or a detector's bundle."
        )
    own: dict[str, Any] = {"mode": "whole", "modes": ["whole"], "fit": manifest.fit}
    own |= dict.fromkeys(("output", "queries", "threshold", "instances"))
    own |= _segmentor(bundle) if manifest.kind == "segmentor" else _detector(bundle)
    config = manifest.architecture or manifest.detector
    assert config is not None
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    checkpoint = manifest.checkpoint
    channels = manifest.inputs[bundle.batch_sizes[0]][0].shape[1]
    sizes = [TensorSize(channels=channels, height=h, width=w) for h, w in manifest.sizes]
    card = ModelCard(
        **own,
        name=name,
        kind=manifest.kind,
        default=default,
        state="unloaded",
        version="0",
        input=sizes[0],
        other_sizes=sizes[1:],
        preprocessing=config.preprocessing.model_dump(mode="json"),
        batch_sizes=list(bundle.batch_sizes),
        precision=manifest.precision,
        backend=None,
        # Every graph has its own copy of the weights.
        bytes=sum(manifest.files[graph].bytes + weights for graph in manifest.graphs),
        checkpoint=Path(checkpoint.name).name if checkpoint else None,
        checkpoint_sha256=checkpoint.sha256 if checkpoint else None,
        parity=[
            BatchParity(batch=batch, **output.model_dump())
            for batch, outputs in (manifest.parity.batches if manifest.parity else {}).items()
            for output in outputs
        ],
        benchmark=[],
        created_at=manifest.created_at,
        created_by=manifest.created_by,
    )
    card._manifest = manifest
    return card


def _segmentor(bundle: Bundle) -> dict[str, Any]:
    """The fields of a segmentor."""
    manifest = bundle.manifest
    config, size = manifest.architecture, manifest.input
    assert config is not None
    assert size is not None
    modes: list[Mode] = ["whole"]
    try:
        slide_stride(config.test, (size.height, size.width))
        modes.append("slide")
    except BundleError:
        if config.test.mode == "slide":
            raise
    outputs = manifest.outputs[bundle.batch_sizes[0]]
    # Logits, or queries' masks, behind which MaskDINO's boxes may come.
    _, channels, height, width = outputs[0 if config.panoptic is None else 1].shape
    own: dict[str, Any] = {
        "classes": _classes(*classes_of(config)),
        "threshold": config.decode_head.label_threshold,
    }
    if config.panoptic is not None:
        classes = outputs[0].shape[-1]
        queries = QueryOutputs(number=channels, classes=classes, height=height, width=width)
        return {**own, "queries": queries}
    output = TensorSize(channels=channels, height=height, width=width)
    return {**own, "output": output, "mode": config.test.mode, "modes": modes}


def _detector(bundle: Bundle) -> dict[str, Any]:
    """The fields of a detector."""
    config = bundle.manifest.detector
    assert config is not None
    return {
        "classes": _classes(*classes_of(config)),
        "instances": InstanceLimits(
            masks=config.mask_head is not None,
            mask_size=config.mask_size,
            most=config.test.rcnn.max_per_img,
            lowest_score=config.test.rcnn.score_thr,
            min_score=SHOWN_SCORE,
        ),
        "fit": "pad",
    }


def _classes(names: tuple[str, ...], palette: tuple[RGB, ...]) -> list[ModelClass]:
    pairs = enumerate(zip(names, palette, strict=True))
    return [ModelClass(id=number, name=name, color=color) for number, (name, color) in pairs]
