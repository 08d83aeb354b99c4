from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fdconv_deploy.runtime.postprocessing import label_map, logit_map


@pytest.fixture(scope="module")
def reference(oracle: Path) -> dict[str, np.ndarray]:
    return load_file(oracle / "segmentor" / "B_reference.safetensors")


def test_published_logits_and_labels(reference) -> None:
    head = reference["decode_logits_quarter"][0]
    sizes = ((125, 157), (125, 157), (125, 157))
    found = logit_map(head, *sizes, align_corners=False)
    expected = reference["logits"][0]
    assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max()
    assert np.array_equal(label_map(head, *sizes, align_corners=False), reference["argmax"])


def test_published_labels_at_the_images_own_size(reference) -> None:
    logits = reference["pipeline.logits_ori_shape"]
    sizes = ((90, 123), (90, 123), (90, 123))
    found = label_map(logits, *sizes, align_corners=False)
    assert np.array_equal(found, reference["pipeline.argmax"])


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(SIZES, SIZES, SIZES, st.booleans(), st.data())
def test_is_what_mmsegmentation_does_in_two_steps(head, network, image, align, data) -> None:
    torch = pytest.importorskip("torch")
    covered = tuple(data.draw(st.integers(1, n)) for n in network)
    logits = np.random.default_rng(0).uniform(-1, 1, (4, *head)).astype(np.float32)

    def step(x, size):
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=align)

    middle = step(torch.from_numpy(logits)[None], network)[:, :, : covered[0], : covered[1]]
    expected = step(middle, image)[0].numpy()
    found = logit_map(logits, network, covered, image, align_corners=align)
    assert np.abs(found - expected).max() <= 2e-6
    labels = label_map(logits, network, covered, image, align_corners=align)
    chosen = np.take_along_axis(expected, labels[None].astype(int), axis=0)[0]
    assert (chosen >= expected.max(axis=0) - 4e-6).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_one_logit_is_class_1_above_the_threshold(threshold: float) -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 2, (1, 9, 13)).astype(np.float32)
    sizes = ((17, 21), (15, 20), (33, 29))
    found = label_map(logits, *sizes, align_corners=False, threshold=threshold)
    score = torch.from_numpy(logit_map(logits, *sizes, align_corners=False)[0]).sigmoid()
    # As mmsegmentation's postprocess_result has it.
    assert np.array_equal(found, (score > threshold).numpy())
    assert found.dtype == np.uint8


def test_one_logit_without_a_threshold_is_refused() -> None:
    one, two = np.zeros((1, 2, 2), np.float32), np.zeros((2, 2, 2), np.float32)
    sizes = ((2, 2),) * 3
    with pytest.raises(ValueError, match="threshold=None"):
        label_map(one, *sizes, align_corners=False)
    with pytest.raises(ValueError, match=r"threshold=0\.3"):
        label_map(two, *sizes, align_corners=False, threshold=0.3)
