"""Where an exported network's time goes in ONNX Runtime's CPU provider, by layer and part.

ONNX Runtime inlines function bodies, fuses nodes and changes layouts before it runs a graph, and
its profile then names nodes that the exported file does not have. So the graph is optimised
first and written down, every node in it gets a name and a part, and that graph is what is
profiled, without further optimisation.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto

from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling.layer_names import fdconv_layers, layer_names

PARTS = ("convolutions", "kernel assembly", "band modulation", "attention", "rest")
# Runs before those that count.
WARM_UP = 2
_OPERATORS = {"FrequencyAssembly": "kernel assembly", "FrequencyBandModulation": "band modulation"}
# ONNX Runtime's prefix of what was inside a function.
_INLINED = re.compile(r"_inlfunc_(FrequencyAssembly|FrequencyBandModulation)")
# What the exporter calls the nodes of a layer's convolution, a layer's prefix left out: the
# convolution, over tokens a product, or one per kernel row and their sum; shifts and scales of its
# output; reshapes.
_OF_CONVOLUTION = re.compile(
    r"(convolution|product|row\d+|kernel\.rows|kernel\.turned|output|input)([._/]|$)"
)
_CONVOLUTIONS = {"Conv", "FusedConv", "ConvTranspose", "QLinearConv", "ConvInteger"}


@dataclass(frozen=True)
class Cost:
    """What one node takes: its operator, part and layer, and the median of its runs."""

    name: str
    operator: str
    part: str
    layer: str
    milliseconds: float


@dataclass(frozen=True)
class LayerTimes:
    """A layer's name and its milliseconds by part; parts that it has none of are left out."""

    name: str
    milliseconds: dict[str, float]


class ProfiledGraph:
    """A graph that notes what each of its nodes takes. Profiling itself adds a few percent.

    Args:
        model: an exported graph.
        folder: for files that are left there.
        threads: CPU threads.
        library: of native operators, to run in place of the graph's own functions.
    """

    def __init__(
        self, model: Path, folder: Path, *, threads: int, library: Path | None = None
    ) -> None:
        self._optimised = optimise(model, folder, library)
        exported = onnx.load(str(model), load_external_data=False)
        self._parts = attribute(exported, self._optimised)
        self._layers = layer_names(exported, self._optimised)
        for number, node in enumerate(self._optimised.graph.node):
            node.name = f"n{number}"
        named = folder / "named.onnx"
        onnx.save(self._optimised, str(named))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.log_severity_level = 3
        # Between runs threads must sleep, or they would take others' cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(
            str(named), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Run once."""
        self._session.run(None, dict(feeds))

    def costs(self, warm_up: int = 0) -> list[Cost]:
        """Every node's median over the runs; none can follow.

        Args:
            warm_up: how many of the first runs do not count.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text())
        durations: defaultdict[str, list[float]] = defaultdict(list)
        for event in events:
            if event["name"].endswith("_kernel_time"):
                durations[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
        return [
            Cost(node.name, node.op_type, part, layer, statistics.median(spent[warm_up:]))
            for node, part, layer in zip(
                self._optimised.graph.node, self._parts, self._layers, strict=True
            )
            if (spent := durations.get(node.name))
        ]


def profile(
    model: Path,
    feeds: Mapping[str, np.ndarray],
    folder: Path,
    *,
    threads: int,
    runs: int = 10,
    library: Path | None = None,
) -> list[Cost]:
    """Every node's cost; see `ProfiledGraph` for the arguments.

    Args:
        runs: that count, after two that do not.
    """
    graph = ProfiledGraph(model, folder, threads=threads, library=library)
    for _ in range(runs + WARM_UP):
        graph.run(feeds)
    return graph.costs(WARM_UP)


def optimise(model: Path, folder: Path, library: Path | None = None) -> ModelProto:
    """The graph as ONNX Runtime would run it; its weights are written to ``folder``."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimised.bin"
    )
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath, load_external_data=False)


def attribute(exported: ModelProto, optimised: ModelProto) -> list[str]:
    """One of ``PARTS`` for each node of ``optimised``, which was made from ``exported``.

    Inside an FDConv layer: its two operators, its convolution, and the attention with the
    average before it. Outside: convolutions and the rest.
    """
    calls = {
        output: _OPERATORS[node.op_type.split("_")[0]]
        for node in exported.graph.node
        if node.domain == DOMAIN
        for output in node.output
    }
    layers = tuple(f"{name}." for name in fdconv_layers(exported))
    parts = [_named_part(node, calls, layers) for node in optimised.graph.node]
    return [part or "rest" for part in _spread(optimised, parts)]


def _named_part(node: NodeProto, calls: Mapping[str, str], layers: tuple[str, ...]) -> str | None:
    """The part by names of the node and its outputs, where the exporter's survive; or None."""
    for output in node.output:
        if inlined := _INLINED.match(output):
            return _OPERATORS[inlined[1]]
    if node.op_type in _CONVOLUTIONS:
        return "convolutions"
    for output in node.output:
        if output in calls:
            return calls[output]
    for name in (node.name.removeprefix("fused "), *node.output):
        for layer in layers:
            if name.startswith(layer):
                own = _OF_CONVOLUTION.match(name[len(layer) :])
                return "convolutions" if own else "attention"
    return None


def _spread(graph: ModelProto, parts: list[str | None]) -> list[str | None]:
    """Let nodes that only carry data to one part, such as changes of layout, belong to it."""
    readers: defaultdict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.graph.node):
        for name in node.input:
            readers[name].append(number)
    found = list(parts)
    for number in reversed(range(len(found))):
        node = graph.graph.node[number]
        if found[number] is None and node.op_type in ("ReorderInput", "ReorderOutput", "Transpose"):
            uses = {found[reader] for name in node.output for reader in readers[name]}
            if len(uses) == 1 and "convolutions" not in uses:
                (found[number],) = uses
    return found


def by_layer(costs: Sequence[Cost]) -> list[LayerTimes]:
    """Every layer's milliseconds by part, layers in the order in which they first run."""
    layers: dict[str, dict[str, float]] = {}
    for cost in costs:
        parts = layers.setdefault(cost.layer, {})
        parts[cost.part] = parts.get(cost.part, 0.0) + cost.milliseconds
    return [LayerTimes(name, parts) for name, parts in layers.items()]
