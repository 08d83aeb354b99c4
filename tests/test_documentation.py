"""Command lines anywhere in the documentation are ones that ``fdconv`` takes.

Pages with tests of their own have theirs run as well.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fdconv_deploy.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("examples/*/*.md")]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
LINE = re.compile(r"^(?:\$ )?fdconv ((?:.*\\\n)*.*)$", re.M)
LINES = [
    (page.name, line.replace("\\\n", " "))
    for page in PAGES
    for block in FENCED.findall(page.read_text(encoding="utf-8"))
    for line in LINE.findall(block)
]


def test_there_are_lines() -> None:
    assert {"README.md", "detect.md", "evaluate.md", "serving.md", "tensorrt.md"} <= {
        page for page, _ in LINES
    }


@pytest.mark.parametrize(("page", "line"), LINES)
def test_is_taken(page: str, line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    # Parses, and refuses what is no option or misses an argument; runs nothing.
    command.make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link
