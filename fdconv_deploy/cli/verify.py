"""``fdconv verify``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from fdconv_deploy.cli.options import (
    Backend,
    BundlePath,
    Checkpoint,
    Config,
    Json,
    Settings,
    Weights,
    how_it_ran,
    parse_settings,
    ran_by,
    require_files,
)
from fdconv_deploy.errors import ExportError, FDConvError

if TYPE_CHECKING:
    from fdconv_deploy.export.validation.verdict import Finding
    from fdconv_deploy.runtime import Bundle


def verify(
    bundle: BundlePath,
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="Images to compare on. Default: packaged pictures."),
    ] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error accepted, relative to the largest value (int8: largest share of "
            "positions of another class). Default: what export accepts at this precision."
        ),
    ] = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch network: the whole on each image, and every layer."""
    if tolerance is not None and not tolerance >= 0:
        raise FDConvError(f"the tolerance must be 0 or more, got {tolerance}.")
    from fdconv_deploy.runtime import open_session

    overrides = parse_settings(settings)
    require_files(checkpoint, config)
    with open_session(bundle, backend) as session:
        pictures = [(path.name, session.read_image(path)) for path in images or ()]
        # With torch, which takes seconds to import: after what is quickly refused.
        from fdconv_deploy.export.validation.verdict import refusal
        from fdconv_deploy.export.validation.verify import load_exported, verify_bundle

        try:
            network = load_exported(
                session, checkpoint, config=config, overrides=overrides, weights=weights
            )
            verdicts = verify_bundle(session, network, pictures, tolerance=tolerance)
        except ExportError as error:
            # Another network, or answers of another form: no wonder, where it is another file.
            raise ExportError(f"{error} {_advice(session.bundle, checkpoint)}".rstrip()) from error
        findings = [finding for verdict in verdicts for finding in verdict.whole]
        if as_json:
            how = {**how_it_ran(session), "bundle": session.bundle.digest}
            print(json.dumps([{**_as_dict(finding), **how} for finding in findings], indent=2))
        else:
            rows = (finding.as_dict() for finding in findings)
            Console().print(findings_table(rows, detects=session.detects))
            print(ran_by(session))
            print(f"Bundle {session.bundle.digest} (sha256 of its manifest).")
            if network.weights:
                print(f"Weights of the checkpoint: {network.weights}.")
            for verdict in verdicts:
                print(*verdict.sentences(), sep="\n")
    for verdict in verdicts:
        if not verdict.equal:
            message = refusal(verdict, "the bundle")
            raise FDConvError(f"{message} {_advice(session.bundle, checkpoint)}".rstrip())
        # Layer by layer it is the network; but the tolerance given is about the whole.
        if tolerance is not None and not verdict.conclusive:
            worst = max(verdict.whole, key=lambda finding: finding.below_float32)
            found = f"{worst.part} ({worst.source}) errs by {worst.figures()}"
            if worst.below_float32:
                raise FDConvError(
                    f"the tolerance of {tolerance:.0e} is below what float32 itself can tell: "
                    f"{found}. Give --tolerance {1.5 * worst.least_tolerance:.0e} or more, or "
                    "leave it out."
                )
            raise FDConvError(
                f"no input can tell at a tolerance of {tolerance:.0e}: {found}. Leave --tolerance "
                "out, and layers are judged where the whole cannot be."
            )


def _advice(bundle: Bundle, checkpoint: Path) -> str:
    from fdconv_deploy.checkpoints.reading import digest_of

    source = bundle.manifest.checkpoint
    if source is None or source.sha256 == digest_of(checkpoint):
        return ""
    return f"It was exported from another file than this one, {source.name}: compare with that."


def _as_dict(finding: Finding) -> dict[str, Any]:
    parity = finding.parity
    errors = dict.fromkeys(("max_abs", "max_rel", "argmax_agreement"))
    return {
        "output": finding.part,
        **(errors if parity is None else parity.model_dump(exclude={"name"})),
        **finding.as_dict(),
        "holds": finding.outcome != "differs",
    }


def findings_table(found: Iterable[dict[str, Any]], *, detects: bool) -> Table:
    """What was `found` on the whole; "float32" is what rounding alone costs there."""
    same = "same objects" if detects else "same class"
    columns = "output", "error", "allowed", "float32", same, ""
    table = Table(Column("input", overflow="fold"), *columns)
    for one in found:
        agreement = one.get("argmax_agreement")
        table.add_row(
            one["source"] + (f", batch {one['batch']}" if one["batch"] > 1 else ""),
            one["part"],
            "other objects" if one["error"] is None else f"{one['error']:.1e}",
            f"{one['allowed']:.0e}",
            "" if one["rounding"] is None else f"{one['rounding']:.1e}",
            "" if agreement is None else f"{agreement:.4%}",
            one["outcome"],
        )
    return table
