"""What ONNX Runtime takes for the pieces a folded layer is built of.

``python -m benchmarks.primitives``. The export chooses between equal graphs by a few numbers
(`fdconv_deploy.folding.spectrum`, `fdconv_deploy.ops.frequency_assembly.function`,
``export/layers.py``); this prints the times those numbers stand for. Each family is interleaved,
medians of rounds; quote ratios within a family.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Arrays = dict[str, NDArray]
NUMBERS = 2_433_024  # of a 512→512, 3×3 layer's half spectrum
GENERATOR = np.random.default_rng(0)


def random(*shape: int) -> NDArray[np.float32]:
    return GENERATOR.standard_normal(shape, dtype=np.float32)


def runner(
    nodes: Sequence[NodeProto], feeds: Arrays, constants: Arrays, threads: int
) -> Callable[[], object]:
    """A graph of these nodes, from ``feeds`` to the last node's outputs."""
    graph = helper.make_graph(
        list(nodes),
        "piece",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in feeds.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in nodes[-1].output],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads of one graph that go on spinning after its run would slow the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    bound = session.io_binding()
    for name, array in feeds.items():
        bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        bound.bind_output(output.name)
    return lambda: session.run_with_iobinding(bound)


def operator(op: str, feeds: Arrays, constants: Arrays, threads: int, **attributes: object):
    """One operator: its inputs are the feeds, then the constants."""
    node = helper.make_node(op, [*feeds, *constants], ["y"], **attributes)
    return runner([node], feeds, constants, threads)


def stages(threads: int) -> dict[str, Callable]:
    """One transform stage of 2n × 2n over as many numbers: what `OVERHEAD` is fitted to."""
    cases = {}
    for wide in (8, 16, 24, 32, 48, 64, 96, 128):
        data, matrix = random(wide, NUMBERS // wide), random(wide, wide)
        node = helper.make_node("MatMul", ["a", "x"], ["y"])
        cases[f"2n = {wide}"] = runner([node], {"x": data}, {"a": matrix}, threads)
    return cases


def gathers(threads: int) -> dict[str, Callable]:
    """As many numbers gathered, in blocks: what `_cost` of the group blocks is fitted to."""
    cases = {}
    for length in (1, 2, 4, 8, 16):
        table = random(1, 8000, length)
        index = GENERATOR.integers(0, 8000, NUMBERS // 2 // length).astype(np.int32)
        cases[f"blocks of {length}"] = operator(
            "Gather", {"x": table}, {"i": index}, threads, axis=1
        )
    return cases


def averages(threads: int) -> dict[str, Callable]:
    x = {"x": random(1, 256, 128, 128)}
    axes = {"axes": np.array([2, 3])}
    return {
        "GlobalAveragePool": operator("GlobalAveragePool", x, {}, threads),
        "ReduceMean": operator("ReduceMean", x, axes, threads, keepdims=0),
    }


def band_maps(threads: int) -> dict[str, Callable]:
    x = {"x": random(1, 64, 128, 128)}
    return {
        "Conv 64→3, 3×3": operator("Conv", x, {"w": random(3, 64, 3, 3)}, threads, pads=[1] * 4),
        "its ConvTranspose": operator(
            "ConvTranspose", x, {"w": random(64, 3, 3, 3)}, threads, pads=[1] * 4
        ),
    }


def kernels(threads: int) -> dict[str, Callable]:
    """From (o, u, i, v) to a convolution of 512→512 at 16×16: in one piece, or by rows."""
    whole = [
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Conv", ["x", "t"], ["y"], pads=[1] * 4),
    ]
    rows = [helper.make_node("Split", ["r"], ["k0", "k1", "k2"], axis=1, num_outputs=3)]
    last = None
    for row, (begin, end) in enumerate(((0, 15), (0, 16), (1, 16))):
        rows += [
            helper.make_node("Slice", ["x", f"n{begin}", f"n{end}", "axis"], [f"x{row}"]),
            helper.make_node("Reshape", [f"k{row}", "shape"], [f"w{row}"]),
            helper.make_node(
                "Conv", [f"x{row}", f"w{row}"], [f"y{row}"], pads=[row == 0, 1, row == 2, 1]
            ),
        ]
        if last is not None:
            rows.append(helper.make_node("Add", [last, f"y{row}"], [f"s{row}"]))
        last = f"y{row}" if last is None else f"s{row}"
    numbers = {f"n{n}": np.array([n]) for n in (0, 1, 15, 16)}
    shape = {"axis": np.array([2]), "shape": np.array([512, 512, 1, 3])}
    x = {"x": random(1, 512, 16, 16)}
    return {
        "transposed, one convolution": runner(
            whole, x | {"k": random(512, 3, 512, 3)}, {}, threads
        ),
        "three convolutions by rows": runner(
            rows, x | {"r": random(512, 3, 1536)}, numbers | shape, threads
        ),
    }


FAMILIES: dict[str, Callable[[int], dict[str, Callable]]] = {
    "a transform stage, 2.4 million numbers": stages,
    "1.2 million numbers gathered": gathers,
    "averages of 256 × 128 × 128": averages,
    "three band maps at 128 × 128": band_maps,
    "kernels of 512→512, 3×3, and the convolution": kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    for title, family in FAMILIES.items():
        cases = family(options.threads)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(options.rounds + 3):
            for name, run in cases.items():
                run()  # so that this graph's threads are the ones awake
                start = time.perf_counter()
                run()
                if turn >= 3:
                    times[name].append(time.perf_counter() - start)
        print(title)
        for name, measured in times.items():
            print(f"  {name:30} {np.median(measured) * 1e3:7.2f} ms")


if __name__ == "__main__":
    main()
