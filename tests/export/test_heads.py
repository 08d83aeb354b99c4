"""Bundles of networks that real mmsegmentation made, against what it computed with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.runtime import Bundle, open_session
from tests.export.graphs import relative

REAL = Path(__file__).parents[1] / "real_packages" / "mmsegmentation"
WHOLE = ("psp", "aspp", "sep_aspp", "sep_aspp_coarse", "fcn_joined")
SLIDING = ("psp_aligned", "sep_aspp_aligned")
# (height, width) that the fixtures' pipeline resizes its images to.
SIZE = (33, 43)
CROP = (25, 31)


def tensors_of(name: str) -> dict[str, NDArray]:
    return load_file(REAL / f"{name}.safetensors")


@pytest.fixture(scope="module", params=[*WHOLE, *SLIDING])
def exported(request, tmp_path_factory) -> tuple[str, Bundle]:
    """A network tested on whole images at their size, a sliding one at its crop's."""
    name = request.param
    path = tmp_path_factory.mktemp(name) / "bundle"
    size = SIZE if name in WHOLE else None
    return name, export_checkpoint(REAL / f"{name}.pth", path, size=size, batches=(1, 2))


def assert_equal_labels(found: NDArray, tensors: dict[str, NDArray]) -> None:
    """Equal wherever mmsegmentation's own two best classes are not a float's noise apart."""
    sure = tensors["margin"] > 1e-4 * np.abs(tensors["logits"]).max()
    assert sure.mean() > 0.98
    np.testing.assert_array_equal(found[sure], tensors["labels"][sure])


@torch.no_grad()
def test_bundle_gives_the_logits_of_mmsegmentation(exported):
    """Of the whole image; of a crop, those of the network, which tests/nn compares with it."""
    name, bundle = exported
    tensors = tensors_of(name)
    x, expected = tensors["input"], tensors["head_logits"]
    if name in SLIDING:
        x = np.ascontiguousarray(x[..., -CROP[0] :, -CROP[1] :])
        expected = load_segmentor(REAL / f"{name}.pth")(torch.from_numpy(x)).numpy()
    with open_session(bundle.path) as session:
        one = session.run(x)
        two = session.run(np.concatenate([x[..., ::-1], x]))
    assert relative(one, expected) <= 2e-5
    assert relative(two[1:], expected) <= 2e-5


def test_segment_gives_the_labels_of_mmsegmentation(exported):
    """Resize, network or sliding window, resize to the network's size and to the image's."""
    name, bundle = exported
    tensors = tensors_of(name)
    with open_session(bundle.path) as session:
        found = session.segment(tensors["image"])
    assert_equal_labels(found.labels, tensors)


@pytest.mark.parametrize("name", ["psp", "sep_aspp"])
def test_half_precision_keeps_the_classes(name, tmp_path):
    bundle = export_checkpoint(
        REAL / f"{name}.pth", tmp_path / "bundle", size=SIZE, precision="fp16"
    )
    tensors = tensors_of(name)
    with open_session(bundle.path) as session:
        logits = session.run(tensors["input"])
        found = session.segment(tensors["image"])
    assert relative(logits, tensors["head_logits"]) <= 2e-2
    sure = tensors["margin"] > 2e-2 * np.abs(tensors["logits"]).max()
    assert np.array_equal(found.labels[sure], tensors["labels"][sure])


@pytest.mark.parametrize(("name", "attribute"), [("aspp", "dilations"), ("sep_aspp", "group")])
def test_eight_bits_reach_the_head(name, attribute, tmp_path):
    """Its widest and its depthwise convolutions among them."""
    images = [tensors_of(other)["image"] for other in WHOLE]
    bundle = export_checkpoint(
        REAL / f"{name}.pth",
        tmp_path / "bundle",
        size=SIZE,
        precision="int8",
        calibration=images,
        tolerance=0.1,
    )
    graph = onnx.load(bundle.model_path(1)).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    eight = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == "Conv" and {made.get(i) for i in node.input[:2]} == {"DequantizeLinear"}
    ]
    # The backbone has neither of them.
    assert {"dilations": [36, 36], "group": 16}[attribute] in [a[attribute] for a in eight]
    with open_session(bundle.path) as session:
        found = session.segment(tensors_of(name)["image"])
    assert (found.labels == tensors_of(name)["labels"]).mean() >= 0.9
