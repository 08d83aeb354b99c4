"""One self-contained .onnx file of a bundle's graph: what is in it, and that it is the graph."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fdconv_deploy.demo import packaged_checkpoint, packaged_detector
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import export_checkpoint, export_onnx
from fdconv_deploy.export.targets import onnx_file
from fdconv_deploy.ops import DOMAIN, OPSET
from fdconv_deploy.runtime import open_session
from fdconv_deploy.sample_images import sample_feeds


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "bundle"
    return export_checkpoint(packaged_detector(), folder, size=(96, 128))


def answers(path, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # more, and matrix products are summed in another order
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def bundle_answers(bundle, batch):
    feeds = sample_feeds(bundle.manifest.inputs[batch])
    with open_session(bundle, native=False, threads=1) as session:
        return feeds, session.run_raw(feeds)


def opset_of(path):
    (standard,) = onnx.load(path).opset_import
    assert standard.domain == ""
    return standard.version


def test_file_holds_standard_operators_and_all_its_data(bundle, tmp_path):
    written = export_onnx(bundle, tmp_path / "model.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(written.path, load_external_data=False)
    assert not model.functions
    assert opset_of(written.path) == written.opset == OPSET
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.graph.node) == written.nodes
    assert "Constant" not in {node.op_type for node in model.graph.node}
    assert all(t.data_location != TensorProto.EXTERNAL for t in model.graph.initializer)
    # What was inside a function carries its layer's name.
    names = Counter(node.name for node in model.graph.node)
    assert max(names.values()) == 1
    assert any(name.startswith("backbone.layer1.0.conv2.") for name in names)
    # Every shape is known, which compilers ask for.
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert {output for node in model.graph.node for output in node.output if output} <= known


def test_file_computes_the_same_bits(bundle, tmp_path):
    for batch in (1, 5):
        written = export_onnx(bundle, tmp_path / f"{batch}.onnx", batch=batch)
        assert written.max_rel == 0
        feeds, expected = bundle_answers(bundle, batch)
        assert np.array_equal(answers(written.path, feeds)["logits"], expected["logits"])


@pytest.mark.parametrize("opset", [13, 15, 16, 17, 19, 21, 24])
def test_file_is_of_the_opset_asked_for(bundle, tmp_path, opset):
    written = export_onnx(bundle, tmp_path / "model.onnx", opset=opset)
    assert opset_of(written.path) == opset
    onnx.checker.check_model(str(written.path), full_check=True)
    feeds, expected = bundle_answers(bundle, 1)
    found = answers(written.path, feeds)["logits"]
    assert np.abs(found - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()
    # ONNX Runtime prints a warning for each tensor that nothing reads.
    graph = onnx.load(written.path).graph
    assert {t.name for t in graph.initializer} <= {n for node in graph.node for n in node.input}
    made = {name for node in graph.node for name in node.output}
    assert {value.name for value in graph.value_info} <= made


def test_path_may_be_relative(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_onnx(bundle, "folder/-ü model.onnx").max_rel == 0
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["-ü model.onnx"]


def test_reference_evaluator_runs_the_file(bundle, tmp_path):
    written = export_onnx(bundle, tmp_path / "model.onnx", opset=15)
    feeds, expected = bundle_answers(bundle, 1)
    (found,) = ReferenceEvaluator(str(written.path)).run(None, feeds)
    assert np.abs(found - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()


def test_file_tells_classes_and_normalisation(bundle, tmp_path):
    export_onnx(bundle, tmp_path / "model.onnx")
    entries = onnx.load(tmp_path / "model.onnx").metadata_props
    found = {entry.key: json.loads(entry.value) for entry in entries}
    network = bundle.manifest.architecture
    assert found["fdconv.kind"] == "segmentor"
    assert found["fdconv.mean"] == list(network.preprocessing.mean)
    assert found["fdconv.classes"] == list(network.classes)


def test_detector_and_module_become_files(detector, exported_module, tmp_path):
    for opset in (16, 18, 21):
        path = tmp_path / f"{opset}.onnx"
        assert export_onnx(detector, path, opset=opset).max_rel <= 1e-5
    assert export_onnx(exported_module.bundle, tmp_path / "module.onnx", opset=13).max_rel <= 1e-5


def test_half_precision_becomes_a_file_of_a_newer_opset(tmp_path):
    bundle = export_checkpoint(
        packaged_checkpoint(), tmp_path / "bundle", size=(96, 128), precision="fp16"
    )
    written = export_onnx(bundle, tmp_path / "model.onnx", opset=22)
    assert written.opset == 22
    assert written.max_rel <= 1e-3


def test_what_onnxruntime_does_not_run_is_a_sentence(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_RANGES", {})
    with pytest.raises(ExportError, match=r"(?s)RoiAlign.*Choose the bundle's own opset, 18"):
        export_onnx(detector, tmp_path / "model.onnx", opset=22)


def test_network_over_the_limit_of_protobuf_is_refused(bundle, tmp_path, monkeypatch):
    """The limit is lowered. protobuf itself writes a file of more than 2 GB, and cannot read it."""
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100_000)
    with pytest.raises(ExportError, match=r"one \.onnx file holds .* Keep the bundle"):
        export_onnx(bundle, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [15, 22])
def test_roi_align_has_no_form_in_other_opsets(detector, tmp_path, opset):
    with pytest.raises(ExportError, match=rf"RoiAlign .* opset {opset}: .* from 16 to 21\."):
        export_onnx(detector, tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_operator_that_came_later_is_refused_with_its_opset():
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="sampled")
    graph = helper.make_graph([node], "graph", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    with pytest.raises(ExportError, match=r"GridSample 'sampled' .* it came with opset 16\."):
        onnx_file.set_opset(model, 13)


@pytest.mark.parametrize("opset", [12, 99])
def test_unknown_opset_is_refused(bundle, tmp_path, opset):
    with pytest.raises(ExportError, match=f"the opset is 13 to .*, not {opset}"):
        export_onnx(bundle, tmp_path / "model.onnx", opset=opset)


def test_file_of_other_answers_is_not_kept(bundle, tmp_path, monkeypatch):
    right = onnx_file.inline_functions

    def wrong(model):
        inlined = right(model)
        node = next(n for n in inlined.graph.node if n.op_type == "Sigmoid")
        node.op_type = "Tanh"
        return inlined

    monkeypatch.setattr(onnx_file, "inline_functions", wrong)
    with pytest.raises(ExportError, match=r"logits differs from the bundle's by .* Nothing was"):
        export_onnx(bundle, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_place_and_graph_are_checked(bundle, tmp_path):
    taken = tmp_path / "model.onnx"
    taken.write_text("mine")
    for fields, output, message in (
        ({}, taken, "exists already"),
        ({}, tmp_path / "model", r"called \*.onnx"),
        ({"batch": 3}, tmp_path / "new.onnx", "no graph of batch size 3; it has 1, 2, 5"),
        ({"size": (64, 64)}, tmp_path / "new.onnx", "no graph of 64x64; it has 65x97"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(bundle, output, **fields)
    assert taken.read_text() == "mine"
    export_onnx(bundle, taken, overwrite=True)
    assert DOMAIN not in {entry.domain for entry in onnx.load(taken).opset_import}
