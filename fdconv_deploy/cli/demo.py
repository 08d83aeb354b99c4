"""``fdconv demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the bundle and pictures.")
    ] = Path("demo-output"),
) -> None:
    """Export, verify, score, time and serve the packaged checkpoint."""
    from fdconv_deploy.demo.walkthrough import walk

    walk(output, Console())
