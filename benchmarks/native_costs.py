"""What a native session's nodes cost beside what they must: ``python -m benchmarks.native_costs``.

By kind of node: milliseconds on one thread, the multiply-adds and bytes that its sizes ask for, and
the least time those take at this machine's own rates, which are measured in the same run: products
in the cache, and bytes read or written from memory. The network beside its baseline, both in ONNX
Runtime; by default the R50 backbone at 512×512.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cases import add_case_arguments, named_case
from benchmarks.export_size import TOLERANCE
from benchmarks.options import keep, script
from fdconv_deploy.export import export_module
from fdconv_deploy.latency import machine
from fdconv_deploy.ops import OPSET
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.backends.onnxruntime import blocked_layout
from fdconv_deploy.runtime.blocked_graph import block_graph

KINDS = {
    "plain": "convolutions, constant kernels",
    "dynamic": "convolutions, FDConv's kernels",
    "FrequencyAssembly": "kernel assembly",
    "FrequencyBandModulation": "band modulation",
    "KernelAttention": "attention",
    "reorder": "reorders",
    "rest": "rest",
}
OURS = "FrequencyAssembly", "FrequencyBandModulation", "KernelAttention"
Shapes = list[list[int]]


def rates(seconds: float = 1.0) -> dict[str, float]:
    """Multiply-adds and bytes a second of one thread: the best of what fits into ``seconds``."""
    rng = np.random.default_rng(0)
    x = rng.random((1, 512, 512), dtype=np.float32)  # in a core's cache, and so is the constant
    product = onnxruntime.InferenceSession(
        _product(rng.random((512, 512), dtype=np.float32)), _options(),
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    source = rng.random(1 << 24, dtype=np.float32)  # 64 MB
    target = np.empty_like(source)
    tasks: dict[str, tuple[Callable[[], Any], float]] = {
        "products": (lambda: product.run(None, {"x": x}), 512.0**3),
        "bytes": (lambda: np.copyto(target, source), 2.0 * source.nbytes),
    }
    best = {}
    for name, (task, amount) in tasks.items():
        task()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
        best[name] = amount / min(times)
    return best


def _product(matrix: NDArray[np.float32]) -> bytes:
    node = helper.make_node("MatMul", ["x", "matrix"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    constant = numpy_helper.from_array(matrix, "matrix")
    graph = helper.make_graph([node], "product", values[:1], values[1:], [constant])
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def needed(kind: str, inputs: Shapes, outputs: Shapes, constants: int) -> tuple[float, float]:
    """Multiply-adds, and bytes read and written once, of a node.

    A transform of length n counts as 1.25·log2(n) multiply-adds a number; a band modulation as
    the products of its quartered matrices, its logits and its weighing.
    """
    size = [math.prod(shape) for shape in inputs]
    written = sum(math.prod(shape) for shape in outputs)
    moved = 4.0 * (size[0] + written) + constants
    if kind in ("plain", "dynamic"):
        weight = inputs[1]
        return float(math.prod(outputs[0]) * math.prod(weight[1:])), 4.0 * (sum(size) + written)
    if kind == "FrequencyAssembly":
        filters, channels, height, width = outputs[0]
        passes = 1.25 * (math.log2(filters * height) + math.log2(channels * width))
        taps = inputs[5][-1] / width if len(inputs) > 5 else 0
        # Half of the matrix lies inverted between the two halves of the work.
        return written * (passes + taps + 2), moved + 8.0 * written
    if kind == "FrequencyBandModulation":
        (_, channels, height, width), weights = inputs[0], inputs[1]
        plane = size[0] / channels
        columns, rows = inputs[5][1], inputs[6][0]
        count = plane * math.prod(weights[1:])  # the logits
        count += plane * columns / 4 + height * columns * rows / 4
        for back, on in zip(inputs[7::2], inputs[8::2], strict=True):
            count += back[1] * on[0] * height / 4 + on[0] * plane / 4 + plane
        return float(channels * (count + plane)), moved + 4.0 * size[0]
    if kind == "KernelAttention":
        return float(sum(size)), moved
    return 0.0, moved


def kind_of(event: dict[str, Any], inputs: Shapes) -> str:
    """What a profiled node is."""
    op = event["args"]["op_name"]
    if op in OURS:
        return op
    if "Conv" in op:
        constant = int(event["args"]["parameter_size"]) >= 4 * math.prod(inputs[1])
        return "plain" if constant else "dynamic"
    return "reorder" if op.startswith("Reorder") else "rest"


def profile(model: bytes, files: dict[str, Any], feeds: dict[str, Any], folder: Path, runs: int,
            library: Path | None) -> list[dict[str, Any]]:  # fmt: skip
    """Nodes in order: kind, shortest milliseconds of all runs, multiply-adds, bytes."""
    options = _options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.add_external_initializers_from_files_in_memory(
        list(files), list(files.values()), [len(data) for data in files.values()]
    )
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    seen = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    count = len(seen) // runs
    assert len(seen) == runs * count, "every run has the same nodes"
    nodes = []
    for number in range(count):
        same = seen[number::count]
        event = same[0]
        inputs, outputs = (
            [next(iter(shape.values())) for shape in event["args"][f"{side}_type_shape"]]
            for side in ("input", "output")
        )
        kind = kind_of(event, inputs)
        products, moved = needed(kind, inputs, outputs, int(event["args"]["parameter_size"]))
        nodes.append(
            {
                "kind": kind,
                "ms": min(e["dur"] for e in same) / 1000,
                "products": products,
                "bytes": moved,
            }
        )
    return nodes


def by_kind(nodes: Sequence[dict[str, Any]], rate: dict[str, float]) -> dict[str, Any]:
    """Sums by kind, and the least milliseconds: a node's products or its bytes, the longer."""
    sums: dict[str, Any] = {k: defaultdict(float) for k in KINDS}
    for node in nodes:
        total = sums[node["kind"]]
        total["nodes"] += 1
        for name in ("ms", "products", "bytes"):
            total[name] += node[name]
        total["least_ms"] += 1000 * max(
            node["products"] / rate["products"], node["bytes"] / rate["bytes"]
        )
    return {kind: dict(total) for kind, total in sums.items() if total}


