"""What is timed, and what is refused before anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency.networks import (
    TORCH_BACKENDS,
    RunOptions,
    Skipped,
    Target,
    expand_targets,
)
from fdconv_deploy.runtime import BACKENDS


def plan(paths: list[Path], *, threads: int = 1, whole: bool = False, **how):
    return expand_targets(paths, RunOptions(threads=threads, whole=whole), **how)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    file = tmp_path / "network.pth"
    file.touch()  # not read before a child does
    return file


def test_bundles_and_checkpoints_by_default(toy_bundle, other_bundle, checkpoint):
    targets, skipped = plan([toy_bundle, other_bundle, checkpoint])
    assert [(one.kind, one.backend, one.batch) for one in targets] == [
        ("bundle", "auto", 1), ("bundle", "auto", 4), ("bundle", "auto", 1),
        ("checkpoint", "eager", 1), ("checkpoint", "eager", 4),
    ]  # fmt: skip
    assert targets[-1].options.size == (32, 48)
    assert skipped == [Skipped("other, batch 4", "It has graphs of 1.")]


def test_every_backend_there_is(toy_bundle, checkpoint):
    targets, _ = plan([toy_bundle, checkpoint], backends=["all", "eager"], batches=[4])
    assert [one.backend for one in targets if one.kind == "bundle"] == list(BACKENDS)
    of_torch = {one.backend: one.named for one in targets if one.kind == "checkpoint"}
    assert of_torch == {name: name == "eager" for name in TORCH_BACKENDS}


def test_native_operators_beside_portable_ones(toy_bundle, checkpoint):
    targets, _ = plan([toy_bundle, checkpoint], batches=[1], native=[False, True])
    found = [(one.kind, one.backend, one.native) for one in targets]
    assert found == [
        ("bundle", "onnxruntime-cpu", False), ("bundle", "onnxruntime-cpu", True),
        ("checkpoint", "eager", None),
    ]  # fmt: skip
    assert targets[1].name == "toy, onnxruntime-cpu, native, fp32, batch 1"
    (nchw,), _ = plan([toy_bundle], batches=[1], native=["nchw"])
    assert nchw.name == "toy, onnxruntime-cpu, native in NCHW, fp32, batch 1"
    targets, _ = plan([toy_bundle], batches=[1], native=[True], backends=["openvino-bf16"])
    assert [(one.backend, one.native) for one in targets] == [("openvino-bf16", True)]
    with pytest.raises(
        FDConvError, match="Native operators run bundles in onnxruntime-cpu, openvino"
    ):
        plan([checkpoint], native=[True])


def test_a_service_alone():
    ((target,), _) = plan([], urls=["http://127.0.0.1:1"])
    assert (target.kind, target.backend, target.batch) == ("service", "http", 1)
    assert target.name.startswith("http://127.0.0.1:1, http")


def test_a_target_survives_its_journey_to_a_worker(toy_bundle):
    ((target,), _) = plan([toy_bundle], batches=[4], threads=3)
    options = RunOptions(threads=3, size=(3, 5), overrides={"backbone.style": "caffe"})
    for one in (target, target.model_copy(update={"options": options})):
        assert Target.model_validate_json(one.model_dump_json()) == one
    assert target.name == "toy, auto, fp32, batch 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["torch"]}, "There is no backend 'torch'; there are all, auto, tensorrt"),
        ({"backends": ["eager"]}, "Backend 'eager' runs checkpoints, and none was given"),
        ({"batches": [3]}, "No bundle has a graph of batch 3. It has graphs of 1, 4. Export"),
        ({"batches": [1, 3]}, "No bundle has a graph of batch 3. It has graphs of 1, 4. Export"),
        ({"batches": [4], "whole": True}, "A whole request is one image's"),
    ],
)
def test_mistakes(toy_bundle, options, message):
    with pytest.raises(FDConvError, match=message):
        plan([toy_bundle], **options)


def test_mistakes_about_paths(toy_bundle, checkpoint, tmp_path):
    with pytest.raises(FDConvError, match="Give a bundle's folder, a checkpoint, or --url"):
        plan([])
    with pytest.raises(FDConvError, match="none does not exist"):
        plan([tmp_path / "none"])
    with pytest.raises(FDConvError, match=r"'tensorrt' runs bundles \(fdconv export\), and none"):
        plan([checkpoint], backends=["tensorrt"])
    with pytest.raises(FDConvError, match="no manifest"):
        plan([tmp_path])
