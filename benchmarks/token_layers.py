"""What FDConv in a transformer's FFNs costs, layer by layer: ``python -m benchmarks.token_layers``.

Each linear layer of Swin-L's four FFNs as FDConv over the tokens of one image: seconds and memory
to fold it, the size of the constants of its inverse transform, in the stages that are folded and
as one dense matrix for the rows; then the exported layer beside a plain linear one in ONNX
Runtime, as it is and with native operators where they are built, taking turns. On a busy machine
``--clock processor`` counts the processor's time, which stands still while others run.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.options import keep, script
from benchmarks.timing import interleave, spread
from fdconv_deploy.export import export_module
from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.latency import Clock, machine
from fdconv_deploy.nn import FDTokenConv
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime import Session, open_session

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
WIDTHS = (192, 384, 768, 1536)


def layer_of(features: tuple[int, int], kernel_num: int) -> FDTokenConv:
    """With attentions that differ from image to image, as trained ones do."""
    torch.manual_seed(0)
    layer = FDTokenConv(*features, kernel_num=kernel_num).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "_fc." in name or name.startswith("KSM_Local.conv"):
                parameter.normal_(0, 0.1)
    return layer


def transform_costs(folded: FoldedConv) -> dict[str, float]:
    """Millions of multiplications and megabytes of constants, staged, and with dense rows."""
    assert folded.spectrum is not None
    columns, rows = folded.spectrum.column_transform, folded.spectrum.row_transform
    half = 2 * columns.length * rows.slots.size
    kernel = rows.length * columns.length
    by_column = half * sum(stage.shape[2] for stage in columns.stages)
    by_row = half * sum(stage.shape[2] for stage in rows.stages) + kernel * rows.outer.shape[1]
    in_columns = sum(stage.size for stage in columns.stages)
    in_rows = sum(stage.size for stage in rows.stages) + rows.outer.size
    return {
        "multiplications": (by_column + by_row) / 1e6,
        "constants_mb": 4e-6 * (in_columns + in_rows),
        "dense_multiplications": (by_column + kernel * 2 * (rows.length // 2 + 1)) / 1e6,
        "dense_constants_mb": 4e-6 * (in_columns + rows.length * 2 * (rows.length // 2 + 1)),
    }


def folding(layer: FDTokenConv, tokens: int) -> tuple[FoldedConv, dict[str, float]]:
    """The folded layer; seconds of CPU time, and the most memory that numpy held, in megabytes."""
    start = time.process_time()
    folded = fold_layer(layer, (tokens, 1), name="layer")
    seconds = time.process_time() - start
    tracemalloc.start()
    fold_layer(layer, (tokens, 1), name="layer")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return folded, {"fold_seconds": seconds, "fold_mb": most / 1e6}


def running(
    layer: FDTokenConv, tokens: int, threads: int, rounds: int, clock: Clock
) -> dict[str, Any]:
    """Milliseconds of one image, and the exported layer's error, of the largest value."""
    x = torch.randn(1, tokens, layer.in_channels)
    plain = nn.Linear(layer.in_channels, layer.out_channels).eval()
    native, _ = native_library()
    with tempfile.TemporaryDirectory() as folder:
        made = {"plain": plain, "portable": layer}
        for name, module in made.items():
            export_module(nn.Sequential(module).eval(), x, Path(folder) / name)

        def opened(name: str, use_native: bool) -> Session:
            backend = "onnxruntime-cpu"
            return open_session(Path(folder) / name, backend, threads=threads, native=use_native)

        sessions = {name: opened(name, use_native=False) for name in made}
        if native is not None:
            sessions["native"] = opened("portable", use_native=True)
        feed = {"input": x.numpy()}
        calls = {name: lambda s=s: s.run_raw(feed) for name, s in sessions.items()}
        taken = interleave(calls, rounds=rounds, clock=clock)
        with torch.no_grad():
            expected = layer.double()(x.double()).numpy()
        errors = {
            name: float(np.abs(call()["output"] - expected).max() / np.abs(expected).max())
            for name, call in calls.items()
            if name != "plain"
        }
        for session in sessions.values():
            session.close()
    return {
        "ms": {name: spread(values) for name, values in taken.items()},
        "times_plain": {
            name: float(np.median(np.divide(values, taken["plain"])))
            for name, values in taken.items()
            if name != "plain"
        },
        "errors": errors,
    }


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("--size", type=int, default=640, help="height and width of the image")
    parser.add_argument("--kernel-num", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    machine.warn_if_busy()
    where = machine.describe(options.threads)
    torch.set_num_threads(options.threads)
    layers = []
    for stage, width in enumerate(WIDTHS):
        tokens = (options.size // 4 // 2**stage) ** 2
        for features in ((width, 4 * width), (4 * width, width)):
            layer = layer_of(features, options.kernel_num)
            folded, found = folding(layer, tokens)
            found |= transform_costs(folded)
            ran = running(layer, tokens, options.threads, options.rounds, CLOCKS[options.clock])
            layers.append({"features": features, "tokens": tokens, **found, **ran})
            print(
                f"{features[0]:5}→{features[1]:<5} {tokens:6} tokens: fold "
                f"{found['fold_seconds']:.1f} s, {found['fold_mb']:.0f} MB; transform "
                f"{found['multiplications']:.0f} M multiplications, {found['constants_mb']:.1f} MB "
                f"(dense rows {found['dense_multiplications']:.0f} M, "
                f"{found['dense_constants_mb']:.0f} MB); "
                + ", ".join(
                    f"{name} {ms['median']} ms"
                    + (f" ({ran['times_plain'][name]:.2f}×)" if name != "plain" else "")
                    for name, ms in ran["ms"].items()
                )
                + f"; error {max(ran['errors'].values()):.1e}",
                flush=True,
            )
    keep(
        options,
        "token-layers",
        where,
        {"size": options.size, "clock": options.clock, "layers": layers},
    )


if __name__ == "__main__":
    main()
