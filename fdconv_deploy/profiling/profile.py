"""Where a network's time goes on a CPU, by layer and part: in ONNX Runtime and in PyTorch.

ONNX Runtime inlines function bodies, fuses nodes and changes layouts before it runs a graph, and
its profile then names nodes that the exported file does not have. So the graph is optimised
first and written down, every node in it gets a name, a layer and a part, and that graph is what is
profiled, without further optimisation.

In PyTorch one clock runs all the time and is switched to another layer and part at every boundary,
so the parts add up to the whole. What runs between two convolutions (normalisation, activation, an
addition) goes with the first of them, as in an exported graph, where most of it is folded into
that convolution.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto

from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling import WARM_UP, LayerTime, enclosing_layer, fdconv_layers, label_nodes

if TYPE_CHECKING:
    from torch import Tensor, nn

BEFORE = "before the first convolution"
NOWHERE = "elsewhere"
_OPERATORS = {"FrequencyAssembly": "kernel assembly", "FrequencyBandModulation": "band modulation"}
# ONNX Runtime's prefix of what was inside a function.
_INLINED = re.compile(r"_inlfunc_(FrequencyAssembly|FrequencyBandModulation)")
# What ONNX Runtime adds to names: for fusing, float16 on a CPU, and layouts.
_ADDED = re.compile(r"^(fused )?(InsertedPrecisionFreeCast_)?|_nchwc$")
# What the exporter calls the nodes of a layer's convolution, a layer's prefix left out: the
# convolution, over tokens a product, or one per kernel row and their sum; shifts and scales of its
# output; reshapes.
_OF_CONVOLUTION = re.compile(
    r"(convolution|product|row\d+|kernel\.rows|kernel\.turned|output|input)([._/]|$)"
)
_CONVOLUTIONS = {"Conv", "FusedConv", "ConvTranspose", "QLinearConv", "ConvInteger"}
_CARRIERS = {"ReorderInput", "ReorderOutput", "Transpose"}
Place = tuple[str, str]


class ProfiledGraph:
    """An exported graph that notes what its nodes take; profiling itself adds a few percent.

    Files are left in ``folder``. ``library`` has native operators, to run in place of the graph's
    own functions.
    """

    def __init__(
        self, model: Path, folder: Path, *, threads: int, library: Path | None = None
    ) -> None:
        optimised = optimise(model, folder, library)
        self._places = attribute(onnx.load(str(model), load_external_data=False), optimised)
        for number, node in enumerate(optimised.graph.node):
            node.name = f"n{number}"
        named = folder / "named.onnx"
        onnx.save(optimised, str(named))
        options = _options(library)
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        # Between runs threads must sleep, or they would take others' cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(
            str(named), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Run once."""
        self._session.run(None, dict(feeds))

    def layers(self) -> list[LayerTime]:
        """Layers in the order they run: medians over the runs after the first two; none follow."""
        events = json.loads(Path(self._session.end_profiling()).read_text())
        durations: defaultdict[str, list[float]] = defaultdict(list)
        for event in events:
            if event["name"].endswith("_kernel_time"):
                durations[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
        spent: defaultdict[Place, float] = defaultdict(float)
        for number, place in enumerate(self._places):
            if taken := durations.get(f"n{number}"):
                spent[place] += statistics.median(taken[WARM_UP:])
        return _by_layer(spent)


def _options(library: Path | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


def optimise(model: Path, folder: Path, library: Path | None = None) -> ModelProto:
    """The graph as ONNX Runtime would run it; its weights are written to ``folder``."""
    options = _options(library)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimised.bin"
    )
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath, load_external_data=False)


def attribute(exported: ModelProto, optimised: ModelProto) -> list[Place]:
    """The layer and one of ``PARTS`` for each node of ``optimised``, made from ``exported``.

    By names where they survive optimisation: those of tensors, and of nodes fused or laid out
    anew. What was inside a function, and copies between layouts, belong to the layer that reads
    them; what nobody reads, to the layer that it reads. Activations and additions
    go with what they read first, see `label_nodes`.

    Parts of an FDConv layer are its two operators, its convolution, and the attention with the
    average before it; outside there are convolutions and the rest.
    """
    dynamic = fdconv_layers(exported)
    layer_of: dict[str, str] = {}
    operators: dict[str, str] = {}
    for node, label in zip(exported.graph.node, label_nodes(exported, dynamic), strict=True):
        # A node fused with others may give its own name to what it makes.
        layer_of |= dict.fromkeys([*node.output, node.name], label.layer or label.module)
        if node.domain == DOMAIN:
            operators |= dict.fromkeys(node.output, _OPERATORS[node.op_type.split("_")[0]])
    nodes = list(optimised.graph.node)
    named = [[_ADDED.sub("", name) for name in (*node.output, node.name)] for node in nodes]
    layers = [_layer(names, layer_of, dynamic) for names in named]
    parts = [_part(*one, operators, dynamic) for one in zip(nodes, named, strict=True)]
    readers: defaultdict[str, list[int]] = defaultdict(list)
    makers: dict[str, int] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            readers[name].append(number)
        makers.update(dict.fromkeys(node.output, number))
    # The graph is in the order in which it runs: readers come last, makers first.
    for number, node in reversed(list(enumerate(nodes))):
        reading = [reader for name in node.output for reader in readers[name]]
        if layers[number] is None:
            layers[number] = next((name for r in reading if (name := layers[r])), None)
        uses = {parts[reader] for reader in reading} if node.op_type in _CARRIERS else set()
        if parts[number] is None and len(uses) == 1 and "convolutions" not in uses:
            (parts[number],) = uses
    for number, node in enumerate(nodes):
        if layers[number] is None:
            read = (makers[name] for name in node.input if name in makers)
            layers[number] = next((name for maker in read if (name := layers[maker])), None)
    return [(layer or NOWHERE, part or "rest") for layer, part in zip(layers, parts, strict=True)]


