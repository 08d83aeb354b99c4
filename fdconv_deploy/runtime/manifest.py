"""What a bundle says about itself: the models behind ``manifest.json``.

A key that this file does not know is refused rather than ignored, so adding one means
raising ``FORMAT_VERSION``; an older reader then says that the bundle is newer than it, and a
newer one goes on reading older bundles. Version 2 added detectors; since version 3 the graphs'
``fdconv`` nodes have attributes that fused kernels read, see `Manifest.older_nodes`; version 4
added graphs of several input sizes.

``graph``, ``versions`` are free dictionaries for facts that change no behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from fdconv_deploy.config import (
    DetectorConfig,
    Frozen,
    MaskDINOHeadConfig,
    QueryHeadConfig,
    SegmentorConfig,
)

FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A name that numpy knows, of the types that a graph's tensors are of.
DType = Annotated[str, StringConstraints(pattern=r"^(bool|u?int(8|16|32|64)|float(16|32|64))$")]
BatchSize = Annotated[int, Field(ge=1)]
Fit = Literal["stretch", "pad"]


class TensorSpec(Frozen):
    """One input or output of a graph: static ``shape``, numpy ``dtype`` name."""

    name: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: DType = "float32"


class InputSize(Frozen):
    """Height and width in pixels of the images a segmentor's or detector's graphs take."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class CheckpointInfo(Frozen):
    """The checkpoint a bundle was exported from: its file name and hash, no folder."""

    name: str
    sha256: Sha256


class FileInfo(Frozen):
    """Hash and size of one file of the bundle."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class OutputParity(Frozen):
    """How far one output of the exported graph is from the network it came from.

    ``max_abs`` is max|graph − reference|, ``max_rel`` that divided by max|reference|, and
    ``argmax_agreement`` the share (0–1) of positions with the same highest class, for
    outputs where a class is chosen.
    """

    name: str
    max_abs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    max_rel: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    argmax_agreement: Annotated[float, Field(ge=0, le=1)] | None = None


class ParityReport(Frozen):
    """The comparison made at export: per batch size, one entry per output.

    ``reference`` and ``backend`` name the two sides, ``inputs`` what they were fed.
    """

    batches: dict[BatchSize, tuple[OutputParity, ...]]
    reference: str = ""
    backend: str = ""
    inputs: str = ""

    @property
    def max_rel(self) -> float:
        """The largest relative error over all outputs and batch sizes."""
        return max((o.max_rel for outputs in self.batches.values() for o in outputs), default=0.0)


class SizedGraphs(Frozen):
    """The graphs of one more input size: entries as the manifest's own for its ``input``."""

    input: InputSize
    models: dict[BatchSize, str]
    inputs: dict[BatchSize, tuple[TensorSpec, ...]]
    outputs: dict[BatchSize, tuple[TensorSpec, ...]]
    parity: ParityReport | None = None


