"""What is packaged: files that load, scenes that are the drawn ones, scores that hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.streets.scenes import CLASSES, PALETTE, draw_scene
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import (
    HELD_OUT_SEEDS,
    assets_folder,
    held_out,
    packaged_checkpoint,
    plain_checkpoint,
)
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.nn import FDConv2d
from tests.reference import segmentor as published

MIB = 2**20


@pytest.fixture(scope="module")
def record():
    return json.loads((assets_folder() / "training.json").read_text())


@pytest.fixture(scope="module")
def fdconv():
    return load_checkpoint(packaged_checkpoint())


def predict(network, rgb):
    preprocessing = network.architecture.preprocessing
    mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    x = ((rgb.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None]
    return published.predict(network, torch.from_numpy(x)).argmax(1)[0].numpy()


def dynamic_layers(network):
    return [m for m in network.modules() if isinstance(m, FDConv2d) and m.is_dynamic]


def test_files_are_small():
    assert packaged_checkpoint().stat().st_size <= 6 * MIB
    assert plain_checkpoint().stat().st_size <= 4 * MIB
    assert sum(path.stat().st_size for pair in held_out() for path in pair) <= 1.5 * MIB


def test_every_branch_is_alive(fdconv):
    layers = dynamic_layers(fdconv)
    assert {layer.kernel_size for layer in layers} == {(1, 1), (3, 3)}
    for layer in layers:
        assert layer.kernel_num >= 16
        assert layer.KSM_Local is not None
        assert (layer.FBM is not None) == (layer.kernel_size == (3, 3))
        if layer.FBM is not None:
            assert layer.FBM.config.k_list == (2, 4, 8)


def test_checkpoints_tell_classes_and_architecture(fdconv):
    plain = load_checkpoint(plain_checkpoint(), require_fdconv=False)
    assert not dynamic_layers(plain)
    for network in (fdconv, plain):
        assert not network.training
        assert network.architecture.classes == CLASSES
        assert network.architecture.palette == PALETTE
        assert network.architecture.decode_head.type == "UPerHead"
        assert network.architecture.test.mode == "whole"


def test_twins_differ_in_the_convolutions_alone(fdconv, record):
    plain = load_checkpoint(plain_checkpoint(), require_fdconv=False).architecture
    both = fdconv.architecture.backbone.model_copy(update={"conv": None})
    assert both == plain.backbone
    assert fdconv.architecture.decode_head == plain.decode_head
    steps = {name: network["steps"] for name, network in record["networks"].items()}
    assert steps["fdconv"] == steps["plain"]


def test_training_never_saw_the_held_out_scenes(record):
    first, end = record["seeds"]["training"]
    assert not set(HELD_OUT_SEEDS) & set(range(first, end))
    assert record["seeds"]["held_out"] == [HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop]


def test_held_out_scenes_are_the_drawn_ones():
    pairs = held_out()
    assert len(pairs) == len(HELD_OUT_SEEDS)
    for seed, (image, labels) in zip(HELD_OUT_SEEDS, pairs, strict=True):
        rgb, truth = draw_scene(seed)
        stored, indexed = Image.open(image), Image.open(labels)
        assert stored.mode == "RGB"
        assert indexed.mode == "P"
        assert tuple(indexed.getpalette()[: 3 * len(PALETTE)]) == tuple(np.ravel(PALETTE))
        # Another OpenCV or another CPU may round an edge's pixel otherwise.
        off = np.abs(np.asarray(stored).astype(int) - rgb) > 2
        assert off.mean() < 0.005, seed
        assert (np.asarray(indexed) != truth).mean() < 0.005, seed


@pytest.mark.parametrize("name", ["fdconv", "plain"])
def test_reaches_its_recorded_score(name, record):
    entry = record["networks"][name]
    path = packaged_checkpoint() if name == "fdconv" else plain_checkpoint()
    network = load_checkpoint(path, require_fdconv=name == "fdconv")
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    with torch.no_grad():
        for image, labels in held_out():
            prediction = predict(network, np.asarray(Image.open(image)))
            total += confusion_matrix(np.asarray(Image.open(labels)), prediction, len(CLASSES))
    found = scores(total)
    assert found.mean_iou == pytest.approx(entry["held_out"]["mean_iou"], abs=0.002)
    assert found.pixel_accuracy == pytest.approx(entry["held_out"]["pixel_accuracy"], abs=0.001)


def test_attention_differs_from_image_to_image(fdconv, record):
    spread = record["networks"]["fdconv"]["attention_spread"]
    for kind in ("channel", "filter", "spatial", "kernel", "local"):
        # Of a gate at rest: 1, and of the kernel's attentions 1 in kernel_num.
        rest = 1 / dynamic_layers(fdconv)[0].kernel_num if kind == "kernel" else 1
        assert spread[kind]["mean"] > 4e-3 * rest, kind


def test_packaged_checkpoint_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FDCONV_DEMO_ASSETS", str(tmp_path))
    with pytest.raises(FDConvError, match=r"streets\.pth is not at .*clone"):
        packaged_checkpoint()
