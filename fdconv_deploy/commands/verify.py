"""``fdconv verify``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    how_it_ran,
    parse_settings,
    ran_by,
)
from fdconv_deploy.errors import ExportError, FDConvError

if TYPE_CHECKING:
    from export.verify import Verified
    from fdconv_deploy.runtime.manifest import CheckpointInfo


def verify(
    bundle: BundlePath,
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="Images; made-up inputs if none."),
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
        ran, how = ran_by(session), how_it_ran(session)
        digest = session.bundle.digest
        manifest = session.bundle.manifest
    allowed = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    checks = [_Check(result, allowed, manifest.precision == "int8") for result in results]
    if as_json:
        print(
            json.dumps([{**check.as_dict(), **how, "bundle": digest} for check in checks], indent=2)
        )
    else:
        table = Table("input", "output", "error", "relative", "same class", "allowed")
        for check in checks:
            table.add_row(*check.cells())
        Console().print(table)
        print(ran)
        print(f"Bundle {digest} (sha256 of its manifest).")
    worst = max(checks, key=lambda check: check.share)
    if not worst.holds:
        raise FDConvError(
            f"the bundle differs from the network: {worst.sentence()} "
            f"{_advice(manifest.checkpoint, checkpoint)}"
        )
    if not as_json:
        print(f"The bundle holds: {worst.sentence()}")


@dataclass(frozen=True)
class _Check:
    """One output of one input, and the limit it is held against.

    ``classes``: the share of positions of another class is limited, not the error.
    """

    result: Verified
    tolerance: float
    classes: bool

    @property
    def allowed(self) -> float:
        return self.tolerance if self.classes else self.tolerance * self.result.slack

    @property
    def found(self) -> float:
        parity = self.result.parity
        return 1 - (parity.argmax_agreement or 0) if self.classes else parity.max_rel

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed

    @property
    def share(self) -> float:
        """How much of its limit is used."""
        used = self.found if self.classes else self.result.distance
        if self.tolerance and not math.isnan(used):
            return used / self.tolerance
        return 0.0 if self.holds else math.inf

    def sentence(self) -> str:
        parity, source = self.result.parity, self.result.source
        what = (
            "of its positions have another class" if self.classes else "of its largest value away"
        )
        return (
            f"nearest to its limit is {parity.name} ({source}), {self.found:.1e} {what}; "
            f"{self.allowed:.0e} is allowed."
        )

    def cells(self) -> list[str]:
        parity = self.result.parity
        agreement = parity.argmax_agreement
        return [
            self.result.source,
            parity.name,
            f"{parity.max_abs:.1e}",
            f"{parity.max_rel:.1e}",
            "" if agreement is None else f"{agreement:.4%}",
            f"{self.allowed:.0e}",
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.result.source,
            "batch": self.result.batch,
            "output": self.result.parity.name,
            **self.result.parity.model_dump(exclude={"name"}),
            "allowed": self.allowed,
            "holds": self.holds,
        }


def _is_another(source: CheckpointInfo, checkpoint: Path) -> bool:
    from fdconv_deploy.runtime.bundle import sha256_of

    return source.sha256 != sha256_of(checkpoint)


def _advice(source: CheckpointInfo | None, checkpoint: Path) -> str:
    if source is not None and _is_another(source, checkpoint):
        return f"It was exported from another file than this one, {source.name}: compare with that."
    return "Export it again."
