"""``fdconv.nchwc::FrequencyBandModulation`` against float64, in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.nn import FDConv2d
from tests.ops.native.blocked import pack, run_node, unpack
from tests.ops.single import fdconv_node, layer_model
from tests.ops.test_frequency_band_modulation import K_LISTS, by_reference, layer_of
from tests.reference.lively import lively_input

CHANNELS = 18
# Lengths of 1, 2 and 3, odd ones, multiples of 2 and of 4; rows symmetric or not.
SIZES = [
    (12, 8), (13, 15), (66, 97), (1, 1), (2, 3), (3, 2), (1, 9), (6, 10), (32, 48), (30, 64),
    (128, 128), (64, 64),
]  # fmt: skip
BLOCKS = [8, 16]


def by_node(
    folded: FoldedConv, x: np.ndarray, block: int, library: Path, threads: int = 1,
    changes: dict[str, Any] | None = None, channels: slice = slice(None),
) -> np.ndarray:  # fmt: skip
    """The node of a layer's graph as one on blocks, of some of its channels."""
    model = layer_model(folded, len(x))
    node = fdconv_node(model, "FrequencyBandModulation")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kept = {k: given[k] for k in ("groups", "feature_size", "complex_rows", "softmax")}
    last = (changes or {}).get("channels_last")
    (y,) = run_node(
        "FrequencyBandModulation",
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else pack(x, block),
        [constants[node.input[1]][channels], *(constants[n] for n in node.input[2:])],
        kept | {"block": block} | (changes or {}), library, threads=threads,
    )  # fmt: skip
    if last:
        return y.transpose(0, 3, 1, 2)
    assert not np.any(pack(unpack(y, block, x.shape[1]), block) != y)  # padding stays zero
    return unpack(y, block, x.shape[1])


def check(
    layer: FDConv2d, folded: FoldedConv, batch: int, block: int, library: Path, threads: int = 1
) -> None:
    x = lively_input((batch, CHANNELS, *folded.input_size)).numpy()
    assert layer.FBM is not None
    expected = by_reference(layer.FBM, x.astype(np.float64))
    actual = by_node(folded, x, block, library, threads)
    assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("k_list", K_LISTS, ids=str)
@pytest.mark.parametrize("act", ["sigmoid", "tanh", "softmax"])
@pytest.mark.parametrize("groups", [1, 2, 9, 65])
@pytest.mark.parametrize("lowfreq", [False, True])
def test_every_form(
    k_list: tuple[int, ...], act: str, groups: int, lowfreq: bool, block: int, library: Path
) -> None:
    for size, batch in (((12, 8), 1), ((13, 15), 3)):
        config = dict(k_list=k_list, act=act, spatial_group=groups, lowfreq_att=lowfreq)
        check(*layer_of(size, **config), batch, block, library)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sizes_and_kernels(size: tuple[int, int], kernel: int, block: int, library: Path) -> None:
    layer, folded = layer_of(size, k_list=[2, 4, 8], spatial_kernel=kernel)
    check(layer, folded, 2, block, library)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [*SIZES, (14, 11), (5, 40)], ids=str)
def test_masks_of_the_first_version(size: tuple[int, int], block: int, library: Path) -> None:
    check(*layer_of(size, k_list=[2, 4, 8], masks="per_call"), 2, block, library)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(13, 15), (32, 48)], ids=str)
def test_channels_last_are_the_same(
    size: tuple[int, int], groups: int, block: int, library: Path
) -> None:
    _, folded = layer_of(size, k_list=[2, 4, 8], spatial_group=groups, channels=48)
    x = lively_input((2, 48, *size)).numpy()
    blocked = by_node(folded, x, block, library)
    last = by_node(folded, x, block, library, changes={"channels_last": 1})
    assert np.array_equal(blocked, last)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [(40, 33), (64, 64)])
def test_threads_do_not_change_a_bit(size: tuple[int, int], groups: int, library: Path) -> None:
    _, folded = layer_of(size, k_list=[2, 4, 8], spatial_group=groups)
    x = lively_input((3, CHANNELS, *size)).numpy()
    first, *others = (by_node(folded, x, 16, library, threads) for threads in (1, 2, 5))
    assert all(np.array_equal(first, other) for other in others)


def test_the_way_the_work_is_cut_changes_nothing(library: Path) -> None:
    """By blocks where there is one for each processor, else by rows of each: here of one block."""
    _, folded = layer_of((40, 33), k_list=[2, 4, 8])
    few, padded = slice(0, 8), lively_input((64, 8, 40, 33)).numpy()
    many = by_node(folded, padded, 8, library, 3, channels=few)
    for image in (0, 63):
        alone = by_node(folded, padded[image : image + 1], 8, library, 3, channels=few)
        assert np.array_equal(many[image : image + 1], alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_size": [0, 8]}, {"feature_size": [12, 7]}, {"feature_size": [64, 8]},
        {"feature_size": [12, 2**40]}, {"groups": 5}, {"groups": 0}, {"complex_rows": 1},
        {"block": 4}, {"block": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], library: Path) -> None:
    _, folded = layer_of((12, 8), k_list=[2, 4, 8])
    x = lively_input((1, CHANNELS, 12, 8)).numpy()
    with pytest.raises(Exception, match="its constants are not laid out"):
        by_node(folded, x, 8, library, changes=changes)
