"""``fdconv verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.commands.options import (
    Backend,
    BundlePath,
    Checkpoint,
    Config,
    Json,
    Settings,
    parse_settings,
)
from fdconv_deploy.errors import ExportError, FDConvError

if TYPE_CHECKING:
    from fdconv_deploy.runtime.manifest import CheckpointInfo


def verify(
    bundle: BundlePath,
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images; made-up inputs if none.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error allowed, relative to the largest value (int8: largest share of "
            "positions of another class); what export allows at this precision if not given."
        ),
    ] = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch network, image by image."""
    if tolerance is not None and not tolerance >= 0:
        raise FDConvError(f"the tolerance must be 0 or more, got {tolerance}.")
    from export.checks import TOLERANCES
    from export.verify import verify_bundle
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.runtime import open_session, read_image

    with open_session(bundle, backend) as session:
        # Which order the weights are in was decided at export, maybe by the user.
        order = session.bundle.manifest.graph.get("frequency_order")
        network = load_checkpoint(
            checkpoint,
            config=config,
            overrides=parse_settings(settings),
            frequency_order=order if order in ("torch", "stable") else "auto",
            require_fdconv=False,
        )
        pictures = [(path.name, read_image(path)) for path in images or []]
        try:
            results = verify_bundle(session, network, pictures)
        except ExportError as error:
            # Other objects, or another network: no wonder, where it is another file.
            source = session.bundle.manifest.checkpoint
            if source is None or not _is_another(source, checkpoint):
                raise
            raise ExportError(f"{error} {_advice(source, checkpoint)}") from error
    if as_json:
        rows = [
            {
                "source": r.source,
                "batch": r.batch,
                "output": r.parity.name,
                **r.parity.model_dump(exclude={"name"}),
            }
            for r in results
        ]
        print(json.dumps(rows, indent=2))
    else:
        table = Table("input", "output", "error", "relative", "same class")
        for r in results:
            agreement = r.parity.argmax_agreement
            table.add_row(
                r.source,
                r.parity.name,
                f"{r.parity.max_abs:.1e}",
                f"{r.parity.max_rel:.1e}",
                "" if agreement is None else f"{agreement:.4%}",
            )
        Console().print(table)
    manifest = session.bundle.manifest
    allowed = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    if manifest.precision == "int8":
        worst = max(1 - (r.parity.argmax_agreement or 0) for r in results)
        what = "of the positions have another class"
    else:
        worst = max(r.distance for r in results)
        what = "of the largest value is how far it is"
    if not worst <= allowed:
        raise FDConvError(
            f"the bundle differs from the network: {worst:.1e} {what}; {allowed:.0e} is allowed. "
            f"{_advice(manifest.checkpoint, checkpoint)}"
        )
    if not as_json:
        Console().print(f"The bundle holds: {worst:.1e} {what}; {allowed:.0e} is allowed.")


def _is_another(source: CheckpointInfo, checkpoint: Path) -> bool:
    from fdconv_deploy.runtime.bundle import sha256_of

    return source.sha256 != sha256_of(checkpoint)


def _advice(source: CheckpointInfo | None, checkpoint: Path) -> str:
    if source is not None and _is_another(source, checkpoint):
        return f"It was exported from another file than this one, {source.name}: compare with that."
    return "Export it again."