def measure(case: Any, folder: Path, runs: int) -> dict[str, Any]:
    """Export both networks and profile them as `open_session` runs them: JSON."""
    library, why = native_library(True)
    block, problem = blocked_layout()
    if not block:
        raise SystemExit(f"No blocked layout here, since {problem}; {why}.")
    x, rate = case.images(), rates()
    result: dict[str, Any] = {"title": case.title, "case": case.as_dict(), "rates": rate}
    for name in ("fdconv", "plain"):
        network = case.make(dynamic=name == "fdconv")
        bundle = export_module(network, x, folder / name, tolerance=TOLERANCE)
        graph = bundle.manifest.models[case.batch]
        model, files = bytes(bundle.content(graph)), dict(bundle.external_data(graph))
        feeds = {bundle.manifest.inputs[case.batch][0].name: x.numpy()}
        if name == "fdconv":
            blocked = block_graph(model, files, block)
            assert blocked is not None
            model, files = blocked.model.SerializeToString(), blocked.files
        nodes = profile(model, files, feeds, folder, runs, library)
        result[name] = by_kind(nodes, rate)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    rate, plain = result["rates"], result["plain"]
    baseline = sum(row["ms"] for row in plain.values())
    print(
        f"{result['title']}, one thread; this machine: {rate['products'] / 1e9:.0f} G multiply-adds"
        f" and {rate['bytes'] / 1e9:.1f} GB a second"
    )
    for name in ("plain", "fdconv"):
        rows = result[name]
        total = sum(row["ms"] for row in rows.values())
        print(f"\n{name:32} nodes     ms  share  G mult.-adds     MB  at least ms")
        for kind, row in rows.items():
            print(
                f"{KINDS[kind]:32} {row['nodes']:5.0f} {row['ms']:6.1f} {row['ms'] / total:6.1%}"
                f" {row['products'] / 1e9:13.2f} {row['bytes'] / 1e6:6.0f} {row['least_ms']:12.1f}"
            )
        print(f"{'sum':32} {'':5} {total:6.1f}   {total / baseline:.2f}× the baseline")


def main() -> None:
    parser = script(__doc__, threads=False)
    add_case_arguments(parser)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    machine.warn_if_busy()
    with tempfile.TemporaryDirectory() as name:
        result = measure(named_case(options), Path(name), options.runs)
    show(result)
    keep(options, "native costs", machine.describe(1), result)


if __name__ == "__main__":
    main()
