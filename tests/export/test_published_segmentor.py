"""A published checkpoint, file to labels, through its bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.runtime import Bundle, open_session, read_image

NAMES = ("B_r18b14_mmengine_published.pth", "B_r18b14_mmcv1.pth")


@pytest.fixture(scope="module")
def reference(oracle) -> dict[str, np.ndarray]:
    return load_file(oracle / "segmentor/B_reference.safetensors")


@pytest.fixture(scope="module", params=NAMES)
def image_bundle(oracle, request, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("image") / "bundle"
    return export_checkpoint(oracle / "segmentor" / request.param, path, size=(125, 157))


@pytest.fixture(scope="module")
def pipeline_bundle(oracle, tmp_path_factory) -> Bundle:
    """At the size the published keep-ratio resize gives its image."""
    path = tmp_path_factory.mktemp("pipeline") / "bundle"
    return export_checkpoint(oracle / "segmentor" / NAMES[0], path, size=(128, 175), batches=(1, 2))


def clear(logits: np.ndarray) -> np.ndarray:
    """Pixels whose two best classes are not within float noise, 1e-3, of each other."""
    best = np.sort(logits, axis=0)
    return best[-1] - best[-2] > 1e-3


def assert_equal_labels(found: np.ndarray, logits: np.ndarray, expected: np.ndarray) -> None:
    sure = clear(logits)
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[sure], expected[sure])


def test_logits_of_both_files(image_bundle, reference):
    with open_session(image_bundle.path) as session:
        quarter = session.run(reference["input"])
    expected = reference["decode_logits_quarter"]
    assert np.abs(quarter - expected).max() <= 1e-4 * np.abs(expected).max()
    logits = F.interpolate(torch.from_numpy(quarter), (125, 157), mode="bilinear").numpy()
    expected = reference["logits"]
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert_equal_labels(logits[0].argmax(0), expected[0], reference["argmax"])


def test_segment_gives_the_published_labels(image_bundle, reference, oracle):
    image = read_image(oracle / "segmentor/B_image.png")
    np.testing.assert_array_equal(image[..., ::-1], reference["image_bgr_u8"])
    with open_session(image_bundle.path) as session:
        found = session.segment(image)
    assert found.fit == "resized"
    assert_equal_labels(found.labels, reference["logits"][0], reference["argmax"])


def test_whole_pipeline(pipeline_bundle, reference, oracle):
    """Keep-ratio resize, network, logits back to the image's size, labels."""
    with open_session(pipeline_bundle.path) as session:
        quarter = session.run(reference["pipeline.input"])
        found = session.segment(read_image(oracle / "segmentor/B_pipeline_image.png"))
    logits = torch.from_numpy(quarter)
    for size in ((128, 175), (90, 123)):
        logits = F.interpolate(logits, size, mode="bilinear")
    expected = reference["pipeline.logits_ori_shape"]
    assert np.abs(logits[0].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert found.fit == "resized"
    assert found.labels.shape == (90, 123)
    assert_equal_labels(found.labels, expected, reference["pipeline.argmax"])


def test_manifest_knows_the_checkpoint(pipeline_bundle, oracle):
    manifest = pipeline_bundle.manifest
    content = (oracle / "segmentor" / NAMES[0]).read_bytes()
    assert manifest.checkpoint.name == NAMES[0]
    assert manifest.checkpoint.sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.architecture.classes[:3] == ("sky", "building", "road")
    assert manifest.architecture.palette[0] == (70, 130, 180)
    assert manifest.parity.max_rel <= 1e-4
    assert len(manifest.group_maps) == manifest.graph["fdconv_layers"] == 11


def test_nothing_of_the_machine_is_in_the_bundle(pipeline_bundle, oracle):
    for file in pipeline_bundle.path.iterdir():
        content = file.read_bytes()
        for folder in (oracle, Path(__file__).parent, pipeline_bundle.path.parent):
            assert str(folder).encode() not in content, file.name
