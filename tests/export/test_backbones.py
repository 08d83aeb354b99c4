"""Backbones of the other families as graphs: the frameworks' numbers, no shape arithmetic."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from fdconv_deploy.config import SwinTransformerConfig
from fdconv_deploy.export.api import export_module
from fdconv_deploy.nn.backbones import build_backbone
from tests.export.graphs import relative, run_file
from tests.nn.backbones.published import (
    family_cases,
    load_family,
    load_project,
    project_cases,
)

TOLERANCE = 2e-5
# What only a graph with sizes made at run time has.
SHAPE_ARITHMETIC = {"Shape", "Size", "NonZero", "If", "Loop", "Range", "ConstantOfShape", "Expand"}


def standard(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node if node.domain == ""}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("segformer_mit", "b"),
        ("upernet_swin", "b"),
        ("upernet_swin", "s"),
        ("upernet_convnext", "b"),
    ],
)
def test_exported_backbone_gives_openmmlabs_features(oracle: Path, tmp_path, family, case, proved):
    network = load_family(oracle, family, "fdconv")
    image, features = family_cases(oracle, family, "fdconv")[case]
    bundle = export_module(network, image, tmp_path / "bundle")
    path = bundle.model_path(1)
    assert not standard(onnx.load(path, load_external_data=False)) & SHAPE_ARITHMETIC
    for ours, theirs in zip(run_file(path, image.numpy()), features, strict=True):
        assert relative(ours, theirs.numpy()) <= TOLERANCE
    proved("backbones as graphs, equal to OpenMMLab's frameworks", 1)


def test_exported_backbone_gives_detectron2s_features(oracle: Path, tmp_path, proved):
    network = load_project(oracle, "mask2former_swin")
    image, features = project_cases(oracle, "mask2former_swin")["case_97x131"]
    bundle = export_module(network, image, tmp_path / "bundle")
    answers = run_file(bundle.model_path(1), image.numpy())
    for ours, theirs in zip(answers, features, strict=True):
        assert relative(ours, theirs.numpy()) <= TOLERANCE
    proved("backbones as graphs, equal to detectron2's projects", 1)


@torch.no_grad()
def test_blocks_share_the_tables_of_windows(tmp_path):
    """Index tables and masks are of the map's size, which all blocks of a stage have."""
    torch.manual_seed(0)
    config = SwinTransformerConfig(
        embed_dims=8, depths=(6,), num_heads=(2,), window_size=4, out_indices=(0,)
    )
    network = build_backbone(config).eval()
    image = torch.randn(1, 3, 60, 68)
    bundle = export_module(network, image, tmp_path / "bundle")
    stored = onnx.load(bundle.model_path(1), load_external_data=False)
    # By the place in the weights file: equal constants share one.
    places: dict[tuple[int, ...], set[str]] = {}
    for tensor in stored.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        places.setdefault(tuple(tensor.dims), set()).add(entries.get("offset", tensor.name))
    assert len(places[(320,)]) == 2, "the token at each place, of plain and of shifted windows"
    assert sum(len(where) for dims, where in places.items() if dims[-2:] == (16, 16)) <= 7, (
        "six tables of learned biases at most, and one mask"
    )
    assert relative(run_file(bundle.model_path(1), image.numpy())[0], network(image)[0].numpy()) < (
        TOLERANCE
    )
