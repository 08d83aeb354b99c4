"""A checkpoint report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fdconv_deploy.checkpoints.evidence import Setting
from fdconv_deploy.checkpoints.exportability import needs_size
from fdconv_deploy.checkpoints.inspect import LayerReport, Report
from fdconv_deploy.config import SegmentorConfig

_KINDS = {
    "segmentor": "segmentation network",
    "detector": "detector",
    "classifier": "classifier",
    "backbone": "backbone alone",
    "unknown": "unknown network",
}


def render(report: Report, console: Console, *, layers: bool = False) -> None:
    """Print a report: the verdict first, then what was told and assumed, and sizes.

    Args:
        report: of :func:`inspect_checkpoint`.
        console: where to print.
        layers: print the table of all FDConv layers too.
    """
    _verdict(report, console)
    fdconv = (
        f"{report.dynamic_layers} FDConv layers" if report.dynamic_layers else "no FDConv layer"
    )
    console.print(f"{_KINDS[report.kind]}, {fdconv}; file format: {report.format}")
    console.print(f"{report.tensors} tensors, {', '.join(report.dtypes)}")
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    if report.attention_stability is not None and report.attention_stability.amplifies:
        console.print(f"[yellow]Unstable:[/yellow] {escape(report.attention_stability.advice)}")
    if report.frequency_order is not None:
        order = report.frequency_order
        known = (
            f"[bold]{order.order}[/bold]"
            if order.order
            else "as saved in the file"
            if order.saved
            else (
                "[yellow]not told[/yellow], so that torch, the published one, will be assumed "
                "(--frequency-order of export gives another)"
            )
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
        title = "Assumed: published defaults that nothing in the file confirms"
        console.print(_settings(title, report.assumed))
    if layers and report.dynamic_layers:
        console.print(_layers([layer for layer in report.layers if layer.dynamic]))
    console.print(_sizes(report))


def _verdict(report: Report, console: Console) -> None:
    """Whether it can be exported; if so by which command, of which classes, at which size."""
    name = escape(report.path or "state dict")
    if report.problem:
        console.print(f"[bold red]Not ready to export:[/] [bold]{name}[/]", soft_wrap=True)
        console.print(f"[bold red]Not understood:[/] {escape(report.problem)}")
        return
    if report.refusal:
        console.print(f"[bold yellow]Not ready to export:[/] [bold]{name}[/]", soft_wrap=True)
        console.print(f"[bold yellow]fdconv export will refuse it:[/] {escape(report.refusal)}")
        return
    console.print(f"[bold green]Ready to export:[/] [bold]{name}[/]", soft_wrap=True)
    if report.command:
        console.print(f"  {report.command}", markup=False, highlight=False, soft_wrap=True)
    network = report.architecture or report.detector
    if network is not None:
        count = (
            network.decode_head.num_classes
            if isinstance(network, SegmentorConfig)
            else network.bbox_head.num_classes
        )
        names = f": {_short(network.classes)[1:-1]}" if network.classes else ", not named in it"
        console.print(f"Classes: {count}{escape(names)}")
    console.print(f"Input size: {_input_size(report)}")


def _input_size(report: Report) -> str:
    if report.detector is not None:
        height, width = report.detector.published_size
        return f"{height}x{width}, as published; --size takes any other multiple of 32"
    if not needs_size(report):
        assert report.architecture is not None
        height, width = report.architecture.test.crop_size or (0, 0)
        return f"{height}x{width}, the crop it was tested by sliding over images"
    if report.training_size:
        height, width = report.training_size
        return f"{height}x{width}, which it was trained at; --size takes any other"
    return (
        "the file does not tell what it was trained at; 512x512 is an example, and answers are "
        "best near the size of training"
    )


def _settings(title: str, settings: Iterable[Setting]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
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
    title = f"FDConv layers of {shared}" if shared else "FDConv layers"
    table = Table(title=title.rstrip("."), title_justify="left", box=None, header_style="bold")
    table.add_column("layer", overflow="fold")
    for column in ("in", "out", "kernel", "kernel_num", "parameters", "spectrum", "MMAC"):
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
            "" if layer.macs is None else f"{layer.macs / 1e6:,.1f}",
        )
    return table


def _sizes(report: Report) -> Table:
    height, width = report.size
    table = Table(title="Sizes", title_justify="left", box=None, header_style="bold")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column(f"GMAC at {height}×{width}", justify="right")
    macs = report.macs or {}
    inside = {"main", *report.fdconv_parameters} if report.dynamic_layers else {"main"}
    names = dict.fromkeys([*report.parameters, *macs, *sorted(inside - {"main"})])
    for name in [*(n for n in names if n != "total"), "total"]:
        count = report.parameters.get(name, report.fdconv_parameters.get(name))
        if count is None and name not in macs:
            continue
        shown = "convolutions of the backbone" if name == "main" else name
        shown = f"  {shown}" if name in inside else shown
        table.add_row(
            shown,
            "" if count is None else f"{count:,}",
            f"{macs[name] / 1e9:,.3f}" if name in macs else "",
            style="bold" if name == "total" else None,
        )
    if report.dynamic_layers:
        mega = report.spectrum_bytes / 1e6
        table.add_row("spectra", f"{mega:,.1f} MB", "")
        published = report.published_buffer_bytes / 1e6
        table.add_row("published code's bin order and masks", f"{published:,.1f} MB", "")
    return table


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_short(item) for item in value[:8])
        return f"({shown}{f', … {len(value)} in all' if len(value) > 8 else ''})"
    return f"{value:g}" if isinstance(value, float) else str(value)
