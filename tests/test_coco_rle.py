"""Run lengths, held against pycocotools' own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from fdconv_deploy.coco_rle import area, compress, decode, decompress, encode

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


def theirs(mask: np.ndarray) -> dict:
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


@given(masks)
def test_encode_gives_the_characters_of_pycocotools(mask: np.ndarray) -> None:
    found = encode(mask)
    assert found == theirs(mask)
    assert np.array_equal(decode(found), mask)
    assert area(found) == int(mask.sum()) == coco.area({**found, "counts": found["counts"]})


@given(masks, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_encode_part_is_as_the_whole(part, above: int, below: int, left: int, right: int) -> None:
    whole = np.pad(part, ((above, below), (left, right)))
    size = whole.shape[0], whole.shape[1]
    assert encode(part, above, left, size) == theirs(whole)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (700, 900)])
@pytest.mark.parametrize("value", [False, True])
def test_encode_empty_and_full_masks(size: tuple[int, int], value: bool) -> None:
    mask = np.full(size, value)
    assert encode(mask) == theirs(mask)
    assert np.array_equal(decode(encode(mask)), mask)


def test_encode_part_that_is_empty() -> None:
    empty = np.zeros((4, 6), np.bool_)
    assert encode(np.zeros((0, 0), np.bool_), 0, 0, (4, 6)) == theirs(empty)
    assert encode(np.zeros((0, 3), np.bool_), 4, 2, (4, 6)) == theirs(empty)


def test_encode_large_masks() -> None:
    y, x = np.mgrid[:1080, :1920]
    mask = ((y - 500) ** 2 / 90000 + (x - 900) ** 2 / 400000 < 1) & ((x // 7 + y // 11) % 3 > 0)
    assert encode(mask) == theirs(mask)
    assert np.array_equal(decode(encode(mask)), mask)


@given(st.lists(st.integers(0, 1 << 31), min_size=1, max_size=30))
def test_compress_round_trip(counts: list[int]) -> None:
    assert decompress(compress(np.array(counts))).tolist() == counts


@pytest.mark.parametrize("text", ["", "\x20", "ü4", "P", "o" * 13 + "0"])
def test_decompress_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="compressed run lengths"):
        decompress(text)


def test_decode_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="5 x 5"):
        decode({**encode(np.ones((4, 4), np.bool_)), "size": [5, 5]})


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"size": [1.5, 2], "counts": "3"}, "the size [1.5, 2]; expected [height, width]"),
        ({"size": [2], "counts": "3"}, "the size [2]"),
        ({"size": [-1, -3], "counts": "3"}, "the size [-1, -3]"),
        ({"size": None, "counts": "3"}, "the size None"),
        ({"size": "13", "counts": "3"}, "the size '13'"),
        ({"counts": "3"}, "the size None"),
        ({"size": [2**40, 2**40], "counts": "3"}, "at most 536,870,912 pixels"),
        ({"size": [1, 3], "counts": [3]}, "counts of type list; expected text"),
        ({"size": [1, 3], "counts": b"3"}, "counts of type bytes; expected text"),
        ({"size": [1, 3]}, "counts of type NoneType"),
        ("3", "the size None"),
        (None, "the size None"),
        # Numbers whose sum is 1 in 64 bits, were it not looked at first.
        ({"size": [1, 1], "counts": compress(np.array([1 << 58, *[1 << 58] * 63, 1]))}, "1 x 1"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_decode_names_what_is_no_mask(told, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode(told)
    assert says in str(caught.value)


@pytest.mark.parametrize("told", [{"size": [1, 1]}, None, {"counts": 3}])
def test_area_names_what_is_no_mask(told) -> None:
    with pytest.raises(ValueError, match="counts of type"):
        area(told)


@given(
    st.fixed_dictionaries(
        {
            "size": st.lists(st.one_of(st.integers(-2, 40), st.floats(), st.text()), max_size=3),
            "counts": st.one_of(st.text(alphabet=[chr(c) for c in range(40, 120)]), st.none()),
        }
    )
)
def test_decode_gives_a_mask_or_a_value_error(told) -> None:
    try:
        found = decode(told)
    except ValueError:
        return
    assert found.shape == tuple(told["size"])
