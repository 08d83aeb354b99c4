"""A checkpoint file → a report on what is in it. Builds no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field

from fdconv_deploy.checkpoints import model_size
from fdconv_deploy.checkpoints.attention_stability import AttentionStability, attention_stability
from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import Inference, Setting
from fdconv_deploy.checkpoints.frequency_order import OrderReport, tell_order
from fdconv_deploy.checkpoints.infer_detector import infer_detector_config
from fdconv_deploy.checkpoints.infer_layers import (
    Kind,
    Layer,
    Shapes,
    as_published,
    conv_layers,
    kind_of,
    parameters,
    part,
)
from fdconv_deploy.checkpoints.infer_segmentor import (
    infer_backbone_only,
    infer_segmentor_config,
    training_size,
)
from fdconv_deploy.checkpoints.loading import config_for, network_of
from fdconv_deploy.checkpoints.reading import read_checkpoint
from fdconv_deploy.config import BackboneConfig, DetectorConfig, Preprocessing, SegmentorConfig
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError

Images = Sequence[NDArray[Any]] | Callable[[Preprocessing], Sequence[NDArray[Any]]]


class LayerReport(BaseModel):
    """One convolution. Byte counts are of float32; ``macs`` is None where no size is known."""

    model_config = ConfigDict(frozen=True)

    name: str
    dynamic: bool
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    kernel_num: int | None
    parameters: int
    spectrum_bytes: int
    macs: int | None


class Report(BaseModel):
    """What a checkpoint holds.

    Attributes:
        path: the file.
        format: its layout, see :class:`Checkpoint`.
        kind: what network it is of.
        dynamic_layers: how many FDConv layers it has; 0 for a plain network.
        size: (height, width) in pixels that ``macs`` is for.
        parameters: trained numbers by part, and ``total``.
        fdconv_parameters: those of the FDConv layers by what they do.
        macs: multiply-adds of convolutions per image, by part. Convolutions of the backbone
            are ``main``; what FDConv adds to them is under its own names.
        spectrum_bytes: of all stored spectra, float32.
        published_buffer_bytes: what the published code holds beside the weights: the bin
            order as int64 and the band masks.
        architecture: None for anything but a segmentation network told without contradiction.
        detector: the same of a detector.
        backbone: None if it is not a ResNet known here.
        found, assumed, notes: see :class:`Inference`.
        dropped, other_weights: see :class:`Checkpoint`.
        problem: why there is no architecture, or None.
        refusal: why export refuses it although it is understood, and what to do; None else.
        training_size: (height, width) in pixels of the crops a segmentor was trained on, where
            its config states them.
        command: the command line that exports it; None where it cannot be exported, or where
            the report was not asked for by the command line.
        frequency_order: what tells the order of frequencies, which few checkpoints hold; None
            without FDConv layers or data.
        attention_stability: whether its attentions amplify rounding on frames unlike the
            training's; None without FDConv layers, running statistics or data.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    format: str
    kind: Kind
    dynamic_layers: int
    tensors: int
    dtypes: tuple[str, ...]
    size: tuple[int, int]
    parameters: dict[str, int]
    fdconv_parameters: dict[str, int]
    macs: dict[str, int] | None
    spectrum_bytes: int
    published_buffer_bytes: int
    architecture: SegmentorConfig | None
    detector: DetectorConfig | None = None
    backbone: BackboneConfig | None
    found: tuple[Setting, ...]
    assumed: tuple[Setting, ...]
    notes: tuple[str, ...]
    dropped: tuple[str, ...]
    other_weights: tuple[str, ...] = ()
    problem: str | None
    refusal: str | None = None
    training_size: tuple[int, int] | None = None
    command: str | None = None
    layers: tuple[LayerReport, ...]
    frequency_order: OrderReport | None = None
    attention_stability: AttentionStability | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ready(self) -> bool:
        """Whether ``fdconv export`` takes it."""
        return self.problem is None and self.refusal is None