def _layer(
    names: Sequence[str], layer_of: Mapping[str, str], dynamic: Collection[str]
) -> str | None:
    found = next((layer_of[name] for name in names if name in layer_of), None)
    return found or next((x for name in names if (x := enclosing_layer(name, dynamic))), None)


def _part(
    node: NodeProto, names: Sequence[str], operators: Mapping[str, str], dynamic: Collection[str]
) -> str | None:
    for output in node.output:
        if inlined := _INLINED.match(output):
            return _OPERATORS[inlined[1]]
    if node.op_type in _CONVOLUTIONS:
        return "convolutions"
    for output in node.output:
        if output in operators:
            return operators[output]
    for name in reversed(names):
        if (layer := enclosing_layer(name, dynamic)) is not None:
            own = _OF_CONVOLUTION.match(name[len(layer) + 1 :])
            return "convolutions" if own else "attention"
    return None


class ProfiledNetwork:
    """A PyTorch network, on the CPU in eval mode, that notes what its layers take.

    After each run it is as it was.
    """

    def __init__(self, network: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self._network, self._clock = network, clock
        self._runs: list[dict[Place, float]] = []

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """Run once."""
        import torch

        spent: defaultdict[Place, float] = defaultdict(float)
        at, last = (BEFORE, "rest"), 0.0

        def switch(place: Place) -> None:
            nonlocal at, last
            now = self._clock()
            spent[at] += (now - last) * 1e3
            at, last = place, now

        with torch.inference_mode(), _switching(self._network, switch):
            last = self._clock()  # setting the layers' clocks up takes its time, too
            self._network(*inputs)
            switch(at)
        self._runs.append(spent)

    def layers(self) -> list[LayerTime]:
        """Layers in the order they run: medians over the runs after the first two."""
        counted = self._runs[WARM_UP:]
        return _by_layer({at: statistics.median(run[at] for run in counted) for at in counted[0]})


def _by_layer(spent: Mapping[Place, float]) -> list[LayerTime]:
    layers: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for (layer, part), ms in spent.items():
        layers[layer][part] = round(ms, 4)
    return [LayerTime(name=name, ms=parts) for name, parts in layers.items()]


@contextmanager
def _switching(network: nn.Module, switch: Callable[[Place], None]) -> Iterator[None]:
    """Let a network's layers switch the clock."""
    from torch import nn

    from fdconv_deploy.nn.fdconv import FDConv2d

    with ExitStack() as stack:
        inside: set[nn.Module] = set()
        for name, module in network.named_modules():
            if module in inside or not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            inside.update(module.modules())
            timed: list[tuple[nn.Module, str, str]] = []
            if isinstance(module, FDConv2d) and module.is_dynamic:
                timed += [
                    (module, "attention", "attention"),
                    (module, "kernels", "kernel assembly"),
                ]
                if module.FBM is not None:
                    timed.append((module.FBM, "forward", "band modulation"))
            own = name, "convolutions"
            stack.enter_context(_timed(module, "forward", switch, own, (name, "rest")))
            for part_of, method, part in timed:
                stack.enter_context(_timed(part_of, method, switch, (name, part), own))
        yield


@contextmanager
def _timed(
    module: nn.Module, method: str, switch: Callable[[Place], None], within: Place, after: Place
) -> Iterator[None]:
    """Switch before and after calls of a module's method."""
    original, own = getattr(module, method), dict(module.__dict__)

    def timed(*arguments: Any, **named: Any) -> Any:
        switch(within)
        try:
            return original(*arguments, **named)
        finally:
            switch(after)

    module.__dict__[method] = timed
    try:
        yield
    finally:
        del module.__dict__[method]
        if method in own:
            module.__dict__[method] = own[method]
