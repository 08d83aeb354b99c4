"""A segmentor's bundle: its answers, its images' independence, its manifest."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch

import fdconv_deploy
from fdconv_deploy.config import TestMode
from fdconv_deploy.export.api import export_network
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import group_map
from fdconv_deploy.runtime.bundle import Bundle
from tests.export.graphs import relative, run_file
from tests.reference.lively import lively_input
from tests.reference.networks import small_segmentor

BATCHES = (1, 2, 5)


def images(batch: int, size: tuple[int, int] = (65, 97), seed: int = 9) -> np.ndarray:
    return lively_input((batch, 3, *size), seed).numpy()


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_graph_equals_network(bundle, segmentor, batch):
    """On images the export did not check it with."""
    x = images(batch)
    (logits,) = run_file(bundle.model_path(batch), x)
    assert relative(logits, segmentor(torch.from_numpy(x)).numpy()) <= 1e-5


@pytest.mark.parametrize("batch", [2, 5])
def test_images_do_not_see_their_neighbours(bundle, batch):
    x = images(batch)
    (together,) = run_file(bundle.model_path(batch), x)
    alone = [run_file(bundle.model_path(1), image[None])[0][0] for image in x]
    assert relative(together, np.stack(alone)) <= 1e-5
    for place in range(batch):
        others = -2 * images(batch, seed=10)
        others[place] = x[place]
        (answer,) = run_file(bundle.model_path(batch), others)
        np.testing.assert_array_equal(answer[place], together[place])


def test_the_folder_holds_what_the_manifest_lists(bundle):
    names = sorted(p.name for p in bundle.path.iterdir())
    graphs = [f"model.b{b}.onnx" for b in BATCHES]
    assert names == sorted(["manifest.json", "weights.bin", *graphs])
    files = json.loads((bundle.path / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(["weights.bin", *graphs])
    for name, info in files.items():
        content = (bundle.path / name).read_bytes()
        assert info == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert Bundle.open(bundle.path).manifest == bundle.manifest
    assert [p.name for p in bundle.path.parent.iterdir()] == ["bundle"]


def test_manifest(bundle, segmentor):
    manifest = bundle.manifest
    assert manifest.kind == "segmentor"
    assert manifest.architecture == segmentor.architecture
    assert (manifest.input.height, manifest.input.width) == (65, 97)
    assert manifest.created_by == f"fdconv-deploy {fdconv_deploy.__version__}"
    assert manifest.checkpoint is None
    assert manifest.precision == "fp32"
    assert bundle.batch_sizes == BATCHES
    for batch in BATCHES:
        (x,), (y,) = manifest.inputs[batch], manifest.outputs[batch]
        assert (x.name, x.shape, x.dtype) == ("images", (batch, 3, 65, 97), "float32")
        assert (y.name, y.shape, y.dtype) == ("logits", (batch, 7, 17, 25), "float32")
    assert manifest.graph["fdconv_layers"] == len(dynamic_layers(segmentor))
    assert set(manifest.versions) >= {"torch", "onnx", "onnxruntime"}


def test_parity_report(bundle):
    parity = bundle.manifest.parity
    assert sorted(parity.batches) == list(BATCHES)
    for (output,) in parity.batches.values():
        assert output.name == "logits"
        assert 0 < output.max_rel <= 1e-5
        assert output.argmax_agreement > 0.999
    assert "ONNX Runtime" in parity.backend
    assert "PyTorch" in parity.reference


def test_group_maps_are_those_of_the_layers(bundle, segmentor):
    expected = {}
    for name, layer in dynamic_layers(segmentor).items():
        groups = group_map(layer.indices, layer.rows, layer.columns).numpy().astype("<i2")
        expected[name] = hashlib.sha256(groups.tobytes()).hexdigest()
    assert bundle.manifest.group_maps == expected


def test_batches_share_the_weights(bundle):
    """All graphs point to the same bytes of one file; what is tiled per batch is little."""
    places = []
    for batch in BATCHES:
        model = onnx.load(bundle.model_path(batch), load_external_data=False)
        entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer]
        places.append({(int(e["offset"]), int(e["length"])) for e in entries if e})
        assert {e["location"] for e in entries if e} == {"weights.bin"}
    shared, single = set.intersection(*places), places[0]
    assert sum(n for _, n in shared) >= 0.99 * sum(n for _, n in single)
    assert (bundle.path / "weights.bin").stat().st_size <= 1.02 * sum(n for _, n in single)


@pytest.mark.parametrize("size", [(8, 8), (33, 31)])
@torch.no_grad()
def test_other_sizes(segmentor, tmp_path, size):
    made = export_network(segmentor, tmp_path / "bundle", size=size)
    x = images(1, size)
    (logits,) = run_file(made.model_path(1), x)
    assert relative(logits, segmentor(torch.from_numpy(x)).numpy()) <= 1e-5


@torch.no_grad()
def test_a_slide_network_is_exported_at_its_crop(tmp_path):
    test = TestMode(mode="slide", crop_size=(40, 56), stride=(30, 40))
    network = small_segmentor(50, 20, stages=1, test=test)
    said: list[str] = []
    made = export_network(network, tmp_path / "bundle", progress=said.append)
    assert (made.manifest.input.height, made.manifest.input.width) == (40, 56)
    x = images(1, (40, 56))
    (logits,) = run_file(made.model_path(1), x)
    assert relative(logits, network(torch.from_numpy(x)).numpy()) <= 1e-5
    assert any("comparing layer by layer" in step for step in said)


@torch.no_grad()
def test_a_plain_network_is_exported_and_said_to_be_plain(tmp_path):
    network = small_segmentor(18, 18, stages=1, conv=None)
    said: list[str] = []
    made = export_network(network, tmp_path / "bundle", size=(32, 32), progress=said.append)
    assert any("no FDConv layer" in step for step in said)
    assert made.manifest.group_maps == {}
