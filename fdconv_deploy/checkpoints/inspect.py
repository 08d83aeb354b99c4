"""A checkpoint file → a report on what is in it, and whether and how it can be exported."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fdconv_deploy.checkpoints.attention_stability import AttentionStability, attention_stability
from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.frequency_order import OrderReport, detect_order
from fdconv_deploy.checkpoints.infer_classes_and_preprocessing import training_size
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.loading import config_for, load_checkpoint
from fdconv_deploy.checkpoints.reading import read_checkpoint
from fdconv_deploy.checkpoints.settings import Framework, Inference, Setting
from fdconv_deploy.checkpoints.state_dict import (
    Kind,
    Layer,
    Shapes,
    backbone_prefix,
    conv_layers,
    dynamic_names,
    framework_of,
    in_openmmlab_names,
    kind_of,
    parameters,
    part,
)
from fdconv_deploy.config import (
    AnyBackboneConfig,
    BackboneConfig,
    DetectorConfig,
    SegmentorConfig,
)
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError

_FDCONV_PARTS = ("dft_weight", "KSM_Global", "KSM_Local", "FBM")


class LayerReport(BaseModel):
    """One convolution. Byte counts are of float32."""

    model_config = ConfigDict(frozen=True)

    name: str
    dynamic: bool
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    kernel_num: int | None
    parameters: int
    spectrum_bytes: int


class Report(BaseModel):
    """What a checkpoint holds.

    Attributes:
        path: the file; empty for tensors at hand.
        format: its layout, see :class:`Checkpoint`.
        kind: what network it is of.
        framework: whose names its tensors have.
        dynamic_layers: how many FDConv layers it has; 0 for a plain network.
        parameters: trained numbers by part, and ``total``.
        fdconv_parameters: those of the FDConv layers by what they do.
        spectrum_bytes: of all stored spectra, float32.
        published_buffer_bytes: what the published code holds beside the weights: the bin
            order as int64 and the band masks.
        architecture: a segmentation network's, None for others and where it is contradictory.
        detector: a detector's, in the same way.
        backbone: None if it is none known here.
        found, assumed, notes: see :class:`Inference`.
        dropped, other_weights: see :class:`Checkpoint`.
        problem: why there is no architecture, or None.
        refusal: why export refuses it although it is understood, and what to do; None else.
        training_size: (height, width) in pixels of the crops a segmentor was trained on, where
            its config states them.
        command: the command line that exports it; None where it cannot be exported, or where
            the report was not made by the command line.
        frequency_order: the order of frequencies, which few checkpoints save, and its evidence;
            None without FDConv layers or data.
        attention_stability: whether its attentions amplify rounding on frames unlike the
            training's; None without FDConv layers, running statistics or data.
    """

    model_config = ConfigDict(frozen=True)

    path: str = ""
    format: str = "plain"
    kind: Kind
    framework: Framework = "OpenMMLab"
    dynamic_layers: int
    tensors: int
    dtypes: tuple[str, ...]
    parameters: dict[str, int]
    fdconv_parameters: dict[str, int]
    spectrum_bytes: int
    published_buffer_bytes: int
    architecture: SegmentorConfig | None = None
    detector: DetectorConfig | None = None
    backbone: AnyBackboneConfig | None = None
    found: tuple[Setting, ...] = ()
    assumed: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    other_weights: tuple[str, ...] = ()
    problem: str | None = None
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

    @property
    def needs_size(self) -> bool:
        """Whether export asks for ``--size``: of a segmentor that was tested on whole images."""
        return self.architecture is not None and self.architecture.test.mode == "whole"


def inspect_checkpoint(
    path: str | Path,
    config: str | Path | Config | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Report:
    """Read a checkpoint and report on it: segmentors, detectors, backbones, plain networks.

    Args:
        path: any file :func:`read_checkpoint` takes.
        config: a config file, by default the one in the checkpoint.
        overrides: fields that neither weights nor config determine, by dotted name.
        weights: the entry to take weights from.

    Raises:
        CheckpointError: the file or the config cannot be read. A network that is not
            understood is not an error here: the report's ``problem`` describes it.
    """
    checkpoint = read_checkpoint(path, weights=weights)
    report = report_on(
        checkpoint.state_dict,
        config=config_for(checkpoint, config),
        meta=checkpoint.meta,
        overrides=overrides,
    )
    problem = report.problem
    if report.ready:
        try:  # as export will; takes no copy of the weights
            load_checkpoint(checkpoint, config=config, overrides=overrides)
        except (CheckpointError, UnsupportedLayerError) as error:
            problem = str(error).removeprefix(f"{path}: ")
    return report.model_copy(
        update={
            "path": str(path),
            "format": checkpoint.format,
            "dropped": checkpoint.dropped,
            "other_weights": checkpoint.other_weights,
            "problem": problem,
        }
    )


def report_on(
    state: Shapes,
    *,
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Report:
    """:func:`inspect_checkpoint` for tensors at hand; tensors on the meta device do."""
    given_names, state = state, in_openmmlab_names(state)
    kind = kind_of(state)
    inference: Inference[Any] | None = None
    problem: str | None = None
    layers: list[Layer] = []
    order = None
    try:
        inference = infer_config(given_names, config=config, meta=meta, overrides=overrides)
    except CheckpointError as error:
        problem = str(error)
    try:
        layers = conv_layers(state)
        if any(layer.dynamic for layer in layers) and not any(v.is_meta for v in state.values()):
            order = detect_order(state)
    except CheckpointError as error:
        problem = problem or str(error)
    network = inference.architecture if inference else None
    architecture = network if isinstance(network, SegmentorConfig) else None
    backbone: Any = (
        network if isinstance(network, BackboneConfig) else getattr(network, "backbone", None)
    )
    reports = [_layer(state, layer, backbone) for layer in layers]
    spectra = sum(layer.spectrum_bytes for layer in reports)
    # The published code's row and column of every bin, int64 each, beside a spectrum of float32.
    buffers = 2 * spectra
    if backbone is not None and backbone.conv is not None:
        bands = backbone.conv.fbm_cfg
        mask = len(bands.k_list) * bands.max_size[0] * (bands.max_size[1] // 2 + 1)
        buffers += mask * sum(layer.bands > 0 for layer in layers)
    return Report(
        kind=kind,
        dynamic_layers=len(dynamic_names(state)),
        framework=framework_of(given_names),
        tensors=len(given_names),
        dtypes=tuple(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})),
        parameters=_parameters_by_part(state),
        fdconv_parameters={
            role: parameters({k: v for k, v in state.items() if f".{role}" in f".{k}"})
            for role in _FDCONV_PARTS
        },
        spectrum_bytes=spectra,
        published_buffer_bytes=buffers,
        architecture=architecture,
        detector=network if isinstance(network, DetectorConfig) else None,
        backbone=backbone,
        problem=problem,
        refusal=None if problem else _refusal(kind, layers),
        training_size=training_size(config) if architecture is not None else None,
        layers=tuple(reports),
        frequency_order=order,
        attention_stability=attention_stability(state),
        found=inference.found if inference else (),
        assumed=inference.assumed if inference else (),
        notes=inference.notes if inference else (),
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


def _layer(state: Shapes, layer: Layer, backbone: BackboneConfig | None) -> LayerReport:
    # Where a layer's tensors do not show it, the network's configuration does.
    assumed = backbone.conv.param_ratio if backbone and backbone.conv else 1
    ratio = layer.param_ratio or assumed
    return LayerReport(
        name=layer.name,
        dynamic=layer.dynamic,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel=layer.kernel,
        kernel_num=layer.attentions // ratio if layer.dynamic else None,
        parameters=parameters(part(state, f"{layer.name}.")),
        spectrum_bytes=ratio * layer.kept_bins * 2 * 4 if layer.dynamic else 0,
    )


def _parameters_by_part(state: Shapes) -> dict[str, int]:
    """Parameters under each first word of the names; bare backbones as ``backbone``."""
    bare = kind_of(state) in ("backbone", "classifier") and not backbone_prefix(state)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        first = key.split(".")[0]
        name = "backbone" if bare and first not in ("fc", "head", "cls_head") else first
        parts.setdefault(name, {})[key] = value
    return {name: parameters(tensors) for name, tensors in parts.items()} | {
        "total": parameters(state)
    }


def export_command(
    report: Report, options: Sequence[str] = (), size: tuple[int, int] | None = None
) -> str | None:
    """A command line that exports the inspected checkpoint, ready to be pasted.

    Args:
        report: of a file (`Report.path` is its path).
        options: those given to ``inspect`` that ``export`` needs too, such as ``--config``.
        size: (height, width) in pixels of the graph, where one is wanted.

    Returns:
        The command, or None where export would refuse the checkpoint.
    """
    if not report.ready:
        return None
    source = Path(report.path)
    words = ["fdconv", "export", str(source), "-o", f"{source.stem}_bundle", *options]
    if size or report.needs_size:
        height, width = size or report.training_size or (512, 512)
        words += ["--size", f"{height}x{width}"]
    return shlex.join(words)


_KINDS = {
    "segmentor": "segmentation network",
    "detector": "detector",
    "classifier": "classifier",
    "backbone": "backbone alone",
    "unknown": "unknown network",
}


def render(report: Report, console: Console, *, layers: bool = False) -> None:
    """Print a report: the verdict first, then settings found and assumed, and sizes.

    With ``layers`` the table of all FDConv layers, too.
    """
    _verdict(report, console)
    count = report.dynamic_layers
    fdconv = f"{count} FDConv layers" if count else "no FDConv layer"
    names = f"named as {report.framework}'s" if report.kind != "unknown" else "names not known"
    console.print(f"{_KINDS[report.kind]} {names}, {fdconv}; file format: {report.format}")
    console.print(f"{report.tensors} tensors, {', '.join(report.dtypes)}")
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    if report.attention_stability is not None and report.attention_stability.amplifies:
        console.print(f"[yellow]Unstable:[/yellow] {escape(report.attention_stability.advice)}")
    if report.frequency_order is not None:
        order = report.frequency_order
        if order.order:
            known = f"[bold]{order.order}[/bold]"
        elif order.saved:
            known = "as saved in the file"
        else:
            known = (
                "[yellow]unknown[/yellow], so that torch, the published one, will be assumed "
                "(--frequency-order of export gives another)"
            )
        console.print(f"Frequency order: {known}. {escape(' '.join(order.reasons))}")
    if report.other_weights:
        console.print(
            f"[yellow]Other weights in it:[/yellow] {escape(', '.join(report.other_weights))}. "
            f"To take them: --weights {escape(report.other_weights[0])}"
        )
    if report.dropped:
        console.print(f"Left out: {escape('; '.join(report.dropped))}")
    if report.found:
        console.print(_settings("Found in the file or given", report.found))
    if report.assumed:
        title = "Assumed, by published defaults (--set FIELD=VALUE, or --config, gives others)"
        console.print(_settings(title, report.assumed))
    if layers and report.dynamic_layers:
        console.print(_layers([layer for layer in report.layers if layer.dynamic]))
    console.print(_sizes(report))


def _verdict(report: Report, console: Console) -> None:
    """Whether it can be exported; if so by which command, of which classes, at which size."""
    name = escape(report.path or "state dict")
    if not report.ready:
        style = "bold red" if report.problem else "bold yellow"
        why = "Not understood" if report.problem else "fdconv export will refuse it"
        console.print(f"[{style}]Not ready to export:[/] [bold]{name}[/]", soft_wrap=True)
        console.print(f"[{style}]{why}:[/] {escape(report.problem or report.refusal or '')}")
        return
    console.print(f"[bold green]Ready to export:[/] [bold]{name}[/]", soft_wrap=True)
    if report.command:
        console.print(f"  {report.command}", markup=False, highlight=False, soft_wrap=True)
    network = report.architecture or report.detector
    if network is not None:
        head = network.bbox_head if isinstance(network, DetectorConfig) else network.decode_head
        names = f": {_short(network.classes)[1:-1]}" if network.classes else ", not named in it"
        console.print(f"Classes: {head.num_classes}{escape(names)}")
    console.print(f"Input size: {_input_size(report)}")


def _input_size(report: Report) -> str:
    if report.detector is not None:
        height, width = report.detector.published_size
        return f"{height}x{width}, as published; --size takes any other multiple of 32"
    if not report.needs_size:
        assert report.architecture is not None
        height, width = report.architecture.test.crop_size or (0, 0)
        return f"{height}x{width}, the crop it was tested by sliding over images"
    if report.training_size and report.architecture is not None:
        height, width = report.training_size
        divisor = report.architecture.preprocessing.size_divisor
        multiple = f" multiple of {divisor}" if divisor > 1 else ""
        return f"{height}x{width}, which it was trained at; --size takes any other{multiple}"
    return (
        "the file does not state what it was trained at; 512x512 is an example, and answers are "
        "best near the size of training"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, header_style="bold")


def _settings(title: str, settings: Iterable[Setting]) -> Table:
    table = _table(title)
    for column in ("field", "value", "from"):
        # Names stay whole: a reader copies them into --set.
        table.add_column(column, overflow="fold", no_wrap=column == "field")
    for setting in settings:
        value = _short(setting.value)
        value = f"{value}  ({setting.note})" if setting.note else value
        table.add_row(setting.field, escape(value), setting.source)
    return table


def _layers(layers: Sequence[LayerReport]) -> Table:
    # Without what all names begin with, a row fits in 80 columns.
    first = layers[0].name.split(".")[0] + "."
    shared = first if all(layer.name.startswith(first) for layer in layers) else ""
    table = _table(f"FDConv layers of {shared[:-1]}" if shared else "FDConv layers")
    table.add_column("layer", overflow="fold")
    for column in ("in", "out", "kernel", "kernel_num", "parameters", "spectrum"):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.name.removeprefix(shared),
            str(layer.in_channels),
            str(layer.out_channels),
            "×".join(map(str, layer.kernel)),
            str(layer.kernel_num),
            f"{layer.parameters:,}",
            f"{layer.spectrum_bytes / 1e6:.2f} MB",
        )
    return table


def _sizes(report: Report) -> Table:
    table = _table("Sizes")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    parts = dict(report.parameters)
    total = parts.pop("total")
    inside = report.fdconv_parameters if report.dynamic_layers else {}
    for name, count in [*parts.items(), *((f"  {name}", n) for name, n in inside.items())]:
        table.add_row(name, f"{count:,}")
    table.add_row("total", f"{total:,}", style="bold")
    if report.dynamic_layers:
        table.add_row("spectra", f"{report.spectrum_bytes / 1e6:,.1f} MB")
        published = f"{report.published_buffer_bytes / 1e6:,.1f} MB"
        table.add_row("published code's bin order and masks", published)
    return table


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_short(item) for item in value[:8])
        return f"({shown}{f', … {len(value)} in all' if len(value) > 8 else ''})"
    return f"{value:g}" if isinstance(value, float) else str(value)
