"""What an export refuses of a network: a sentence each, and not a file left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fdconv_deploy.config import TestMode
from fdconv_deploy.errors import BundleError, CheckpointError, ExportError
from fdconv_deploy.export import graph
from fdconv_deploy.export.api import export_checkpoint, export_network
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from tests.export.graphs import run_file
from tests.reference.networks import small_segmentor


@pytest.fixture(scope="module")
def network() -> Segmentor:
    return small_segmentor(50, 20, stages=1)


SIZES = [
    (None, "no size of its own"),
    ((3, 64), "shrinks its input so far that of 3x64"),
]


@pytest.mark.parametrize(("size", "hint"), SIZES)
def test_sizes(network, tmp_path, size, hint):
    with pytest.raises(ExportError, match=hint):
        export_network(network, tmp_path / "bundle", size=size)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_not_the_crop(tmp_path):
    test = TestMode(mode="slide", crop_size=(40, 56), stride=(30, 40))
    network = small_segmentor(50, 20, stages=1, test=test)
    with pytest.raises(ExportError, match=r"sliding a 40x56 crop.*--size is 56x40.*--mode whole"):
        export_network(network, tmp_path / "bundle", size=(56, 40))
    assert list(tmp_path.iterdir()) == []


def test_training_mode(tmp_path):
    network = small_segmentor(50, 20, stages=1).train()
    with pytest.raises(ExportError, match="training mode"):
        export_network(network, tmp_path / "bundle", size=(32, 32))


def test_what_is_in_the_way(network, tmp_path):
    """Asked before anything is computed."""
    said: list[str] = []

    def refused(name: str, hint: str, **options) -> None:
        with pytest.raises(BundleError, match=hint):
            export_network(network, tmp_path / name, size=(32, 32), progress=said.append, **options)

    (tmp_path / "file").write_text("mine")
    refused("file", "is a file", overwrite=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    refused("folder", "not a bundle", overwrite=True)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    refused("bundle", "exists already")
    assert not any("network" in step for step in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "folder"]


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong number in one layer's constants, on the way into the graph."""
    fold = graph.fold_layer

    def wrong(layer, size, **options):
        folded = fold(layer, size, **options)
        if folded.name.endswith("0.conv2"):
            heads = folded.modulation.head_bias.copy()
            heads[0] += 1
            folded = replace(folded, modulation=replace(folded.modulation, head_bias=heads))
        return folded

    monkeypatch.setattr(graph, "fold_layer", wrong)


def test_a_wrong_weight_is_not_kept(network, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(
        ExportError,
        match=r"batch 1 differs from the network: backbone\.layer\d\.0\.conv2 .*Nothing was kept",
    ):
        export_network(network, tmp_path / "bundle", size=(33, 40))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_replaced_whole_or_not_at_all(network, tmp_path, monkeypatch):
    made = export_network(network, tmp_path / "bundle", size=(33, 40))
    x = np.ones((1, 3, 33, 40), np.float32)
    (before,) = run_file(made.model_path(1), x)
    with monkeypatch.context() as patched:
        plant(patched)
        with pytest.raises(ExportError, match="Nothing was kept"):
            export_network(network, made.path, size=(33, 40), batches=(2,), overwrite=True)
    assert Bundle.open(made.path).manifest == made.manifest
    np.testing.assert_array_equal(run_file(made.model_path(1), x)[0], before)

    again = export_network(network, made.path, size=(20, 24), batches=(2,), overwrite=True)
    assert Bundle.open(made.path).manifest == again.manifest
    assert again.batch_sizes == (2,)
    assert not (made.path / "model.b1.onnx").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@torch.no_grad()
def test_a_network_of_numbers_that_overflow(tmp_path):
    network = small_segmentor(50, 20, stages=1)
    network.decode_head.conv_seg.weight.fill_(3e38)
    with pytest.raises(ExportError, match="not finite"):
        export_network(network, tmp_path / "bundle", size=(32, 32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a checkpoint" * 100])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = Path(tmp_path / "network.pth")
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        export_checkpoint(path, tmp_path / "bundle", size=(32, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["network.pth"]
