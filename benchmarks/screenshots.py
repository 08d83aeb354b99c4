"""Pictures of an HTML page in Chromium: ``python -m benchmarks.screenshots REPORT.html FOLDER``.

Light and dark, wide and as on a phone, and as printed from a dark screen.
Fails where the page asks for anything outside itself or runs over the phone's width.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"wide": 1000, "phone": 390}
PAPER = {"width": 794, "height": 1123}  # A4 at 96 pixels an inch


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright, without a network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=find_browser(),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


def take(page: Path, folder: Path, *, whole: bool = True) -> list[Path]:
    """Write ``NAME-SCHEME-WIDTH.png`` of every kind and ``NAME-print.png``; their paths.

    :raises ValueError: the page fetches something, or is wider than a phone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with browser() as opened:
        for scheme in ("light", "dark"):
            for name, width in WIDTHS.items():
                context = opened.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                asked: list[str] = []
                tab = context.new_page()
                tab.on("request", lambda request, asked=asked: asked.append(request.url))
                tab.goto(page.resolve().as_uri())
                if len(asked) != 1:
                    raise ValueError(f"{page} asks for {asked[1:]}")
                over = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
                if over > 0:
                    raise ValueError(f"{page} is {over} pixels wider than {width}")
                file = folder / f"{page.stem}-{scheme}-{name}.png"
                tab.screenshot(path=file, full_page=whole)
                written.append(file)
                context.close()
        context = opened.new_context(viewport=PAPER, color_scheme="dark")
        tab = context.new_page()
        tab.goto(page.resolve().as_uri())
        tab.emulate_media(media="print")
        file = folder / f"{page.stem}-print.png"
        tab.screenshot(path=file, full_page=whole)
        written.append(file)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", action="store_true", help="only what fits on a screen")
    options = parser.parse_args()
    if find_browser() is None:
        sys.exit("no Chromium is installed (apt-get install chromium)")
    print(*take(options.page, options.folder, whole=not options.top), sep="\n")


if __name__ == "__main__":
    main()