def inspect_checkpoint(
    path: str | Path,
    config: str | Path | Config | None = None,
    size: tuple[int, int] = (512, 512),
    *,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    images: Images = (),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Read a checkpoint and report on it: segmentors, detectors, backbones, plain networks.

    Args:
        path: any file :func:`read_checkpoint` takes.
        config: a config file, by default the one in the checkpoint.
        size: (height, width) in pixels to count multiply-adds for.
        overrides: fields the weights do not tell.
        weights: the entry to take weights from.
        images: of the kind the network was trained on, to tell its frequency order by, or what
            gives them, decoded for its preprocessing; see :func:`tell_order`.
        progress: told of each step.

    Raises:
        CheckpointError: the file or the config cannot be read. A network that is not
            understood is not an error here: the report's ``problem`` says what is wrong.
    """
    checkpoint = read_checkpoint(path, weights=weights)
    report = report_on(
        checkpoint.state_dict,
        path=str(path),
        format=checkpoint.format,
        dropped=checkpoint.dropped,
        other_weights=checkpoint.other_weights,
        config=config_for(checkpoint, config),
        meta=checkpoint.meta,
        overrides=overrides,
        size=size,
        images=images,
        progress=progress,
    )
    if report.ready:
        try:  # as export will; takes no copy of the weights
            network_of(checkpoint, path, config=config, overrides=overrides)
        except (CheckpointError, UnsupportedLayerError) as error:
            return report.model_copy(update={"problem": str(error).removeprefix(f"{path}: ")})
    return report


def report_on(
    state: Shapes,
    *,
    path: str = "",
    format: str = "plain",  # noqa: A002 - the report's own word
    dropped: Sequence[str] = (),
    other_weights: Sequence[str] = (),
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (512, 512),
    images: Images = (),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """:func:`inspect_checkpoint` for tensors at hand; tensors on the meta device do."""
    state = as_published(state)
    architecture: SegmentorConfig | None = None
    detector: DetectorConfig | None = None
    backbone: BackboneConfig | None = None
    inference: Inference[Any] | None = None
    problem: str | None = None
    kind = kind_of(state)
    try:
        if kind == "segmentor":
            inference = infer_segmentor_config(state, config=config, meta=meta, overrides=overrides)
            architecture, backbone = inference.architecture, inference.architecture.backbone
        elif kind == "detector":
            inference = infer_detector_config(state, config=config, meta=meta, overrides=overrides)
            detector, backbone = inference.architecture, inference.architecture.backbone
        elif kind != "unknown":
            inference = infer_backbone_only(state, config=config, overrides=overrides)
            backbone = inference.architecture
        else:
            names = ", ".join(list(state)[:3])
            problem = f"None of its names is of a network known here: {names}…"
    except CheckpointError as error:
        problem = str(error)
    try:
        layers = conv_layers(state)
    except CheckpointError as error:
        layers, problem = [], problem or str(error)
    sizes = model_size.layer_sizes(state, architecture, backbone, size)
    ratio = backbone.conv.param_ratio if backbone and backbone.conv else 1
    order = None
    if any(layer.dynamic for layer in layers) and not any(v.is_meta for v in state.values()):
        whole_network = architecture or detector
        preprocessing = whole_network.preprocessing if whole_network else None
        given = images(preprocessing or Preprocessing()) if callable(images) else images
        try:
            order = tell_order(state, backbone, preprocessing, given, progress)
        except CheckpointError as error:
            problem = problem or str(error)
    return Report(
        path=path,
        format=format,
        kind=kind,
        dynamic_layers=sum(layer.dynamic for layer in layers),
        tensors=len(state),
        dtypes=tuple(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})),
        size=size,
        parameters=model_size.parameters_by_part(state),
        fdconv_parameters=model_size.parameters_by_role(state),
        macs=model_size.macs_by_part(state, layers, sizes) if sizes else None,
        spectrum_bytes=sum(model_size.spectrum_bytes(layer, ratio) for layer in layers),
        published_buffer_bytes=model_size.published_buffer_bytes(layers, backbone, ratio),
        architecture=architecture,
        detector=detector,
        backbone=backbone,
        found=inference.found if inference else (),
        assumed=inference.assumed if inference else (),
        notes=inference.notes if inference else (),
        dropped=tuple(dropped),
        other_weights=tuple(other_weights),
        problem=problem,
        refusal=None if problem else _refusal(kind, layers),
        training_size=training_size(config) if architecture is not None else None,
        layers=tuple(_layer(state, layer, ratio, sizes) for layer in layers),
        frequency_order=order,
        attention_stability=attention_stability(state),
    )


def _refusal(kind: Kind, layers: Sequence[Layer]) -> str | None:
    if kind in ("backbone", "classifier"):
        return (
            "It is no whole segmentation network or detector. Train one with it, and export that; "
            "from Python, export_module takes any module with FDConv layers."
        )
    if not any(layer.dynamic for layer in layers):
        return (
            "No layer in it is an FDConv layer. `fdconv convert --equivalent` makes an FDConv "
            "network of it that computes the same, to train on."
        )
    return None


def _layer(state: Shapes, layer: Layer, ratio: int, sizes: model_size.Sizes) -> LayerReport:
    macs = sum(model_size.layer_macs(state, layer, sizes).values()) if layer.name in sizes else None
    return LayerReport(
        name=layer.name,
        dynamic=layer.dynamic,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel=layer.kernel,
        kernel_num=layer.attentions // (layer.ratio or ratio) if layer.dynamic else None,
        parameters=parameters(part(state, f"{layer.name}.")),
        spectrum_bytes=model_size.spectrum_bytes(layer, ratio),
        macs=macs,
    )
