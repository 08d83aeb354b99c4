"""Draw docs/bench.png anew: the page of ``fdconv bench --html`` on the packaged network.

python -m benchmarks.bench_page docs/bench.png

Wants a quiet machine, and Chromium to take the picture with.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.export import export_checkpoint
from fdconv_deploy.export.options import Pictures

SIZE = (384, 512)
WINDOW = "1000,2130"  # pixels: width, height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = Pictures([image for image, _ in held_out()])
        for precision in ("fp32", "fp16", "int8"):
            export_checkpoint(
                packaged_checkpoint(),
                folder / f"streets-{precision}",
                size=SIZE,
                precision=precision,
                calibration=images if precision == "int8" else (),
            )
        page = folder / "report.html"
        targets = [*sorted(folder.iterdir()), packaged_checkpoint()]
        command = [sys.executable, "-m", "fdconv_deploy", "bench", *targets, "--html", page, "-q"]
        subprocess.run(command, check=True)
        picture = f"--screenshot={options.picture.resolve()}"
        settings = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}"]
        subprocess.run([options.browser, *settings, picture, page.as_uri()], check=True)


if __name__ == "__main__":
    main()
