"""The kernels of a ResNet-50's TensorRT engine, counted in the graph that it is built from.

    python -m benchmarks.gpu.tensorrt_kernels      # exports both networks, writes the record

TensorRT decides what it fuses on the GPU that it builds for. So there are two counts: one where it
fuses every pointwise operator and every copy into a neighbour, and one where each chain of
pointwise operators, and each copy, is a kernel. `benchmarks.gpu.arithmetic` puts both on its page.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from benchmarks.records import FOLDER, write_json
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.ops import DOMAIN

RECORD = FOLDER / "tensorrt-kernels.json"
# Of `tests.real_packages.cuda_toolkit.check`: the plugins' kernels at every GPU.
TARGETS = FOLDER / "ptxas.json"
NETWORKS = {"plain": None, "FDConv": 64}  # kernel_num
# No kernel at all; one that may be part of a neighbour's; everything else is one of its own.
FREE = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Constant"}
POINTWISE = {"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Cast"}
COPIES = {"Slice", "Split", "Concat", "Transpose"}
# Parts of an FDConv layer by what the nodes of a plugin variant do there.
PARTS = {
    "attention": {"ReduceMean", "Gemm", "LayerNormalization"},
    "bands": {"MatMul", "FrequencyBandCombination"},
    "assembly": {"FrequencyAssemblyRows", "FrequencyAssemblyColumns"},
}


def kernels(model: ModelProto) -> dict[str, Any]:
    """``nodes`` by operator without its form, and ``least`` and ``most`` kernels."""
    nodes = Counter(node.op_type.partition("_")[0] for node in model.graph.node)
    may_vanish = FREE | POINTWISE | COPIES
    least = sum(count for name, count in nodes.items() if name not in may_vanish)
    copies = sum(count for name, count in nodes.items() if name in COPIES)
    return {
        "nodes": dict(sorted(nodes.items())),
        "least": least,
        "most": least + copies + _chains(model),
    }


def _chains(model: ModelProto) -> int:
    """Groups of pointwise operators of which one reads another."""
    group: dict[str, int] = {}  # by value
    count, merged = 0, 0
    for node in model.graph.node:
        if node.op_type not in POINTWISE:
            continue
        met = {group[name] for name in node.input if name in group}
        if not met:
            count += 1
            met = {count}
        merged += len(met) - 1
        kept = min(met)
        group = {name: kept if of in met else of for name, of in group.items()}
        group[node.output[0]] = kept
    return count - merged


def plugin_nodes(model: ModelProto) -> list[dict[str, Any]]:
    """Distinct nodes that ask for a plugin: operator, sizes, and how many there are."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for node in model.graph.node:
        if node.domain == DOMAIN:
            (sizes,) = (a.ints for a in node.attribute if a.name == "sizes")
            found[node.op_type, tuple(sizes)] += 1
    return [
        {"operator": name, "sizes": list(sizes), "count": count}
        for (name, sizes), count in found.items()
    ]


def count(folder: Path) -> dict[str, Any]:
    """The record: the graphs of a ResNet-50 backbone, 512×512, batch 1, float16, to TensorRT."""
    from benchmarks.gpu.networks import SIZE, LastFeature, pictures
    from benchmarks.networks import backbone, trained_like
    from fdconv_deploy.export import export_module
    from fdconv_deploy.nn import ResNet

    images = pictures(6, 128)
    record: dict[str, Any] = {}
    for name, groups in NETWORKS.items():
        network = trained_like(LastFeature(ResNet(backbone(50, groups))), images=images)
        made = export_module(network, pictures(1, SIZE), folder / name, precision="fp16")
        model = onnx.load(str(made.model_path(1)))
        if groups is not None:
            model = ask_for_plugins(model).model
            record["plugins"] = plugin_nodes(model)
        record[name] = kernels(model)
    return record


def table(record: dict[str, Any]) -> str:
    """Both networks' kernels, and FDConv's by part."""
    lines = ["| | plain | FDConv |", "|---|---:|---:|"]
    for part, names in PARTS.items():
        cells = [sum(record[n]["nodes"].get(o, 0) for o in names) for n in NETWORKS]
        lines.append(f"| {part} | {cells[0] or ''} | {cells[1]} |")
    for what, key in (("all, at least", "least"), ("all, at most", "most")):
        lines.append(f"| {what} | {record['plain'][key]} | {record['FDConv'][key]} |")
    return "\n".join(lines)


def target_table(record: dict[str, Any]) -> str:
    """Registers of a thread, and the most shared memory of a program, by GPU and kernel."""
    names = list(next(iter(record["targets"].values()))["kernels"])
    heads = ["GPU", "instruction set", *(f"`{name}`" for name in names), "spilled bytes"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(names) + 1) + "|"]
    for capability, row in sorted(record["targets"].items(), key=lambda one: int(one[0])):
        cells = [f"sm_{capability}", row["ptx"]]
        for name in names:
            of = row["kernels"][name]
            low, high = of["registers"]
            cells.append(f"{low} to {high}, {of['shared'] / 1024:.1f} KB")
        cells.append(str(sum(of["spilled"] for of in row["kernels"].values())))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_json(RECORD, count(Path(folder)))
    print(f"wrote {RECORD}; now python -m benchmarks.gpu.arithmetic --page")


if __name__ == "__main__":
    main()
