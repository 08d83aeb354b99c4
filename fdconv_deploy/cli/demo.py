"""``fdconv demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is made.")] = Path(
        "demo-output"
    ),
) -> None:
    """The whole way on the packaged checkpoint: export, verify, measure, serve."""
    from fdconv_deploy.demo.walkthrough import walk

    walk(output, Console())
