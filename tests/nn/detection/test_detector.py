"""Detectors against mmdetection's key lists, and what `Detector.forward` promises."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from fdconv_deploy.config import (
    DetectorConfig,
    FDConvConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RoIConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.detection.detector import FPN
from tests.reference import detection as reference
from tests.reference.lively import lively_input
from tests.reference.networks import small_detector

SIZES = torch.tensor([[96.0, 128.0], [70.0, 101.0]])


@pytest.fixture(scope="module")
def detector():
    return small_detector()


@pytest.fixture(scope="module")
def images():
    x = lively_input((2, 3, 96, 128))
    x[1, :, 70:], x[1, :, :, 101:] = 0, 0
    return x


KN64 = FDConvConfig(kernel_num=64)


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
@pytest.mark.parametrize("form", ["fdconv_kn64", "plain"])
def test_keys_and_parameters(oracle, kind, form):
    architecture = DetectorConfig(
        backbone=ResNetConfig(conv=None if form == "plain" else KN64),
        mask_head=MaskHeadConfig() if kind == "mask_rcnn" else None,
    )
    with torch.device("meta"):
        network = Detector(architecture)
    suffix = "_keys.json" if form == "plain" else "_keys_mmdet2.28.1.json"
    published = json.loads((oracle / f"mmdet/{kind}_r50_fpn_{form}_c80{suffix}").read_text())
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == {
        entry["key"]: entry["shape"] for entry in published["keys"]
    }
    counts = json.loads((oracle / "mmdet/param_counts.json").read_text())[f"{kind}_{form}"]
    assert sum(p.numel() for p in network.parameters()) == counts["params"]
    assert sum(p.numel() for p in network.backbone.parameters()) == counts["backbone"]


def test_what_does_not_fit_is_refused():
    backbone = ResNetConfig(depth=18, base_channels=8, conv=None)
    with pytest.raises(UnsupportedLayerError, match=r"has 4 levels.*5 strides"):
        Detector(DetectorConfig(backbone=backbone, neck=FPNConfig(num_outs=4)))
    with pytest.raises(UnsupportedLayerError, match=r"num_outs.*below the 4"):
        FPN(FPNConfig(num_outs=3))
    with pytest.raises(UnsupportedLayerError, match="mask head 7"):
        Detector(DetectorConfig(backbone=backbone, mask_head=MaskHeadConfig(num_classes=7)))
    far = MaskHeadConfig(roi=RoIConfig(featmap_strides=(4, 8, 16, 32, 64, 128)))
    with pytest.raises(UnsupportedLayerError, match="6 levels"):
        Detector(DetectorConfig(backbone=backbone, mask_head=far))


@torch.no_grad()
def test_equals_the_reference(detector, images):
    """Every step after the convolutions, in float64, box by box; anchors alone are float32."""
    network = copy.deepcopy(detector).double()
    x, sizes = images.double(), SIZES.double()
    boxes, scores, labels, count, masks = network(x, sizes)
    features = network.features(x)
    raw, moves = network.rpn_head(features)
    levels = reference.anchors((4, 8, 16, 32, 64), [f.shape[-2:] for f in features])
    test = network.architecture.test

    def cut(regions, image, size):
        parts = []
        for box in regions:
            level = reference.level(box)
            feature = features[level][image].numpy()
            parts.append(reference.roi_align(feature, box, size, 1 / 4 / 2**level))
        return torch.from_numpy(np.array(parts))

    for image, size in enumerate(SIZES.tolist()):
        regions = reference.propose(
            levels, [r[image].numpy() for r in raw], [m[image].numpy() for m in moves], size,
            test.rpn,
        )  # fmt: skip
        proposals, valid = network.rpn_head.propose(features, sizes)
        assert valid[image].sum() == len(regions)
        found = proposals[image][: len(regions)]
        np.testing.assert_allclose(found.numpy(), regions, atol=1e-4)
        logits, deltas = network.roi_head.bbox_head(cut(regions, image, 7))
        chosen = reference.choose(regions, logits.numpy(), deltas.numpy(), size, test.rcnn)
        n = int(count[image])
        assert n == len(chosen[0]) > 5
        np.testing.assert_allclose(boxes[image, :n].numpy(), chosen[0], atol=1e-4)
        np.testing.assert_allclose(scores[image, :n].numpy(), chosen[1], atol=1e-6)
        assert labels[image, :n].tolist() == chosen[2].tolist()
        logits = network.roi_head.mask_head(cut(chosen[0], image, 14))
        expected = logits[torch.arange(n), torch.from_numpy(chosen[2])].sigmoid()
        np.testing.assert_allclose(masks[image, :n].numpy(), expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_shapes_order_and_padding(detector, images):
    boxes, scores, labels, count, masks = detector(images, SIZES)
    assert [tuple(t.shape) for t in (boxes, scores, labels, count, masks)] == [
        (2, 20, 4), (2, 20), (2, 20), (2,), (2, 20, 28, 28),
    ]  # fmt: skip
    assert [t.dtype for t in (boxes, scores, labels, count, masks)] == [
        *(torch.float32, torch.float32, torch.int64, torch.int64, torch.float32)
    ]
    assert len(set(labels[0].tolist())) > 1
    for image, n in enumerate(count.tolist()):
        assert (scores[image, :n] > 0.05).all()
        assert (scores[image].diff() <= 0).all()
        for output in (boxes, scores, labels, masks):
            assert not output[image, n:].any()
        limits = SIZES[image, [1, 0, 1, 0]]
        assert (boxes[image] >= 0).all()
        assert (boxes[image] <= limits).all()


@torch.no_grad()
def test_images_do_not_see_their_neighbours(detector, images):
    together = detector(images, SIZES)
    for place in range(2):
        alone = detector(images[place : place + 1], SIZES[place : place + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[place], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_detector_that_finds_nothing(images):
    network = small_detector(masks=False)
    network.roi_head.bbox_head.fc_cls.bias[-1] += 100
    boxes, scores, labels, count = network(images, SIZES)
    assert count.tolist() == [0, 0]
    assert not boxes.any()
    assert not scores.any()
    assert not labels.any()


@torch.no_grad()
def test_one_box_and_one_mask_for_all_classes(images):
    """reg_class_agnostic and class_agnostic."""
    every = small_detector()
    architecture = every.architecture.model_copy(
        update={
            "bbox_head": every.architecture.bbox_head.model_copy(
                update={"reg_class_agnostic": True}
            ),
            "mask_head": every.architecture.mask_head.model_copy(update={"class_agnostic": True}),
        }
    )
    one = Detector(architecture).eval()
    state = every.state_dict()
    for name in ("bbox_head.fc_reg", "mask_head.conv_logits"):
        for part in ("weight", "bias"):
            key = f"roi_head.{name}.{part}"
            rows = one.state_dict()[key].shape[0]
            state[key] = state[key][:rows]
            # The same for all classes in the other network, too.
            repeated = state[key].repeat(5, *(1,) * (state[key].ndim - 1))
            every.state_dict()[key].copy_(repeated)
    one.load_state_dict(state)
    for a, b in zip(one(images, SIZES), every(images, SIZES), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_small_images_leave_places_empty():
    """Fewer candidates than places."""
    network = small_detector(masks=False, classes=1)
    test = network.architecture.test
    rcnn = test.rcnn.model_copy(update={"max_per_img": 300})
    architecture = network.architecture.model_copy(
        update={"test": test.model_copy(update={"rcnn": rcnn})}
    )
    wider = Detector(architecture).eval()
    wider.load_state_dict(network.state_dict())
    boxes, scores, labels, count = wider(lively_input((1, 3, 32, 32)), torch.tensor([[32.0, 32]]))
    assert boxes.shape == (1, 300, 4)
    assert scores.shape == labels.shape == (1, 300)
    assert 0 < count.item() < 300
