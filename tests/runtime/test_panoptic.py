"""Panoptic and instance answers, pixel for pixel those of the frameworks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fdconv_deploy.config import PanopticConfig, SegmentorConfig
from fdconv_deploy.runtime.panoptic import PanopticPipeline, PanopticSegmentation
from fdconv_deploy.runtime.preprocessing import Prepared
from tests.nn.query_heads import case_tensors, detectron2, load_openmmlab, openmmlab
from tests.runtime import toy_panoptic

D2 = ["mask2former_r50", "mask2former_swin", "maskdino_swin"]


def answer_of(
    config: SegmentorConfig, classes, masks, network, covered, image, **boxes
) -> PanopticSegmentation:
    prepared = Prepared({}, network, "resized", covered, image)
    outputs = {"classes": np.asarray(classes), "masks": np.asarray(masks), **boxes}
    return PanopticPipeline(config, [network]).finish(prepared, outputs, size=image)


def assert_same_instances(found, labels, scores, masks=None, boxes=None):
    """Sets are compared: no order is promised."""
    assert found is not None
    assert len(found) == len(labels)
    ours = found.masks
    left = set(range(len(labels)))
    for number in range(len(found)):
        match = next(
            other
            for other in left
            if labels[other] == found.labels[number]
            and abs(scores[other] - found.scores[number]) < 5e-5
            and (masks is None or np.array_equal(ours[number], masks[other].astype(bool)))
            and (boxes is None or np.allclose(found.boxes[number], boxes[other], 1e-5, 1e-4))
        )
        left.remove(match)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_answers_are_mmdetections(oracle: Path, case, proved):
    family = "mask2former_panoptic"
    index = json.loads((oracle / "families" / family / "fdconv_index.json").read_text())
    meta = index["cases"][case]["meta"]
    tensors = case_tensors(oracle, family, "fdconv", case)
    if "mask_logits4" in tensors:
        classes, masks = tensors["cls_logits4"], tensors["mask_logits4"]
    else:
        with torch.no_grad():
            classes, masks = load_openmmlab(oracle, family, "fdconv")(tensors["input"])
    found = answer_of(
        openmmlab(family), classes[0], masks[0],
        tuple(meta["batch_input_shape"]), tuple(meta["img_shape"]), tuple(meta["ori_shape"]),
    )  # fmt: skip
    # Void is the number of classes, a thing its class plus a thousand times its number.
    values, things = [10], 0
    for segment in found.segments:
        things += segment.is_thing
        values.append(segment.label + 1000 * things * segment.is_thing)
    assert np.array_equal(np.array(values)[found.ids], tensors["panoptic"].numpy())
    names = ("ins_labels", "ins_scores", "ins_masks", "ins_bboxes")
    assert_same_instances(found.instances, *(tensors[name].numpy() for name in names))
    assert [s.area for s in found.segments] == [
        int((found.ids == s.id).sum()) for s in found.segments
    ]
    proved("panoptic and instance answers equal to the frameworks", 2)


@pytest.mark.parametrize("case", ["64x96", "97x131"])
@pytest.mark.parametrize("project", D2)
def test_answers_are_detectron2s(oracle: Path, project, case, proved):
    index = json.loads((oracle / "query_heads/index.json").read_text())["networks"][project]
    facts = index["cases"][case]
    tensors = case_tensors(oracle, project, None, case)
    given = facts["panoptic_thresholds"]
    rule = PanopticConfig(
        rule="detectron2",
        thing_classes=index["things_for_panoptic"],
        instance_on=True,
        object_mask_thr=given["object_mask"],
        iou_thr=given["overlap"],
        max_per_image=given["topk"],
    )
    config = detectron2(project).model_copy(update={"panoptic": rule})
    own = {"boxes": tensors["pred_boxes"][0].numpy()} if "pred_boxes" in tensors else {}
    found = answer_of(
        config, tensors["pred_logits"][0], tensors["pred_masks"][0],
        tuple(facts["padded"]), tuple(facts["image"]), tuple(facts["output_resized"]), **own,
    )  # fmt: skip
    infos = [{"id": s.id, "isthing": s.is_thing, "category_id": s.label} for s in found.segments]
    assert infos == facts["panoptic_segments"]
    if "post.panoptic_seg" in tensors:
        assert np.array_equal(found.ids, tensors["post.panoptic_seg"].numpy())
    # Mask2Former gives zeros for boxes.
    names = ("classes", "scores", "masks", *(["boxes"] if own else []))
    parts = [tensors.get(f"post.instances.{name}") for name in names]
    if parts[0] is not None:
        assert_same_instances(found.instances, *(p if p is None else p.numpy() for p in parts))
    proved("panoptic and instance answers equal to the frameworks", 2)


@pytest.mark.parametrize("boxes", [{}, {"boxes": np.ones((6, 4), np.float32)}])
def test_there_may_be_no_thing_among_the_best(boxes):
    classes = np.zeros((6, 5), np.float32)
    classes[:, 2:4] = 9  # stuff
    masks = np.ones((6, 8, 12), np.float32)
    sizes = (32, 48), (32, 48), (40, 60)
    found = answer_of(toy_panoptic.architecture(), classes, masks, *sizes, **boxes)
    assert found.instances is not None
    assert len(found.instances) == 0
    assert found.instances.as_dicts() == []
    assert {segment.label for segment in found.segments} <= {2, 3}