class Manifest(Frozen):
    """The contents of ``manifest.json``.

    ``models`` maps a batch size to its graph's file name; ``inputs`` and ``outputs`` give
    those graphs' tensors, batch size by batch size. A ``segmentor`` has one input
    ``images`` (B, bands, H, W) float32, normalised, and one output ``logits``
    (B, classes, h, w) float32 at the head's resolution, or (B, 1, h, w) of a head with one
    output; ``architecture`` describes it. With ``panoptic`` in it, the outputs are ``classes``
    (B, Q, class outputs) and ``masks`` (B, Q, h, w) float32, logits of each query. A
    ``detector``, which ``detector`` describes, takes ``images`` as well, zero at the right and
    the bottom past each image's own ``sizes`` (B, 2) float32, height and width; and gives
    ``boxes`` (B, D, 4) float32 x1 y1 x2 y2 in pixels of the input, the best score first,
    ``scores`` (B, D) float32, ``labels`` (B, D) int64, ``count`` (B,) int64, how many of the D
    are objects, and with a mask head ``masks`` (B, D, h, w) float32, probabilities over each
    box. A ``module`` may have any inputs and outputs.

    ``other_sizes`` holds the graphs of further input sizes, over the same weights and of the same
    batch sizes; :meth:`at` is the manifest of one size alone.

    ``group_maps`` holds the sha256 of each dynamic layer's frequency group map: the maps
    themselves are in the graphs, since a checkpoint does not tell them. ``files`` lists
    every file but the manifest itself; ``BundleWriter.commit`` fills it in.

    ``precision`` says what the graphs compute in: all in float32, plain parts in float16, or
    plain convolutions in eight bits. Inputs and outputs are float32 in each.
    ``graph["precision"]`` then tells what it cost, layer by layer.
    """

    format_version: int = FORMAT_VERSION
    created_by: str
    created_at: datetime
    kind: Literal["segmentor", "detector", "module"]
    architecture: SegmentorConfig | None = None
    detector: DetectorConfig | None = None
    input: InputSize | None = None
    fit: Fit = "stretch"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    models: dict[BatchSize, str] = Field(min_length=1)
    weights: str | None = None
    inputs: dict[BatchSize, tuple[TensorSpec, ...]]
    outputs: dict[BatchSize, tuple[TensorSpec, ...]]
    other_sizes: tuple[SizedGraphs, ...] = ()
    group_maps: dict[str, Sha256] = Field(default_factory=dict)
    checkpoint: CheckpointInfo | None = None
    parity: ParityReport | None = None
    graph: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileInfo] = Field(default_factory=dict)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every input size, the first being ``input``; empty for a module."""
        found = [self.input, *(other.input for other in self.other_sizes)]
        return tuple((size.height, size.width) for size in found if size is not None)

    def at(self, size: tuple[int, int]) -> Manifest:
        """The manifest of one (height, width)'s graphs alone; ``ValueError`` if there are none."""
        for other in self.other_sizes:
            if size == (other.input.height, other.input.width):
                return self.model_copy(update={**dict(other), "other_sizes": ()})
        if size not in self.sizes:
            raise ValueError(f"there are no graphs of {size[0]}x{size[1]}")
        return self.model_copy(update={"other_sizes": ()})

    def specs(self, batch: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and the outputs of the graph of a batch size."""
        return self.inputs[batch], self.outputs[batch]

    @property
    def graphs(self) -> tuple[str, ...]:
        """The file names of all graphs, of every size and batch size."""
        models = self.models, *(other.models for other in self.other_sizes)
        return tuple(name for each in models for name in each.values())

    @property
    def older_nodes(self) -> str | None:
        """Why fused kernels cannot run the graphs' FDConv nodes, as a clause; None if they can.

        The function bodies of standard operators run in any format.
        """
        if self.format_version >= 3:
            return None
        return (
            f"this bundle is of format {self.format_version}, whose FDConv nodes lack attributes "
            "that these kernels read; export it again with this version to use them"
        )

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        sized: tuple[Manifest | SizedGraphs, ...] = (self, *self.other_sizes)
        for each in sized:
            if not set(self.models) == set(each.models) == set(each.inputs) == set(each.outputs):
                raise ValueError(
                    "'models', 'inputs' and 'outputs' must be given for the same batch sizes, at "
                    f"every input size; found {sorted(each.models)}, {sorted(each.inputs)} and "
                    f"{sorted(each.outputs)} where the first has {sorted(self.models)}"
                )
        if self.other_sizes and self.kind == "module":
            raise ValueError("a module's graphs have one input size, so no 'other_sizes'")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError("each input size must be given once")
        if self.kind != "module":
            ports_of = _segmentor if self.kind == "segmentor" else _detector
            for view in (self, *map(self.at, self.sizes[1:])):
                _check_ports(view, ports_of(view))
        return self


# A tensor's name, shape without the batch (None where any size is good) and type.
_Port = tuple[str, tuple[int | None, ...], str]


def _segmentor(manifest: Manifest) -> tuple[list[_Port], list[_Port]]:
    """What a segmentor's graphs take and give; it must have an architecture and a size."""
    segmentor, size = manifest.architecture, manifest.input
    if segmentor is None or size is None:
        raise ValueError("a segmentor's manifest must hold 'architecture' and 'input'")
    head, bands = segmentor.decode_head, segmentor.backbone.in_channels
    counts = [head.num_classes] if head.label_threshold is None else [1, 2]
    _check_names(counts, segmentor.classes, segmentor.palette)
    gives: list[_Port] = [("logits", (head.outputs, None, None), "float32")]
    if segmentor.panoptic is not None and isinstance(head, QueryHeadConfig):
        gives = [
            ("classes", (head.num_queries, head.class_outputs), "float32"),
            ("masks", (head.num_queries, None, None), "float32"),
        ]
        # MaskDINO's own, which the first bundles of one lack.
        own = isinstance(head, MaskDINOHeadConfig) and segmentor.panoptic.instance_on
        if own and all("boxes" in {t.name for t in each} for each in manifest.outputs.values()):
            gives.append(("boxes", (head.num_queries, 4), "float32"))
    return [("images", (bands, size.height, size.width), "float32")], gives


def _detector(manifest: Manifest) -> tuple[list[_Port], list[_Port]]:
    """What a detector's graphs take and give; it must have an architecture and a size."""
    detector, size = manifest.detector, manifest.input
    if detector is None or size is None:
        raise ValueError("a detector's manifest must hold 'detector' and 'input'")
    _check_names([detector.bbox_head.num_classes], detector.classes, detector.palette)
    most, side = detector.test.rcnn.max_per_img, detector.mask_size
    gives: list[_Port] = [
        ("boxes", (most, 4), "float32"),
        ("scores", (most,), "float32"),
        ("labels", (most,), "int64"),
        ("count", (), "int64"),
    ]
    if side:
        gives.append(("masks", (most, side, side), "float32"))
    images: _Port = ("images", (3, size.height, size.width), "float32")
    return [images, ("sizes", (2,), "float32")], gives


def _check_names(
    counts: Sequence[int], names: Sequence[str], palette: Sequence[tuple[int, int, int]]
) -> None:
    for given, what in ((names, "class names"), (palette, "palette colours")):
        if given and len(given) not in counts:
            classes = " or ".join(map(str, counts))
            raise ValueError(f"the head has {classes} classes but there are {len(given)} {what}")


def _check_ports(manifest: Manifest, ports: tuple[list[_Port], list[_Port]]) -> None:
    for batch in manifest.models:
        pairs = zip(("take", "give"), ports, manifest.specs(batch), strict=True)
        for does, wanted, tensors in pairs:
            expected = [(name, (batch, *shape), dtype) for name, shape, dtype in wanted]
            found = [(one.name, one.shape, one.dtype) for one in tensors]
            if len(found) != len(expected) or not all(map(_fits, found, expected)):
                raise ValueError(
                    f"a {manifest.kind}'s graph of batch {batch} must {does} {_listed(expected)}; "
                    f"found {_listed(found)}"
                )


def _fits(found: _Port, expected: _Port) -> bool:
    (name, shape, dtype), (wanted_name, wanted_shape, wanted_dtype) = found, expected
    return (name, dtype, len(shape)) == (wanted_name, wanted_dtype, len(wanted_shape)) and all(
        wanted in (None, length) for length, wanted in zip(shape, wanted_shape, strict=True)
    )


def _listed(ports: Sequence[_Port]) -> str:
    texts = [f"{name} {shape} {dtype}" for name, shape, dtype in ports]
    return ", ".join(texts).replace("None", "any") or "none"
