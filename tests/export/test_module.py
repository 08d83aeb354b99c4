"""`export_module`: any network with FDConv layers in it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fdconv_deploy.errors import ExportError, UnsupportedLayerError
from fdconv_deploy.export.api import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.fdconv import dynamic_layers
from tests.export.graphs import relative, run_file
from tests.reference.lively import enliven, lively_input
from tests.reference.networks import Wired, batch_norm, dynamic
from tests.reference.published import FDConv


@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_answers(exported_module, batch):
    x = lively_input((batch, 4, 23, 30), 7)
    found = run_file(exported_module.bundle.model_path(batch), x.numpy())
    expected = exported_module.module(x)
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs.numpy()) <= 5e-6


def test_images_do_not_see_their_neighbours(exported_module):
    path = exported_module.bundle.model_path(5)
    x = lively_input((5, 4, 23, 30), 7).numpy()
    others = -2 * x[::-1]
    others[3] = x[3]
    for ours, theirs in zip(run_file(path, x), run_file(path, others), strict=True):
        np.testing.assert_array_equal(ours[3], theirs[3])


def test_manifest(exported_module):
    manifest = exported_module.bundle.manifest
    assert manifest.kind == "module"
    assert manifest.architecture is None
    assert [t.name for t in manifest.inputs[5]] == ["pixels"]
    assert manifest.inputs[5][0].shape == (5, 4, 23, 30)
    assert [(t.name, t.shape) for t in manifest.outputs[5]] == [
        ("map", (5, 20, 6, 11)),
        ("vector", (5, 18)),
    ]
    # The layer whose attention is still has no groups: it is a plain convolution.
    assert sorted(manifest.group_maps) == ["block.0", "rect", "twin"]
    for outputs in manifest.parity.batches.values():
        assert [o.name for o in outputs] == ["map", "vector"]
        assert all(o.max_rel <= 5e-6 and o.argmax_agreement is None for o in outputs)


def test_normalisations_are_folded_where_they_may_be(exported_module):
    model = onnx.load(exported_module.bundle.model_path(1), load_external_data=False)
    left = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    assert len(left) == 1  # the one beside which twin's output is read


def test_shared_weights_are_stored_once(exported_module):
    """Two layers of one spectrum, each with attentions of its own."""
    model = onnx.load(exported_module.bundle.model_path(1), load_external_data=False)
    nodes = {n.name: n for n in model.graph.node}
    first, second = nodes["block.0.assembly"], nodes["twin.assembly"]
    function = next(f for f in model.functions if f.name == first.op_type)
    own = {"attention", "local_input", "local_weight", "column_scale", "row_scale"}
    for name, one, other in zip(function.input, first.input, second.input, strict=True):
        assert (one != other) == (name in own), name


def test_the_module_is_left_as_it_was(exported_module):
    layers = dynamic_layers(exported_module.module)
    assert sorted(layers) == ["block.0", "rect", "still", "twin"]
    assert not exported_module.module.training


def exported_error(module: nn.Module, path, x: torch.Tensor | None = None) -> float:
    x = lively_input((2, 18, 9, 11)) if x is None else x
    made = export_module(module.eval(), x, path)
    with torch.no_grad():
        answer = module(x)
    expected = [answer] if isinstance(answer, torch.Tensor) else list(answer)
    found = run_file(made.model_path(len(x)), x.numpy())
    return max(relative(o, e.numpy()) for o, e in zip(found, expected, strict=True))


def _branches(s: Wired, x: torch.Tensor) -> list[torch.Tensor]:
    y = s.a(x)
    return [y, s.norm(y), x, y.argmax(1)]


def test_outputs_that_are_read_inside_and_inputs_that_are_outputs(tmp_path):
    network = Wired(_branches, a=dynamic(), norm=batch_norm(18))
    assert exported_error(network, tmp_path / "bundle") <= 2e-6
    made = export_module(network, lively_input((1, 18, 9, 11)), tmp_path / "named")
    names = [t.name for t in made.manifest.outputs[1]]
    assert names == ["output0", "output1", "output2", "output3"]


def test_a_network_that_is_one_layer(tmp_path):
    assert exported_error(dynamic(), tmp_path / "bundle") <= 2e-6


def test_a_layer_under_two_names(tmp_path):
    shared = dynamic()
    network = Wired(lambda s, x: s.b(s.a(x).tanh()), a=shared, b=shared)
    assert exported_error(network, tmp_path / "bundle") <= 2e-6


@pytest.mark.parametrize("norms", ["", "first", "last", "both"])
def test_a_layer_used_twice(tmp_path, norms):
    """With a BatchNorm after either use, both or none, each use has its own."""
    network = Wired(
        lambda s, x: s.m(s.a(s.n(s.a(x)).tanh())),
        a=dynamic(),
        n=batch_norm(18) if norms in ("first", "both") else nn.Identity(),
        m=batch_norm(18, seed=1) if norms in ("last", "both") else nn.Identity(),
    )
    assert exported_error(network, tmp_path / "bundle") <= 2e-6


REFUSED = [
    ("training", lambda m, x: (m.train(), x, {}), "training mode"),
    ("names", lambda m, x: (m, x, {"output_names": ["a", "b"]}), "1 outputs.*names 2"),
    ("batches", lambda m, x: (m, x, {"batches": [0]}), "1 or more"),
    ("no batches", lambda m, x: (m, x, {"batches": []}), "1 or more"),
    ("tolerance", lambda m, x: (m, x, {"tolerance": 0.0}), "Nothing was kept"),
]


@pytest.mark.parametrize(("change", "hint"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals_are_sentences_and_leave_nothing(tmp_path, change, hint):
    network = nn.Sequential(dynamic(), nn.ReLU()).eval()
    network, x, options = change(network, lively_input((2, 18, 9, 11)))
    with pytest.raises(ExportError, match=hint):
        export_module(network, x, tmp_path / "deep" / "bundle", **options)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("wiring", "example"),
    [
        (lambda s, x: s.a(x), lively_input((1, 17, 9, 11))),
        (lambda s, x: s.a.double()(x), lively_input((1, 18, 9, 11)).double()),
    ],
    ids=["another number of channels", "float64"],
)
def test_what_cannot_be_a_graph_is_a_sentence(tmp_path, wiring, example):
    with pytest.raises(ExportError):
        export_module(Wired(wiring, a=dynamic()).eval(), example, tmp_path / "bundle")


def test_copies_of_the_published_class_are_converted(tmp_path):
    """Known by their structure; their own group order goes into the bundle."""
    torch.manual_seed(0)
    order = torch.randperm(54 * 28)
    copies = [FDConv(18, 18, 3, padding=1, kernel_num=3, order=o) for o in (order, None)]
    del copies[1].indices
    network = nn.Sequential(copies[0], nn.ReLU(), copies[1]).eval()
    x = lively_input((2, 18, 9, 11))
    said: list[str] = []
    made = export_module(network, x, tmp_path / "bundle", progress=said.append)
    assert "2 layers of a copy of the published FDConv" in said[0]
    assert made.manifest.graph["converted_layers"] == ["0", "2"]
    assert made.manifest.graph["assumed"] == {"2": "no indices, so 'torch'"}
    with torch.no_grad():
        expected = network(x)
    assert relative(run_file(made.model_path(2), x.numpy())[0], expected.numpy()) <= 2e-6
    assert isinstance(network[0], FDConv)


def test_a_variant_of_the_published_class_is_refused_by_name(tmp_path):
    network = nn.Sequential(nn.ReLU(), FDConv(18, 18, 3, padding=1, kernel_num=3)).eval()
    network[1].KSM_Local.complex_weight = nn.Parameter(torch.zeros(1, 10, 2))
    with pytest.raises(
        UnsupportedLayerError, match=r"^1 looks like a copy.*Unexpected key\(s\).*KSM_Local\.comp"
    ):
        export_module(network, lively_input((2, 18, 9, 11)), tmp_path / "bundle")


def test_more_attentions_than_a_byte_counts(tmp_path):
    """The published ``kernel_num=None`` has that many in wide layers."""
    wide = enliven(FDConv2d(32, 32, 1, kernel_num=272))
    network = nn.Sequential(wide, nn.ReLU())
    assert exported_error(network, tmp_path / "bundle", lively_input((1, 32, 5, 6))) <= 2e-6


def test_a_network_that_is_not_finite_is_told_so(tmp_path):
    network = Wired(lambda s, x: s.a(x) / 0.0, a=dynamic())
    with pytest.raises(ExportError, match=r"network's own output 'output'.*not finite"):
        export_module(network.eval(), lively_input((1, 18, 9, 11)), tmp_path / "bundle")


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), nn.LayerNorm([16, 1, 1])])
def test_an_attention_normalised_otherwise_is_refused_by_name(tmp_path, norm):
    """In a layer of our own class, too: it was folded as if it were no normalisation."""
    layer = FDConv2d(32, 32, 3, padding=1, kernel_num=4)
    layer.KSM_Global.bn = norm
    with pytest.raises(UnsupportedLayerError, match="which cannot be folded"):
        export_module(nn.Sequential(layer).eval(), torch.rand(1, 32, 16, 16), tmp_path / "b")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_compiled_module_is_exported_as_the_module_in_it(tmp_path):
    """No compiler runs for it."""
    network = nn.Sequential(dynamic()).eval()
    example = torch.rand(1, 18, 16, 16)
    made = export_module(torch.compile(network), example, tmp_path / "b")
    (answer,) = run_file(made.model_path(1), example.numpy())
    assert relative(answer, network(example).numpy()) <= 1e-5
