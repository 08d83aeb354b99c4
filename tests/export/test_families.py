"""Bundles of networks over MiT, Swin and ConvNeXt, from their files, against their frameworks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.runtime import open_session, read_image

TOLERANCE = 2e-5
WHOLE = {"test": {"mode": "whole"}}


def case_of(oracle: Path, family: str, case: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    folder = oracle / "families" / family
    index = json.loads((folder / "fdconv_index.json").read_text())["cases"][case]
    return index, load_file(folder / f"fdconv_{case}.safetensors"), folder


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("segformer_mit", "b"),
        ("segformer_mit", "c"),
        ("upernet_swin", "b"),
        ("upernet_swin", "s"),
        ("upernet_convnext", "b"),
        ("upernet_convnext", "c"),
        ("mask2former_swin", "b"),
    ],
)
def test_bundle_equals_the_framework(
    oracle: Path, tmp_path: Path, family: str, case: str, proved: Any
) -> None:
    """Odd sizes, maps smaller than windows, the config's own pipeline, and slide mode."""
    index, tensors, folder = case_of(oracle, family, case)
    height, width = index["image_hw"]
    slides = index["mode"]["mode"] == "slide"
    overrides: dict[str, Any] = {} if slides else dict(WHOLE)
    if case != "c":  # without the pipeline's resize
        overrides["preprocessing"] = {"scale": (width, height)}
    size = None if slides else tuple(index["meta"]["img_shape"])
    bundle = export_checkpoint(
        folder / "fdconv_train.pth", tmp_path / "bundle", size=size, overrides=overrides
    )
    with open_session(bundle.path) as session:
        found = session.segment(read_image(folder / index["image"]))
        assert found.fit == "resized"
        if "input" in tensors:
            scores = torch.from_numpy(session.run(tensors["input"].numpy()))
            scores = torch.nn.functional.interpolate(scores, (height, width), mode="bilinear")[0]
            expected = tensors["seg_logits"]
            step = 2 if index["subsampled"] else 1
            error = (scores[:, ::step, ::step] - expected).abs().max() / expected.abs().max()
            assert float(error) <= TOLERANCE
    differing = found.labels != tensors["pred"].numpy()
    assert differing.sum() <= index["pixels_top2_margin_below_1e4_of_absmax"]
    proved("bundles of other families equal to their frameworks", 1)


def test_mask_rcnn_over_convnext_equals_mmdetection(oracle: Path, tmp_path: Path) -> None:
    index, tensors, folder = case_of(oracle, "mask_rcnn_convnext", "b")
    height, width = index["image_hw"]
    bundle = export_checkpoint(
        folder / "fdconv_train.pth",
        tmp_path / "bundle",
        size=tuple(index["meta"]["batch_input_shape"]),
        overrides={"preprocessing": {"scale": (width, height)}},
    )
    with open_session(bundle.path) as session:
        found = session.detect(read_image(folder / index["image"]))
    assert len(found.scores) == index["detections"]
    np.testing.assert_allclose(found.scores, tensors["det_scores"].numpy(), atol=TOLERANCE)
    np.testing.assert_array_equal(found.labels, tensors["det_labels"].numpy())
    np.testing.assert_allclose(found.boxes, tensors["det_bboxes"].numpy(), atol=0.01)
