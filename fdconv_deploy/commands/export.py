"""``fdconv export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.commands.options import (
    Checkpoint,
    Config,
    Json,
    Quiet,
    Settings,
    Size,
    parse_settings,
    parse_size,
)

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
    mode: Annotated[
        str | None, typer.Option(help="whole or slide, if not as the network was tested.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="How images of another shape are fitted: stretch or pad.")
    ] = "stretch",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Compare on this image; may be repeated. Drawn scenes if none."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest error kept, relative to the largest logit.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle and prove the bundle equal to the network."""
    from export.pipeline import TOLERANCE, export_checkpoint
    from fdconv_deploy.runtime import read_image

    if fit not in ("stretch", "pad"):
        raise typer.BadParameter(f"--fit is 'stretch' or 'pad', not {fit!r}.")
    overrides = parse_settings(settings)
    if mode is not None:
        if mode not in ("whole", "slide"):
            raise typer.BadParameter(f"--mode is 'whole' or 'slide', not {mode!r}.")
        overrides["test.mode"] = mode
    pixels = parse_size(size) if size else None
    with err.status("starting", spinner="dots") as status:
        bundle = export_checkpoint(
            checkpoint,
            output,
            size=pixels,
            batches=batch or [1],
            config=config,
            overrides=overrides,
            fit="stretch" if fit == "stretch" else "pad",
            pictures=[read_image(path) for path in image or []],
            tolerance=TOLERANCE if tolerance is None else tolerance,
            overwrite=overwrite,
            progress=None if quiet or as_json else status.update,
        )
    if as_json:
        print(bundle.manifest.model_dump_json(indent=2))
    elif not quiet:
        _print_export(bundle)


def _print_export(bundle: Any) -> None:
    manifest = bundle.manifest
    table = Table("batch", "error", "relative", "same class", title=f"{bundle.path}")
    assert manifest.parity is not None
    for batch, outputs in manifest.parity.batches.items():
        for output in outputs:
            agreement = output.argmax_agreement
            table.add_row(
                str(batch),
                f"{output.max_abs:.1e}",
                f"{output.max_rel:.1e}",
                "" if agreement is None else f"{agreement:.4%}",
            )
    console = Console()
    console.print(table)
    size = sum(f.bytes for f in manifest.files.values())
    console.print(
        f"{manifest.graph['fdconv_layers']} FDConv layers, {size / 1e6:.1f} MB, exported in "
        f"{manifest.graph['export_seconds']} s. Compared with {manifest.parity.reference}."
    )
    height, width = manifest.input.height, manifest.input.width
    how = "stretched" if manifest.fit == "stretch" else "padded"
    console.print(f"Images of other proportions than {height}x{width} are {how} (see --fit).")
    assumed = manifest.graph.get("assumed", {})
    if assumed:
        console.print(
            f"[yellow]Assumed[/], because the file does not tell ({len(assumed)} fields; check "
            "them, and give --config or --set where they are wrong):"
        )
        console.print(", ".join(f"{name}={value}" for name, value in assumed.items()), markup=False)
    console.print(f"Next: fdconv segment {bundle.path} IMAGE -o results")
