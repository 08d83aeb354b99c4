"""``fdconv build``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import BundlePath, Json, Quiet, parse_counts
from fdconv_deploy.errors import FDConvError

HARDWARE: dict[str, Any] = {
    "none": "none",
    "same": "same_compute_capability",
    "ampere-plus": "ampere_plus",
}


def build(
    bundle: BundlePath,
    batch: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Of these batch sizes only; repeatable, or several as 1,4."),
    ] = None,
    plugins: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Run FDConv layers in this package's kernels."),
    ] = "auto",
    hardware: Annotated[
        Literal["none", "same", "ampere-plus"],
        typer.Option(
            help="GPUs that the engine shall run on: none but this model, any of the same compute "
            "capability, or Ampere and later.",
        ),
    ] = "none",
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Let later TensorRT of this major version run it. Slower."
        ),
    ] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let float32 products round to ten bits.")
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(metavar="MB", min=1, help="Most memory for one layer's work.")
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="TensorRT's optimization level: more takes longer."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest error against ONNX Runtime, relative to the largest value."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build even where a matching engine exists.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT engines of a bundle for this machine's GPU."""
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise FDConvError(f"--tolerance is a share, 0 or more, e.g. 1e-3; not {tolerance:g}.")
    from fdconv_deploy.runtime.backends.tensorrt import Cuda, import_tensorrt
    from fdconv_deploy.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    import_tensorrt()  # what is missing is said before anything large is loaded
    Cuda()
    from fdconv_deploy.export.tensorrt.builder import BuildOptions
    from fdconv_deploy.export.tensorrt.engine import build_engines

    err = Console(stderr=True)
    loud = not (quiet or as_json)
    built = build_engines(
        opened,
        batches=parse_counts(batch, "--batch") or None,
        plugins=plugins,
        options=BuildOptions(HARDWARE[hardware], version_compatible, tf32, workspace, effort),
        tolerance=tolerance,
        force=force,
        progress=(lambda step: err.print(step, markup=False, highlight=False)) if loud else None,
    )
    if as_json:
        rows = [
            {"new": b.new, "reason": b.reason, **b.record.model_dump(mode="json")} for b in built
        ]
        print(json.dumps(rows, indent=2))
    elif not quiet:
        table = Table("engine", "batch", "MB", "seconds", "error", "")
        for b in built:
            worst = max((o.max_rel for o in b.record.parity), default=0.0)
            table.add_row(
                b.record.name,
                str(b.record.batch),
                f"{b.record.file.bytes / 1e6:.0f}",
                f"{b.record.build_seconds:.0f}",
                f"{worst:.1e}",
                "built" if b.new else "was there",
            )
        Console().print(table)
