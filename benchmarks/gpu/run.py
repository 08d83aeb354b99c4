"""The body of `benchmarks/gpu.sh`: environment, kernels, networks; one JSON record.

Kernels first, then the networks that matter most, then the rest as long as time is left. What
fails or does not fit is recorded with its reason, never left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after this")
    parser.add_argument("--output", type=Path, default=None, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, no GPU")
    return parser.parse_args()


def environment() -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
        found["providers"] = onnxruntime.get_available_providers()
    except ImportError:
        found["onnxruntime"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return found


class Record:
    """What has been found so far, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.start, self.seconds = time.monotonic(), options.seconds
        self.content: dict[str, Any] = {
            "date": date.today().isoformat(),
            "dry_run": options.dry_run,
            "environment": environment(),
            "kernels": [],
            "networks": [],
            "not_run": [],
        }

    def attempt(self, what: str, run: Callable[[], None]) -> None:
        """Run one part, or say why not."""
        if time.monotonic() - self.start > self.seconds:
            reason = f"no time left of {self.seconds:.0f} s"
        else:
            try:
                run()
            except Exception as e:
                reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            else:
                return
        self.content["not_run"].append({"what": what, "reason": reason[:300]})
        print(f"  {what}: not run ({reason[:120]})", flush=True)

    def write(self, folder: Path) -> Path:
        name = self.content["environment"].get("gpu", "dry-run")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.content['date']}-gpu-{slug}.json"
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)
        return path


def table(record: dict[str, Any]) -> None:
    """The short form, to standard output."""
    kernels = record["kernels"]
    if kernels:
        print(f"\n{'layer':16}{'batch':>6}{'type':>9}{'rows µs':>9}{'columns':>9}", end="")
        print(f"{'floor':>8}{'share':>7}{'error':>10}")
        for row in kernels:
            us = row["us"]
            print(f"{row['layer']:16}{row['batch']:6}{row['dtype']:>9}{us['rows']:9.1f}", end="")
            print(f"{us['columns']:9.1f}{row['floor_us']:8.1f}{row['share']:7.0%}", end="")
            print(f"{row['error']:10.1e}")
    if record["networks"]:
        print(f"\n{'network':46}{'type':>9}{'batch':>6}{'ms':>9}{'images/s':>10}{'error':>10}")
        for row in record["networks"]:
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            print(f"{row['backend']:46}{row['dtype']:>9}{row['batch']:6}{row['ms']:9.3f}", end="")
            print(f"{row['batch'] / row['ms'] * 1e3:10.1f}{error:>10}")


def main() -> None:
    options = arguments()
    if options.dry_run:
        # Before Triton is first imported, which reads it once.
        os.environ["TRITON_INTERPRET"] = "1"
    from fdconv_deploy.errors import BackendError
    from fdconv_deploy.folding.cuda import require_cuda

    if not options.dry_run:
        try:
            require_cuda()
        except BackendError as e:
            sys.exit(f"error: {e}\nTo see that this script works, run it with --dry-run.")
    from benchmarks.gpu.kernels import measure_kernels
    from benchmarks.gpu.networks import measure_networks

    record = Record(options)
    print(json.dumps(record.content["environment"], indent=1))
    measure_kernels(record, dry=options.dry_run)
    measure_networks(record, dry=options.dry_run)
    table(record.content)
    root = Path(__file__).parents[1] / "results"
    folder = options.output or Path(os.environ.get("OUT") or root)
    print(f"\n{record.write(folder)}")


if __name__ == "__main__":
    main()
