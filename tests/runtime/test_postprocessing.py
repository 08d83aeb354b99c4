from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fdconv_deploy.runtime.postprocessing import (
    ArrayRows,
    Taps,
    View,
    bilinear,
    labels_of,
    logits_of,
    view_of,
)
from fdconv_deploy.runtime.preprocessing import Prepared


def seen(logits, network, covered, image, align: bool = False) -> View:
    prepared = Prepared({}, network, "resized", covered, image)
    return view_of(logits, prepared, align_corners=align)


@pytest.fixture(scope="module")
def reference(oracle: Path) -> dict[str, np.ndarray]:
    return load_file(oracle / "segmentor" / "B_reference.safetensors")


def test_published_logits_and_labels(reference) -> None:
    head = reference["decode_logits_quarter"][0]
    sizes = ((125, 157), (125, 157), (125, 157))
    found = logits_of(seen(head, *sizes))
    expected = reference["logits"][0]
    assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max()
    assert np.array_equal(labels_of(seen(head, *sizes)), reference["argmax"])


def test_published_labels_at_the_images_own_size(reference) -> None:
    logits = reference["pipeline.logits_ori_shape"]
    sizes = ((90, 123), (90, 123), (90, 123))
    found = labels_of(seen(logits, *sizes))
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
    view = seen(logits, network, covered, image, align)
    found = logits_of(view)
    assert np.abs(found - expected).max() <= 2e-6
    labels = labels_of(view)
    chosen = np.take_along_axis(expected, labels[None].astype(int), axis=0)[0]
    assert (chosen >= expected.max(axis=0) - 4e-6).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_one_logit_is_class_1_above_the_threshold(threshold: float) -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 2, (1, 9, 13)).astype(np.float32)
    sizes = ((17, 21), (15, 20), (33, 29))
    found = labels_of(seen(logits, *sizes), threshold=threshold)
    score = torch.from_numpy(logits_of(seen(logits, *sizes))[0]).sigmoid()
    # As mmsegmentation's postprocess_result has it.
    assert np.array_equal(found, (score > threshold).numpy())
    assert found.dtype == np.uint8


def test_one_logit_without_a_threshold_is_refused() -> None:
    one, two = np.zeros((1, 2, 2), np.float32), np.zeros((2, 2, 2), np.float32)
    sizes = ((2, 2),) * 3
    with pytest.raises(ValueError, match="threshold=None"):
        labels_of(seen(one, *sizes))
    with pytest.raises(ValueError, match=r"threshold=0\.3"):
        labels_of(seen(two, *sizes), threshold=0.3)


SIZE = st.integers(1, 70)


def exact(n_in: int, n_out: int, align: bool) -> np.ndarray:
    """The (n_out, n_in) float64 matrix of a bilinear resize, from its definition."""
    out = np.zeros((n_out, n_in))
    for i in range(n_out):
        if align:
            x = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        else:
            x = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        left = min(int(x), n_in - 1)
        out[i, left] += 1 - (x - left)
        out[i, min(left + 1, n_in - 1)] += x - left
    return out


def resized(logits: np.ndarray, height: int, width: int, align: bool) -> np.ndarray:
    rows = bilinear(logits.shape[1], height, align_corners=align)
    columns = bilinear(logits.shape[2], width, align_corners=align)
    return logits_of(View(ArrayRows(logits), rows, columns))


@given(SIZE, SIZE, SIZE, SIZE, st.booleans(), st.integers(1, 9), st.integers(0, 99))
def test_resize_is_the_definition(h, w, out_h, out_w, align, classes, seed) -> None:
    logits = np.random.default_rng(seed).uniform(-1, 1, (classes, h, w)).astype(np.float32)
    expected = np.einsum(
        "yh,chw,xw->cyx",
        exact(h, out_h, align),
        logits.astype(np.float64),
        exact(w, out_w, align),
        optimize=True,
    )
    # Positions are torch's float32 ones: at 70 samples they are off by some 1e-5 of a pixel.
    assert np.abs(resized(logits, out_h, out_w, align) - expected).max() <= 4e-5


@given(SIZE, SIZE, SIZE, SIZE, st.booleans(), st.integers(0, 99))
def test_resize_is_torch_to_float_rounding(h, w, out_h, out_w, align, seed) -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(seed).uniform(-1, 1, (3, h, w)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], (out_h, out_w), mode="bilinear", align_corners=align
    )[0].numpy()
    assert np.abs(resized(logits, out_h, out_w, align) - expected).max() <= 1e-6


