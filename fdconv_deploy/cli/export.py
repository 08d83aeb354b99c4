"""``fdconv export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import (
    Checkpoint,
    Config,
    Json,
    Quiet,
    Settings,
    Size,
    Weights,
    parse_settings,
    parse_size,
)
from fdconv_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from fdconv_deploy.export.options import Activations, PrecisionName

err = Console(stderr=True)


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to make.")],
    size: Size = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="A batch size to make a graph for; may be repeated.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    frequency_order: Annotated[
        str,
        typer.Option(
            metavar="auto|torch|stable",
            help="auto: the one the weights tell, else torch. See inspect.",
        ),
    ] = "auto",
    mode: Annotated[
        str | None,
        typer.Option(metavar="whole|slide", help="If not as the network was tested."),
    ] = None,
    fit: Annotated[
        str,
        typer.Option(metavar="stretch|pad", help="How images of another shape are fitted."),
    ] = "stretch",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Compare on this image; may be repeated. Drawn scenes if none."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|fp16|int8", help="FDConv's kernels are made in fp32 in all of them."
        ),
    ] = "fp32",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error kept, relative to the largest value (1e-4; fp16: 2e-2, of each "
            "layer too). int8: largest share of pixels of another class (0.1)."
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Keep this module, or those of a pattern, in float32; may be repeated.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images to learn int8's ranges from."),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            metavar="unsigned|signed", help="Form of int8: ONNX Runtime's, or TensorRT's."
        ),
    ] = "unsigned",
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to compare fp16 or int8 answers with fp32's on; mean IoU where there "
            "is a NAME_labels.png.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle that is there.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle and prove the bundle equal to the network."""
    # All that can be refused without the network is refused before torch is imported.
    from fdconv_deploy.export.image_folders import Pictures
    from fdconv_deploy.export.options import batch_sizes, check_precision, check_size
    from fdconv_deploy.runtime import BundleWriter

    for option, given, choices in (
        ("--fit", fit, ("stretch", "pad")),
        ("--frequency-order", frequency_order, ("auto", "torch", "stable")),
        ("--precision", precision, ("fp32", "fp16", "int8")),
        ("--activations", activations, ("unsigned", "signed")),
    ):
        if given not in choices:
            expected = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
            raise typer.BadParameter(f"{option} is {expected}, not {given!r}.")
    overrides = parse_settings(settings)
    if mode is not None:
        if mode not in ("whole", "slide"):
            raise typer.BadParameter(f"--mode is 'whole' or 'slide', not {mode!r}.")
        overrides["test.mode"] = mode
    pixels = parse_size(size) if size else None
    if pixels is not None:
        check_size(pixels)
    batches = batch_sizes(batch or [1])
    for path in (checkpoint, config):
        if path is not None and not path.exists():
            raise CheckpointError(f"{path} does not exist. Check the path.")
    calibration = Pictures(calibrate) if calibrate is not None else ()
    evaluation = Pictures(evaluate) if evaluate is not None else ()
    check_precision(
        precision,
        tolerance=tolerance,
        keep_fp32=keep_fp32 or (),
        calibration=calibration,
        evaluation=evaluation,
        activations=activations,
    )
    pictures = Pictures(image or [])
    with BundleWriter(output, overwrite=overwrite):
        pass  # nothing is in the way, and the place can be written to

    from fdconv_deploy.export.api import export_checkpoint

    with err.status("starting", spinner="dots") as status:
        bundle = export_checkpoint(
            checkpoint,
            output,
            size=pixels,
            batches=batches,
            config=config,
            overrides=overrides,
            weights=weights,
            frequency_order=cast('Literal["auto", "torch", "stable"]', frequency_order),
            fit="stretch" if fit == "stretch" else "pad",
            pictures=pictures,
            precision=cast("PrecisionName", precision),
            tolerance=tolerance,
            keep_fp32=keep_fp32 or (),
            calibration=calibration,
            activations=cast("Activations", activations),
            evaluation=evaluation,
            masks=evaluation.masks() if isinstance(evaluation, Pictures) else None,
            overwrite=overwrite,
            progress=None if quiet or as_json else status.update,
        )
    if as_json:
        print(bundle.manifest.model_dump_json(indent=2))
    elif not quiet:
        _print_export(bundle)


def _print_export(bundle: Any) -> None:
    manifest = bundle.manifest
    same = "same objects" if manifest.kind == "detector" else "same class"
    table = Table("batch", "output", "error", "relative", same, title=Path(bundle.path).name)
    assert manifest.parity is not None
    for batch, outputs in manifest.parity.batches.items():
        for output in outputs:
            agreement = output.argmax_agreement
            table.add_row(
                str(batch),
                output.name,
                f"{output.max_abs:.1e}",
                f"{output.max_rel:.1e}",
                "" if agreement is None else f"{agreement:.4%}",
            )
    console = Console()
    console.print(table)
    for batch, found in manifest.graph["exactness"].items():
        for line in found["verdict"]:
            console.print(f"Batch {batch}: {line}", markup=False, highlight=False, soft_wrap=True)
    size = sum(f.bytes for f in manifest.files.values())
    console.print(
        f"{manifest.graph['fdconv_layers']} FDConv layers, {size / 1e6:.1f} MB, exported in "
        f"{manifest.graph['export_seconds']} s. Compared with {manifest.parity.reference}."
    )
    if manifest.precision != "fp32":
        _print_precision(console, manifest.precision, manifest.graph["precision"])
    height, width = manifest.input.height, manifest.input.width
    if manifest.kind == "detector":
        console.print(f"Images keep their proportions and are padded to {height}x{width}.")
    else:
        how = "stretched" if manifest.fit == "stretch" else "padded"
        console.print(f"Images of other proportions than {height}x{width} are {how} (see --fit).")
    if manifest.graph.get("frequency_order") == "stable":
        console.print("Frequency order: stable, not the published one (see fdconv inspect).")
    assumed = manifest.graph.get("assumed", {})
    if assumed:
        console.print(
            f"[yellow]Assumed[/], not in the checkpoint ({len(assumed)} in all; check "
            "them, and give --config or --set where they are wrong):"
        )
        console.print(", ".join(f"{name}={value}" for name, value in assumed.items()), markup=False)
    # What may be long or copied is not broken into lines.
    for line in (
        f"Bundle {bundle.digest} (sha256 of its manifest).",
        f"Next: fdconv segment {shlex.quote(str(bundle.path))} IMAGE -o results",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_precision(console: Console, name: str, report: dict[str, Any]) -> None:
    """What lower precision changed, and where most."""
    if name == "fp16":
        lost = report["flushed"] + report["subnormal"]
        console.print(
            f"fp16: {report['half_nodes']} nodes in float16, {report['single_nodes']} in float32; "
            f"{lost} of {report['values']} float16 weights too small for full precision, "
            f"{report['flushed']} of them now 0."
        )
    else:
        console.print(
            f"int8: {len(report['quantized'])} plain convolutions in eight bits, ranges from "
            f"{report['calibration_images']} images."
        )
    worst = ", ".join(f"{name} {report['layers'][name][0]:.1e}" for name in report["worst"])
    console.print(f"Furthest from float32: {worst} (of the layer's largest value).")
    found = report.get("evaluation")
    if found:
        console.print(
            f"Same class as float32: {found['argmax_agreement']:.4%} of the pixels of "
            f"{found['images']} images."
        )
        if "mean_iou" in found:
            console.print(
                f"Mean IoU of {found['labelled']} labelled images: {found['mean_iou']:.4f}, "
                f"float32 {found['mean_iou_fp32']:.4f} ({found['mean_iou_change']:+.4f})."
            )
