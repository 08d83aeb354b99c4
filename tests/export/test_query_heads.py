"""Bundles of networks with query heads, against the frameworks' own answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.api import network_to_export
from fdconv_deploy.export.exporter import write_bundle
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.nn.heads import resize
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime import open_session
from tests.nn.query_heads import (
    case_tensors,
    detectron2,
    load_detectron2,
    load_openmmlab,
    openmmlab,
)

# Of the largest score, against the framework; and a near-tie of two scores.
TOLERANCE, NEAR_TIE = 2e-5, 2e-5


def export(network, size, folder):
    options = ExportOptions(size=size)
    write_bundle(network_to_export(network, options), folder, options)
    return folder


def assert_same(answer, tensors, session, reference, labels):
    """The graph's scores are the reference's, and the answer's labels its but for near-ties."""
    found = session.run(tensors["input"].numpy())
    assert np.abs(found - reference.numpy()).max() / reference.abs().max() <= TOLERANCE
    best = np.sort(answer[1], axis=0)
    margin = (best[-1] - best[-2]) / np.abs(answer[1]).max()
    assert (margin[answer[0] != labels.numpy()] <= NEAR_TIE).all()


OPENMMLAB = [("mask2former_r50", "b"), ("mask2former_r50", "c")]


@pytest.mark.parametrize(("family", "case"), OPENMMLAB)
def test_bundle_answers_as_openmmlab(oracle: Path, tmp_path, family, case, proved):
    network = load_openmmlab(oracle, family, "fdconv")
    index = json.loads((oracle / "families" / family / "fdconv_index.json").read_text())
    facts = index["cases"][case]
    tensors = case_tensors(oracle, family, "fdconv", case)
    if case == "c":  # the configuration's own pipeline, with its Resize
        how = network.architecture.preprocessing.model_copy(update={"scale": (192, 96)})
        changed = network.architecture.model_copy(update={"preprocessing": how})
        network.architecture = changed
    bundle = export(network, tuple(tensors["input"].shape[-2:]), tmp_path / "bundle")
    image = np.ascontiguousarray(tensors["image_bgr_u8"].numpy()[..., ::-1])
    with torch.no_grad():
        reference = network(tensors["input"])
    height, width = facts["meta"]["img_shape"]
    scores = resize(reference[:, :, :height, :width], facts["meta"]["ori_shape"], False)[0]
    step = 2 if facts["subsampled"] else 1
    published = tensors["seg_logits"]
    assert (scores[:, ::step, ::step] - published).abs().max() / published.abs().max() <= TOLERANCE
    with open_session(bundle) as session:
        segmentation = session.segment(image)
        assert segmentation.fit == "resized"
        assert_same(
            (segmentation.labels, scores.numpy()), tensors, session, reference, tensors["pred"]
        )
    proved("bundles with query heads equal to the frameworks", 1)


@pytest.mark.parametrize("project", ["mask2former_r50", "maskdino_r50"])
def test_bundle_answers_as_detectron2(oracle: Path, tmp_path, project, proved):
    network = load_detectron2(oracle, project)
    tensors = case_tensors(oracle, project, None, "97x131")
    bundle = export(network, (128, 160), tmp_path / "bundle")
    with torch.no_grad():
        reference = network(tensors["input"])
    scores = reference[0, :, :97, :131]
    published = tensors["sem_seg"]
    assert (scores - published).abs().max() / published.abs().max() <= TOLERANCE
    with open_session(bundle) as session:
        segmentation = session.segment(tensors["image"].numpy())
        assert segmentation.fit == "resized"
        assert_same(
            (segmentation.labels, scores.numpy()), tensors, session, reference, tensors["labels"]
        )
    graph = onnx.load(str(bundle / "model.b1.onnx"), load_external_data=False).graph
    # Sizes are static: nothing is decided while it runs.
    dynamic = {"NonZero", "If", "Loop", "TopK", "Shape", "ScatterND"}
    assert not dynamic & {node.op_type for node in graph.node}
    proved("bundles with query heads equal to the frameworks", 1)


def test_size_that_is_not_padded_as_published_is_refused():
    network = Segmentor(detectron2("mask2former_r50")).eval()
    with pytest.raises(ExportError, match=r"multiples of 32 .* Give 128x160"):
        network_to_export(network, ExportOptions(size=(97, 131)))
    free = Segmentor(openmmlab("mask2former_swin")).eval()
    assert network_to_export(free, ExportOptions(size=(97, 131)))
