from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.config import HeadConfig, Preprocessing, TestMode
from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime.postprocessing import View, bilinear, labels_of, logits_of
from fdconv_deploy.runtime.preprocessing import normalise
from fdconv_deploy.runtime.sliding_window import (
    SlidingRows,
    axis_starts,
    slide_stride,
    windows_of,
)
from tests.runtime import toy

PREPROCESSING = Preprocessing()


def head(classes: int, align_corners: bool = False) -> HeadConfig:
    return toy.architecture(classes, align_corners=align_corners).decode_head


@given(st.integers(1, 400), st.integers(1, 120), st.data())
def test_windows_cover_every_pixel_and_stay_inside(size: int, crop: int, data) -> None:
    stride = data.draw(st.integers(1, crop))
    starts = axis_starts(size, crop, stride)
    assert len(starts) == max(size - crop + stride - 1, 0) // stride + 1
    covered = np.zeros(size, int)
    for start in starts:
        assert start >= 0
        assert start + crop <= size or (start == 0 and crop > size)
        covered[start : start + crop] += 1
    assert (covered > 0).all()
    assert starts == sorted(starts)


def test_windows_as_published() -> None:
    found = windows_of((100, 130), (64, 64), (40, 40))
    assert [(w.top, w.left, w.bottom, w.right) for w in found] == [
        *((0, 0, 64, 64), (0, 40, 64, 104), (0, 66, 64, 130)),
        *((36, 0, 100, 64), (36, 40, 100, 104), (36, 66, 100, 130)),
    ]


def slide_inference(image: np.ndarray, crop, stride, align: bool) -> np.ndarray:
    """mmsegmentation's slide_inference in torch, padding crops that are too small."""
    torch = pytest.importorskip("torch")
    x = normalise(image, PREPROCESSING)
    h, w = x.shape[1:]
    preds, count = torch.zeros(1, 5, h, w), torch.zeros(1, 1, h, w)
    for i in range(max(h - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(w - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            y2, x2 = min(i * stride[0] + crop[0], h), min(j * stride[1] + crop[1], w)
            y1, x1 = max(y2 - crop[0], 0), max(x2 - crop[1], 0)
            tile = np.zeros((1, 3, *crop), np.float32)
            tile[0, :, : y2 - y1, : x2 - x1] = x[:, y1:y2, x1:x2]
            logits = torch.nn.functional.interpolate(
                torch.from_numpy(toy.reference_logits(tile)),
                crop,
                mode="bilinear",
                align_corners=align,
            )
            preds[:, :, y1:y2, x1:x2] += logits[:, :, : y2 - y1, : x2 - x1]
            count[:, :, y1:y2, x1:x2] += 1
    assert (count > 0).all()
    return (preds / count)[0].numpy()


def sliding(image: np.ndarray, crop, stride, align: bool = False, batch: int = 3) -> SlidingRows:
    def infer(inputs: np.ndarray) -> np.ndarray:
        assert 1 <= len(inputs) <= batch
        assert inputs.shape[1:] == (3, *crop)
        return toy.reference_logits(inputs)

    return SlidingRows(image, PREPROCESSING, crop, stride, infer, head(5, align), batch)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 110),
    st.integers(1, 110),
    st.sampled_from([(32, 32), (16, 48), (64, 20)]),
    st.booleans(),
    st.integers(1, 5),
    st.data(),
)
def test_is_slide_inference(h, w, crop, align, batch, data) -> None:
    stride = tuple(data.draw(st.integers(max(c // 5, 1), c)) for c in crop)
    image = np.random.default_rng(h * w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    expected = slide_inference(image, crop, stride, align)
    source = sliding(image, crop, stride, align, batch)
    assert source.padded == (h < crop[0] or w < crop[1])
    same = (bilinear(h, h, align_corners=align), bilinear(w, w, align_corners=align))
    found = logits_of(View(source, *same))
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_labels_at_another_size_are_as_published() -> None:
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (90, 117, 3), dtype=np.uint8)
    logits = torch.from_numpy(slide_inference(image, (32, 48), (20, 31), False))[None]
    expected = torch.nn.functional.interpolate(logits, (200, 150), mode="bilinear")[0].numpy()
    source = sliding(image, (32, 48), (20, 31))
    found = labels_of(source.view(200, 150))
    chosen = np.take_along_axis(expected, found[None].astype(int), axis=0)[0]
    assert (chosen >= expected.max(axis=0) - 1e-5 * np.abs(expected).max()).all()
    assert (found == expected.argmax(axis=0)).mean() > 0.999


def test_every_window_runs_once() -> None:
    ran = []
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)

    def infer(inputs: np.ndarray) -> np.ndarray:
        ran.append(len(inputs))
        return toy.reference_logits(inputs)

    source = SlidingRows(image, PREPROCESSING, (32, 48), (16, 24), infer, head(5), 4)
    labels_of(source.view(600, 400))
    count = len(windows_of((300, 200), (32, 48), (16, 24)))
    assert sum(ran) == count
    assert ran == [4] * (count // 4) + ([count % 4] if count % 4 else [])  # batches are filled


def test_memory_does_not_grow_with_height() -> None:
    def peak(height: int) -> int:
        image = np.zeros((height, 96, 3), np.uint8)

        def infer(inputs: np.ndarray) -> np.ndarray:
            return np.zeros((len(inputs), 60, 16, 16), np.float32)

        source = SlidingRows(
            image,
            PREPROCESSING,
            (64, 64),
            (32, 32),
            infer,
            head(60),
            2,
        )
        tracemalloc.start()
        labels_of(source.view(*image.shape[:2]))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # Ten times the height: 36 MB more of window logits if they were kept, 0.9 MB of labels.
    assert peak(10560) - peak(1056) < 3e6


class TestStride:
    def test_is_the_networks(self) -> None:
        assert slide_stride(TestMode(mode="slide", stride=(5, 6)), (8, 8)) == (5, 6)

    def test_missing(self) -> None:
        with pytest.raises(BundleError, match="records no stride"):
            slide_stride(TestMode(mode="slide"), (8, 8))

    @pytest.mark.parametrize("stride", [(4, 9), (9, 4)])
    def test_that_leaves_gaps(self, stride) -> None:
        with pytest.raises(BundleError, match="between windows"):
            slide_stride(TestMode(mode="slide", stride=stride), (8, 8))
