"""A whole published pipeline: image file to labels, the network itself standing in for a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime import Bundle, read_image
from fdconv_deploy.runtime.postprocessing import logits_of, view_of
from fdconv_deploy.runtime.preprocessing import Prepared
from tests.runtime import toy
from tests.runtime.test_session import FakeBackend


def test_keep_ratio_resize_network_and_back(oracle: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from fdconv_deploy.checkpoints import load_checkpoint

    folder = oracle / "segmentor"
    reference = load_file(folder / "B_reference.safetensors")
    network = load_checkpoint(folder / "B_r18b14_mmengine_published.pth")
    seen: list[np.ndarray] = []

    def answer(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            seen.append(network(torch.from_numpy(x)).numpy())
        return seen[-1]

    arch = toy.architecture(7, preprocessing=Preprocessing(scale=(256, 128)))
    manifest = toy.manifest(128, 175, (1,), arch)
    session = toy.session(Bundle(tmp_path, manifest), FakeBackend(answer))
    found = session.segment(read_image(folder / "B_pipeline_image.png"))

    expected = reference["pipeline.logits_ori_shape"]
    prepared = Prepared({}, (128, 175), "resized", (128, 175), (90, 123))
    logits = logits_of(view_of(seen[0][0], prepared, align_corners=False))
    assert found.fit == "resized"
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    # The index allows for near-ties: pixels whose two best classes are within float noise.
    best = np.sort(expected, axis=0)
    clear = best[-1] - best[-2] > 1e-3
    assert np.array_equal(found.labels[clear], reference["pipeline.argmax"][clear])
    assert (found.labels == reference["pipeline.argmax"]).mean() > 0.999
