"""What is timed, and what is refused before anything is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency.targets import TORCH_BACKENDS, Side, plan
from fdconv_deploy.runtime import BACKENDS


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    file = tmp_path / "network.pth"
    file.touch()  # not read before a child does
    return file


def test_bundles_and_checkpoints_by_default(toy_bundle, other_bundle, checkpoint):
    made = plan([toy_bundle, other_bundle, checkpoint], threads=1)
    assert [(side.kind, side.backend, side.batch) for side in made.sides] == [
        ("bundle", "auto", 1), ("bundle", "auto", 4), ("bundle", "auto", 1),
        ("checkpoint", "eager", 1), ("checkpoint", "eager", 4),
    ]  # fmt: skip
    assert made.sides[-1].size == (32, 48)
    assert [(one.what, one.why) for one in made.skipped] == [
        ("other, batch 4", "It has graphs of 1.")
    ]


def test_every_backend_there_is(toy_bundle, checkpoint):
    made = plan([toy_bundle, checkpoint], backends=["all", "eager"], batches=[4], threads=1)
    assert [side.backend for side in made.sides if side.kind == "bundle"] == list(BACKENDS)
    of_torch = {side.backend: side.named for side in made.sides if side.kind == "checkpoint"}
    assert of_torch == {name: name == "eager" for name in TORCH_BACKENDS}


def test_native_operators_beside_portable_ones(toy_bundle, checkpoint):
    made = plan([toy_bundle, checkpoint], batches=[1], native=[False, True], threads=1)
    found = [(side.kind, side.backend, side.native) for side in made.sides]
    assert found == [
        ("bundle", "onnxruntime-cpu", False), ("bundle", "onnxruntime-cpu", True),
        ("checkpoint", "eager", None),
    ]  # fmt: skip
    assert [side.name for side in made.sides][1] == "toy, onnxruntime-cpu, native, fp32, batch 1"
    with pytest.raises(FDConvError, match="Native operators run bundles in 'onnxruntime-cpu'"):
        plan([checkpoint], native=[True], threads=1)


def test_a_service_alone():
    (side,) = plan([], urls=["http://127.0.0.1:1"], threads=2).sides
    assert (side.kind, side.backend, side.batch) == ("service", "http", 1)
    assert side.name.startswith("http://127.0.0.1:1, http")


def test_a_side_survives_its_journey(toy_bundle):
    (side,) = plan([toy_bundle], batches=[4], threads=3).sides
    for one in (side, replace(side, size=(3, 5), overrides={"backbone.style": "caffe"})):
        assert Side.from_json(one.as_json()) == one
    assert side.name == "toy, auto, fp32, batch 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["torch"]}, "There is no backend 'torch'; there are all, auto, tensorrt"),
        ({"backends": ["eager"]}, "Backend 'eager' runs checkpoints, and none was given"),
        ({"batches": [3]}, "Nothing can be timed. toy, batch 3: It has graphs of 1, 4."),
        ({"batches": [1, 3]}, "No bundle has a graph of batch 3. It has graphs of 1, 4. Export"),
        ({"batches": [4], "whole": True}, "A whole request is one image's"),
    ],
)
def test_mistakes(toy_bundle, options, message):
    with pytest.raises(FDConvError, match=message):
        plan([toy_bundle], threads=1, **options)


def test_mistakes_about_paths(toy_bundle, checkpoint, tmp_path):
    with pytest.raises(FDConvError, match="Give a bundle's folder, a checkpoint, or --url"):
        plan([], threads=1)
    with pytest.raises(FDConvError, match="none does not exist"):
        plan([tmp_path / "none"], threads=1)
    with pytest.raises(FDConvError, match=r"'tensorrt' runs bundles \(fdconv export\), and none"):
        plan([checkpoint], backends=["tensorrt"], threads=1)
    with pytest.raises(FDConvError, match="no manifest"):
        plan([tmp_path], threads=1)