@given(SIZE, SIZE, SIZE, st.booleans(), st.data())
def test_two_resizes_are_one(n: int, middle: int, out: int, align: bool, data) -> None:
    kept = data.draw(st.integers(1, middle))  # the middle may be cut before the second
    first = bilinear(n, middle, align_corners=align)
    second = bilinear(kept, out, align_corners=align)
    both = second.after(first)
    values = np.random.default_rng(0).normal(size=n)
    stepwise = (first.weight * values[first.index]).sum(axis=1)[:kept]
    stepwise = (second.weight * stepwise[second.index]).sum(axis=1)
    assert np.allclose((both.weight * values[both.index]).sum(axis=1), stepwise, atol=1e-12)


@given(SIZE, SIZE, st.booleans(), st.data())
def test_a_matrix_is_its_taps(n_in: int, n_out: int, align: bool, data) -> None:
    taps = bilinear(n_in, n_out, align_corners=align)
    start = data.draw(st.integers(0, n_out - 1))
    stop = data.draw(st.integers(start + 1, n_out))
    low, high = taps.span(start, stop)
    assert 0 <= low < high <= n_in
    values = np.random.default_rng(0).normal(size=n_in)
    direct = (taps.weight * values[taps.index]).sum(axis=1)[start:stop]
    assert np.allclose(taps.matrix(start, stop) @ values[low:high], direct, atol=1e-6)
    assert (np.diff(taps.index, axis=0) >= 0).all()


def test_identity_is_recognised_and_exact() -> None:
    taps = bilinear(9, 9, align_corners=False)
    assert taps.identity
    assert not bilinear(9, 10, align_corners=False).identity
    logits = np.random.default_rng(0).normal(size=(3, 9, 9)).astype(np.float32)
    assert np.array_equal(logits_of(View(ArrayRows(logits), taps, taps)), logits)
    cut = bilinear(5, 5, align_corners=False).after(taps)
    assert cut.identity
    assert np.array_equal(logits_of(View(ArrayRows(logits), cut, cut)), logits[:, :5, :5])


@settings(max_examples=30, deadline=None)
@given(SIZE, SIZE, st.integers(1, 900), st.integers(1, 200), st.sampled_from([2, 7, 300]))
def test_labels_are_the_argmax_of_the_resized_logits(h, w, out_h, out_w, classes) -> None:
    logits = np.random.default_rng(h * w).normal(size=(classes, h, w)).astype(np.float32)
    rows = bilinear(h, out_h, align_corners=False)
    columns = bilinear(w, out_w, align_corners=False)
    found = labels_of(View(ArrayRows(logits), rows, columns))
    assert found.dtype == (np.uint16 if classes > 256 else np.uint8)
    assert np.array_equal(found, logits_of(View(ArrayRows(logits), rows, columns)).argmax(axis=0))


def test_ties_go_to_the_lowest_class() -> None:
    taps = bilinear(4, 40, align_corners=False)
    assert (labels_of(View(ArrayRows(np.ones((6, 4, 4), np.float32)), taps, taps)) == 0).all()
    logits = np.zeros((6, 4, 4), np.float32)
    logits[[2, 4]] = 1
    assert (labels_of(View(ArrayRows(logits), taps, taps)) == 2).all()


def test_150_classes_on_4k_take_little_memory() -> None:
    logits = np.random.default_rng(0).normal(size=(150, 64, 64)).astype(np.float32)
    rows, columns = (bilinear(64, n, align_corners=False) for n in (2160, 3840))
    tracemalloc.start()
    found = labels_of(View(ArrayRows(logits), rows, columns))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (2160, 3840)
    assert peak < 100e6  # all the logits would be 5 GB


def test_taps_of_one_sample() -> None:
    for align in (False, True):
        assert np.array_equal(
            resized(np.float32([[[3.0]]]), 4, 5, align), np.full((1, 4, 5), 3, np.float32)
        )
    assert Taps(np.zeros((1, 1), np.int64), np.ones((1, 1))).identity


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no Linux")
def test_no_other_thread_works_on_an_answer() -> None:
    """OpenBLAS's threads wait busily for each other; the products here are too small for that."""
    code = """
    import threading
    import time
    from pathlib import Path

    import numpy as np

    from fdconv_deploy.runtime.postprocessing import labels_of, paste, view_of
    from fdconv_deploy.runtime.preprocessing import Prepared

    def others():
        own = str(threading.get_native_id())
        tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != own]
        return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

    before = None
    while before != (before := others()):  # threads wait busily for a while once they are made
        time.sleep(0.2)
    random = np.random.default_rng(0)
    for classes in (5, 150):
        logits = random.normal(size=(classes, 64, 96)).astype(np.float32)
        for image in ((512, 768), (50, 70), (1000, 60)):
            prepared = Prepared({}, (256, 384), "resized", (256, 384), image)
            labels_of(view_of(logits, prepared, align_corners=False))
    box = np.array([5, 5, 700, 500], np.float32)
    paste(random.random((28, 28)).astype(np.float32), box, (512, 768), 0.5)
    assert others() == before
    """
    env = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env)
