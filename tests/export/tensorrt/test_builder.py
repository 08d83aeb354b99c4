"""NVIDIA's own parser and builder take the graphs, on a CPU.

TensorRT-RTX builds without a GPU and cannot run what it built. Where no plugin is registered it
imports the functions of a plugin variant, as TensorRT does.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from fdconv_deploy.errors import BackendError
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.ops import DOMAIN

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip(
        "TensorRT-RTX is not installed (pip install tensorrt-rtx-cu13-libs==1.7.1.116 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116, 96 MB)",
        allow_module_level=True,
    )

# In a process of its own: libraries of NVIDIA's stay loaded.
LOAD = """
import ctypes, glob, json, os, sys
from pathlib import Path
import tensorrt_rtx_libs
for library in sorted(glob.glob(os.path.join(tensorrt_rtx_libs.__path__[0], "*.so*"))):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
"""
BUILD = """
from fdconv_deploy.export.tensorrt.builder import BuildOptions, build_plan
from fdconv_deploy.errors import BackendError
steps = []
for graph in sys.argv[1:]:
    try:
        plan = build_plan(trt, Path(graph), BuildOptions(), progress=steps.append)
    except BackendError as error:
        print("refused", error)
    else:
        print("built", len(plan))
print(len(steps), trt.__version__)
"""
# With creators of the kind that ``tensorrt.plugin`` registers. TensorRT-RTX makes nothing by them,
# but says for each node what it has found.
PARSE = """
class Creator(trt.IPluginCreatorV3Quick):
    def __init__(self, name):
        trt.IPluginCreatorV3Quick.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = name, "fdconv", "1"
        field = trt.PluginField("sizes", b"", trt.PluginFieldType.INT32)
        self.field_names = trt.PluginFieldCollection([field])

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.said = []

    def log(self, severity, message):
        self.said.append(message)

folder, *names = sys.argv[1:]
creators = [Creator(name) for name in names]
for creator in creators:
    assert trt.get_plugin_registry().register_creator(creator, "fdconv")
logger = Logger()
builder = trt.Builder(logger)
found = {}
for graph in sorted(Path(folder).iterdir()):
    logger.said.clear()
    network = builder.create_network(0)  # which the parser does not keep
    parser = trt.OnnxParser(network, logger)
    parser.parse_from_file(str(graph))
    found[graph.stem] = list(logger.said)
print(json.dumps(found))
"""
ROOT = Path(__file__).resolve().parents[3]


def build(*graphs: Path) -> list[str]:
    return nvidia(BUILD, *map(str, graphs))


def nvidia(script: str, *arguments: str) -> list[str]:
    finished = subprocess.run(
        [sys.executable, "-c", LOAD + script, *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()


def test_exported_graphs_and_a_plugin_variant(bundle, exported_module, tmp_path, proved):
    variant = tmp_path / "plugins.onnx"
    onnx.save(ask_for_plugins(onnx.load(str(exported_module.bundle.model_path(1)))).model, variant)
    graphs = bundle.model_path(1), bundle.model_path(5), exported_module.bundle.model_path(5)
    *lines, last = build(*graphs, variant)
    assert [line.split()[0] for line in lines] == ["built"] * 4, lines
    assert all(int(line.split()[1]) > 100_000 for line in lines)
    steps, version = last.split()
    assert int(steps) > 0
    proved(f"TensorRT-RTX {version} built {len(graphs)} exported graphs and a plugin variant")


def test_nvidias_parser_takes_registered_plugins_for_our_nodes(exported_module, tmp_path, proved):
    """A creator in a node's namespace comes before the function of the same name."""
    graph = ask_for_plugins(onnx.load(str(exported_module.bundle.model_path(1))))
    asking = [node for node in graph.model.graph.node if node.domain == DOMAIN]
    for number, node in enumerate(asking):
        onnx.save(_alone(graph.model, node), tmp_path / f"{number}.onnx")
    *_, line = nvidia(PARSE, str(tmp_path), *graph.plugins)
    found = json.loads(line)
    for number, node in enumerate(asking):
        expected = f"Found registered plugin: {node.op_type}. Importing this node as a plugin."
        assert expected in found[str(number)], found[str(number)][8:]
    *_, line = nvidia(PARSE, str(tmp_path))  # nothing is registered: functions
    assert not any(
        "Found registered plugin" in message
        for said in json.loads(line).values()
        for message in said
    )
    proved("nodes that NVIDIA's parser imported as a registered plugin", len(asking))


def _alone(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto:
    """A model of one node with the functions of its own; inputs have any shape."""
    names = [name for name in dict.fromkeys(node.input) if name]
    any_input = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in names]
    output = [onnx.helper.make_tensor_value_info(name, 1, None) for name in node.output]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.CopyFrom(onnx.helper.make_graph([node], "alone", any_input, output))
    return made


def test_what_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    line, _ = build(path)
    assert line.startswith("refused TensorRT")
    assert "does not take the graph" in line
    assert issubclass(BackendError, Exception)


@pytest.mark.slow
def test_int8_is_taken_with_signed_activations_only(tmp_path):
    """What `build_engines` tells from the manifest."""
    from fdconv_deploy.export import export_checkpoint
    from fdconv_deploy.sample_images import sample_image

    graphs = [
        export_checkpoint(
            ROOT / "examples/assets/streets.pth", tmp_path / activations, size=(96, 128),
            precision="int8", activations=activations, tolerance=0.5,
            calibration=[sample_image(number, (96, 128)) for number in range(2)],
        ).model_path(1)
        for activations in ("signed", "unsigned")
    ]  # fmt: skip
    signed, unsigned, _ = build(*graphs)
    assert signed.startswith("built")
    assert unsigned.startswith("refused TensorRT")


@pytest.mark.slow
def test_the_packaged_network(tmp_path):
    from fdconv_deploy.export import export_checkpoint

    checkpoint = ROOT / "examples/assets/streets.pth"
    exported = export_checkpoint(checkpoint, tmp_path / "bundle", size=(192, 256), batches=(1, 4))
    variant = tmp_path / "plugins.onnx"
    onnx.save(ask_for_plugins(onnx.load(str(exported.model_path(1)))).model, variant)
    *lines, _ = build(exported.model_path(1), exported.model_path(4), variant)
    assert [line.split()[0] for line in lines] == ["built"] * 3, lines
