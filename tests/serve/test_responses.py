from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.serve.responses import best_type, class_rings, run_lengths


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([np.uint8, np.uint16]),
    st.integers(0, 99),
)
def test_run_lengths_round_trip(height: int, width: int, dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, 5), (height, width)).astype(dtype)
    found = run_lengths(labels)
    assert np.array_equal(
        np.repeat(found["values"], found["counts"]).reshape(found["size"]), labels
    )
    assert all(count > 0 for count in found["counts"])
    assert all(a != b for a, b in zip(found["values"], found["values"][1:], strict=False))


def test_run_lengths_go_along_rows() -> None:
    found = run_lengths(np.array([[0, 0, 0, 0], [0, 2, 2, 2]], np.uint8))
    assert found == {"size": [2, 4], "counts": [5, 3], "values": [0, 2]}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "a/x"),
        (",", "a/x"),
        ("*/*", "a/x"),
        ("a/*", "a/x"),
        ("b/*", "b/y"),
        ("b/y, a/x", "a/x"),
        ("a/x;q=0.4, b/y;q=0.6", "b/y"),
        ("a/x;q=0, */*", "b/y"),
        ("A/X", "a/x"),
        ("a/x; version=1; q=1", "a/x"),
        ("c/z", None),
        ("a/x;q=0", None),
        ("*/*;q=0.000", None),
        (";;;", None),
    ],
)
def test_best_type(accept: str, expected: str | None) -> None:
    assert best_type(accept, ["a/x", "b/y"]) == expected


@given(st.text(max_size=60))
def test_any_accept_header_is_read(accept: str) -> None:
    assert best_type(accept, ["a/x"]) in ("a/x", None)


def filled(rings: list[list[int]], height: int, width: int) -> np.ndarray:
    """Even-odd filling, by the pixels' centres: each vertical edge flips what is right of it."""
    out = np.zeros((height, width), bool)
    for ring in rings:
        points = np.array(ring).reshape(-1, 2)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            assert (x0 == x1) != (y0 == y1)  # along one axis, and of some length
            if x0 == x1:
                out[min(y0, y1) : max(y0, y1), x0:] ^= True
    return out


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_filling_the_rings_gives_the_class_back(
    height: int, width: int, classes: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)
    for number in range(classes + 1):
        rings = class_rings(labels, number)
        assert np.array_equal(filled(rings, height, width), labels == number)


def test_a_square_with_a_hole() -> None:
    labels = np.ones((4, 4), np.uint8)
    labels[1:3, 1:3] = 0
    rings = class_rings(labels, 1)
    assert sorted(map(len, rings)) == [8, 8]
    assert [0, 0, 4, 0, 4, 4, 0, 4] in rings


def test_pixels_that_touch_at_a_corner_are_apart() -> None:
    assert len(class_rings(np.array([[1, 0], [0, 1]]), 1)) == 2
    assert len(class_rings(np.array([[0, 1], [1, 0]]), 1)) == 2
