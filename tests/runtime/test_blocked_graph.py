"""Graphs in ONNX Runtime's blocked layout: what is rewritten, what it answers, what falls back."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.errors import BackendError
from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d, FDTokenConv
from fdconv_deploy.ops import native
from fdconv_deploy.ops.native import build, compiler
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.backends import onnxruntime as backend
from fdconv_deploy.runtime.backends.onnxruntime import blocked_layout
from fdconv_deploy.runtime.blocked_graph import block_graph
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.native_layers import NativeGraph, fuse_layers
from fdconv_deploy.runtime.onnx_graph import read_model, set_attribute
from tests.reference.lively import enliven, lively_input

SIZE = 24, 28


def dynamic(channels: int, filters: int, kernel: int, **more) -> FDConv2d:
    """A layer of any channels, of the fewest groups that its bins divide into."""
    bins = filters * kernel * (channels * kernel // 2 + 1)
    groups = next(n for n in range(2, bins) if bins % n == 0)
    return enliven(FDConv2d(channels, filters, kernel, kernel_num=groups, **more))


class Residual(nn.Module):
    """A stem, two FDConv layers beside a shortcut, maps joined and convolved."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.first = dynamic(width, inner, 1)
        self.second = dynamic(inner, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(2 * width, 3, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        y = self.norm(self.second(torch.relu(self.first(x))))
        y = torch.relu(y + self.shortcut(x))
        return self.last(torch.cat([x, torch.sigmoid(y)], 1))


def network(width: int = 32, inner: int = 48) -> nn.Module:
    torch.manual_seed(0)
    made = Residual(width, inner)
    nn.init.uniform_(made.norm.running_mean, -1, 1)
    nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    return made.eval()


def exported(made: nn.Module, folder: Path, batch: int = 1) -> Path:
    export_module(made, lively_input((batch, 3, *SIZE)), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(network(), tmp_path_factory.mktemp("blocked") / "bundle")


@pytest.fixture(autouse=True, scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """The native operators of this tree."""
    if compiler() is None:
        pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FOLDER", build(tmp_path_factory.mktemp("native")).parent)
        patch.delenv(native.SWITCH, raising=False)
        yield


@pytest.fixture
def block() -> int:
    length, why = blocked_layout()
    if not length:
        pytest.skip(f"ONNX Runtime has no blocked layout on this machine: {why}")
    return length


def answer(bundle: Path, **options) -> tuple[np.ndarray, str]:
    """The answer to a lively input, and what ran."""
    with open_session(bundle, "onnxruntime-cpu", **options) as session:
        ((batch, (spec,)),) = session.bundle.manifest.inputs.items()
        (y,) = session.run_raw({spec.name: lively_input((batch, 3, *SIZE)).numpy()}).values()
        return y, session.operators


def rewritten(bundle: Path, length: int) -> NativeGraph | None:
    opened = Bundle.open(bundle, hold=True)
    ((_, name),) = opened.manifest.models.items()
    return block_graph(bytes(opened.content(name)), opened.external_data(name), length)


def check(made: nn.Module, bundle: Path, batch: int = 1) -> str:
    """Blocked against float64, no further off than the layout of the export; what ran."""
    with torch.no_grad():
        y = made.double()(lively_input((batch, 3, *SIZE)).double()).numpy()
    made.float()
    blocked, ran = answer(bundle, native=True)
    plain, _ = answer(bundle, native="nchw")
    most = np.abs(y).max()
    assert np.abs(plain - y).max() <= 5e-6 * most
    assert np.abs(blocked - y).max() <= 5e-6 * most
    return ran


def check_shapes(bundle: Path, length: int) -> None:
    """The shapes that the rewritten graph tells are those of a run, and it tells all blocks'."""
    found = rewritten(bundle, length)
    assert found is not None
    model = onnx.load_model_from_string(found.model.SerializeToString())
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.value_info
    }
    blocked = {
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "MaxPool", "Concat", "FrequencyBandModulation")
        and node.domain in ("com.microsoft.nchwc", "fdconv.nchwc")
    }
    assert blocked
    assert blocked <= shapes.keys()
    for name in sorted(blocked):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native.native_library(True)[0]))
    files = found.files
    options.add_external_initializers_from_files_in_memory(
        list(files), list(files.values()), [len(data) for data in files.values()]
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (x,) = session.get_inputs()
    names = sorted(blocked)
    answers = session.run(names, {x.name: lively_input(tuple(x.shape)).numpy()})
    for name, value in zip(names, answers, strict=True):
        assert shapes[name] == value.shape, name


@pytest.mark.parametrize("length", [8, 16])
def test_everything_between_input_and_output_is_blocked(bundle: Path, length: int) -> None:
    found = rewritten(bundle, length)
    assert found is not None
    model = onnx.load_model_from_string(found.model.SerializeToString())
    ops = Counter((node.domain, node.op_type) for node in model.graph.node)
    nchwc = "com.microsoft.nchwc"
    # The last convolution's three channels are not worth a block.
    assert ops["", "Conv"] == 1
    assert ops[nchwc, "Conv"] == 4
    assert ops[nchwc, "MaxPool"] == 1
    assert ops["fdconv.nchwc", "FrequencyAssembly"] == 2
    assert ops["fdconv.nchwc", "KernelAttention"] == 2
    assert ops["fdconv.nchwc", "FrequencyBandModulation"] == 1
    assert ops[nchwc, "ReorderInput"] == 0
    assert ops[nchwc, "ReorderOutput"] == 1
    assert ops["", "Add"] == ops["", "Relu"] == ops["", "Mul"] == 0
    activations = [a.s for n in model.graph.node for a in n.attribute if a.name == "activation"]
    assert activations == [b"Relu"] * 3
    assert not found.has_functions


def test_answers(bundle: Path, block: int) -> None:
    ran = check(network(), bundle)
    assert ran == (
        f"native operators, since they are built here; features in blocks of {block} channels"
    )


def test_shapes_are_told(bundle: Path, block: int) -> None:
    check_shapes(bundle, block)


def test_bits_do_not_depend_on_threads(bundle: Path, block: int) -> None:
    first, _ = answer(bundle, threads=1)
    for threads in (2, 3):
        assert np.array_equal(answer(bundle, threads=threads)[0], first)


@pytest.mark.parametrize(
    ("width", "inner", "batch"),
    [
        (32, 48, 3),  # images joined into groups of one convolution
        (30, 44, 1),  # blocks that channels do not fill
        (29, 47, 1),
        (64, 96, 1),  # kernels larger than features: by rows, gates on features
        (64, 96, 2),
    ],
)
def test_other_sizes(width: int, inner: int, batch: int, tmp_path: Path, block: int) -> None:
    made = network(width, inner)
    bundle = exported(made, tmp_path / "bundle", batch)
    assert "in blocks of" in check(made, bundle, batch)
    check_shapes(bundle, block)


@pytest.mark.usefixtures("block")
def test_a_layer_that_stays_a_function(tmp_path: Path) -> None:
    """Channels that fill half of two blocks of 16, behind a layer that is in blocks."""
    made = nn.Sequential(nn.Conv2d(3, 32, 1), dynamic(32, 32, 1), dynamic(32, 17, 1)).eval()
    bundle = exported(made, tmp_path / "bundle")
    found = rewritten(bundle, 16)
    assert found is not None
    assert found.has_functions
    names = [node.op_type for node in found.model.graph.node]
    assert any(name.startswith("FrequencyAssembly_") for name in names)
    assert "in blocks of" in check(made, bundle)


class Branches(nn.Module):
    """Answers read twice, sums of what has other readers, and operators that know no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.layer = dynamic(32, 32, 3, padding=1, stride=2)
        self.after = nn.Conv2d(32, 32, 1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.joined = nn.Conv2d(80, 32, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(image)
        y = self.layer(x)
        large = nn.functional.interpolate(y, scale_factor=2, mode="bilinear")
        small = image.mean(1, keepdim=True).expand(-1, 16, -1, -1)
        z = self.after(y) + y
        w = torch.nn.functional.leaky_relu(z) * y + y.mean(1, keepdim=True)
        joined = self.joined(torch.cat([large, small, x], 1))
        return torch.relu(z), self.depthwise(w).flatten(2).softmax(-1), joined


def test_branches(tmp_path: Path, block: int) -> None:
    torch.manual_seed(1)
    made = Branches()
    x = lively_input((1, 3, *SIZE))
    export_module(made.eval(), x, tmp_path / "bundle")
    with torch.no_grad():
        expected = [y.numpy() for y in made.double()(x.double())]
    with open_session(tmp_path / "bundle", "onnxruntime-cpu", native=True) as session:
        (spec,) = session.bundle.manifest.inputs[1]
        found = session.run_raw({spec.name: x.numpy()})
        assert "in blocks of" in session.operators
    for y, name in zip(expected, (o.name for o in session.bundle.manifest.outputs[1]), strict=True):
        assert np.abs(found[name] - y).max() <= 5e-6 * np.abs(y).max()


class Near(nn.Module):
    """Sizes and constants that only look like those that mean the same in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = dynamic(32, 32, 3, padding=1)
        self.after = nn.Conv2d(32, 16, 1)
        self.register_buffer("one", torch.full((1, 1, 1, 1, 1), 0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        # 5 to 10 and 6 to 12, but by other places than of a factor of 2
        large = nn.functional.interpolate(y, scale_factor=2.05, mode="bilinear")
        return self.after(large), self.after(y) + self.one


def test_what_only_looks_the_same_in_blocks(tmp_path: Path, block: int) -> None:
    torch.manual_seed(2)
    made, x = Near().eval(), lively_input((1, 32, 5, 6))
    export_module(made, x, tmp_path / "bundle")
    with torch.no_grad():
        expected = [y.numpy() for y in made.double()(x.double())]
    with open_session(tmp_path / "bundle", "onnxruntime-cpu", native=True) as session:
        found = session.run_raw({"input": x.numpy()})
        assert "in blocks of" in session.operators
        names = [output.name for output in session.bundle.manifest.outputs[1]]
    for y, name in zip(expected, names, strict=True):
        assert found[name].shape == y.shape
        assert np.abs(found[name] - y).max() <= 5e-6 * np.abs(y).max()


def test_nodes_called_by_their_outputs(bundle: Path) -> None:
    """ONNX Runtime takes no two nodes of a name, and a reordered output's would be a second."""
    opened = Bundle.open(bundle, hold=True)
    ((_, name),) = opened.manifest.models.items()
    model = onnx.load_model_from_string(bytes(opened.content(name)))
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.output[0].name = "sigmoid"
    found = block_graph(model.SerializeToString(), opened.external_data(name), 16)
    assert found is not None
    names = [node.name for node in found.model.graph.node]
    assert "sigmoid/ReorderOutput" in names
    assert len(set(names)) == len(names)


def test_a_computed_bias_is_added(bundle: Path) -> None:
    """Exports have constant ones; a graph that somebody edited keeps its own."""
    opened = Bundle.open(bundle, hold=True)
    ((_, name),) = opened.manifest.models.items()
    model = onnx.load_model_from_string(bytes(opened.content(name)))
    constants = {tensor.name for tensor in model.graph.initializer}
    dynamic_convs = [
        (at, node)
        for at, node in enumerate(model.graph.node)
        if node.op_type == "Conv" and node.input[1] not in constants
    ]
    for at, conv in reversed(dynamic_convs):
        mean = onnx.helper.make_node("ReduceMean", [conv.input[1]], [f"m{at}"], keepdims=0)
        given = conv.input[2] if len(conv.input) > 2 else f"m{at}"
        bias = onnx.helper.make_node("Add", [f"m{at}", given], [f"bias{at}"])
        del conv.input[2:]
        conv.input.append(f"bias{at}")
        model.graph.node.insert(at, bias)
        model.graph.node.insert(at, mean)
    found = block_graph(model.SerializeToString(), opened.external_data(name), 16)
    graph = model.graph if found is None else found.model.graph
    read = {tensor for node in graph.node for tensor in node.input}
    assert {f"bias{at}" for at, _ in dynamic_convs} <= read


def test_a_network_without_fdconv_is_left_alone(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    assert rewritten(exported(plain, tmp_path / "bundle"), 16) is None


class Tokens(nn.Module):
    """A layer that convolves, and two over the tokens of its answer: (B, H·W, C), (B, H, W, C)."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.wide = enliven(FDTokenConv(32, 80, kernel_num=5), 1)
        self.narrow = enliven(FDTokenConv(80, 20, kernel_num=4), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.wide(self.first(x).flatten(2).transpose(1, 2)))
        return self.narrow(x.unflatten(1, (12, -1))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_attentions_of_tokens_are_fused_where_nothing_is_blocked(
    tmp_path: Path, batch: int
) -> None:
    made = Tokens(nn.Conv2d(3, 32, 2, stride=2)).eval()
    folder = exported(made, tmp_path / "bundle", batch)
    ran = check(made, folder, batch)
    assert ran.endswith("since no FDConv layer of this graph gains by blocks")
    opened = Bundle.open(folder, hold=True)
    ((_, name),) = opened.manifest.models.items()
    graph = fuse_layers(bytes(opened.content(name)), opened.external_data(name)).model.graph
    assert [node.op_type for node in graph.node].count("KernelAttention") == 2
    answers = [answer(folder, native=True, threads=n)[0] for n in (1, 2, 3)]
    assert all(np.array_equal(answers[0], each) for each in answers[1:])


def test_switched_off(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(bundle, native="nchw")[1] == (
        "native operators, since they are built here; features in NCHW, since "
        "open_session(native='nchw') keeps NCHW"
    )
    monkeypatch.setenv(native.SWITCH, "nchw")
    assert answer(bundle)[1].endswith("FDCONV_NATIVE=nchw keeps NCHW")
    monkeypatch.setenv(native.SWITCH, "NCHW")
    with pytest.raises(BackendError, match="FDCONV_NATIVE is 0, 1 or nchw, not 'NCHW'"):
        answer(bundle)


def test_a_runtime_without_the_layout(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "blocked_layout", lambda: (0, "its blocks are unknown"))
    y, ran = answer(bundle, native=True)
    assert ran.endswith("features in NCHW, since its blocks are unknown")
    assert np.array_equal(y, answer(bundle, native="nchw")[0])


def test_a_graph_that_fails_at_run(
    bundle: Path, block: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers all the same, from a session in NCHW, and says so; several runs at once, too."""

    def broken(*arguments) -> NativeGraph:
        found = block_graph(*arguments)
        assert found is not None
        for node in found.model.graph.node:
            if node.op_type == "FrequencyAssembly":
                set_attribute(node, "filter_at", 100_000)
        return found

    expected, _ = answer(bundle, native="nchw")
    monkeypatch.setattr(backend, "block_graph", broken)
    with open_session(bundle, "onnxruntime-cpu", native=True) as session:
        feeds = {"input": lively_input((1, 3, *SIZE)).numpy()}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: session.run_raw(feeds), range(4)))
        assert all(np.array_equal(found["output"], expected) for found in answers)
        assert "features in NCHW, since ONNX Runtime failed on the graph in blocks" in (
            session.operators
        )
    assert caplog.text.count("goes on in NCHW") == 1
    assert "its attention has fewer gates" in caplog.text


def test_a_graph_that_the_runtime_refuses(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one of a later version may, whose operators have changed."""

    def broken(*arguments) -> NativeGraph:
        found = block_graph(*arguments)
        assert found is not None
        model = onnx.load_model_from_string(found.model.SerializeToString())
        for node in model.graph.node:
            if node.op_type == "ReorderOutput":
                node.op_type = "ReorderBack"
        return NativeGraph(read_model(model.SerializeToString()), found.files)

    monkeypatch.setattr(backend, "blocked_layout", lambda: (16, ""))
    monkeypatch.setattr(backend, "block_graph", broken)
    y, ran = answer(bundle, native=True)
    assert "features in NCHW, since ONNX Runtime refused the graph in it" in ran
    assert "the blocked layout is not used" in caplog.text
    assert np.array_equal(y, answer(bundle, native="nchw")[0])
