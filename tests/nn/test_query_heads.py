"""Heads with queries against what Mask2Former, MaskDINO, mmsegmentation and mmdetection compute."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fdconv_deploy.checkpoints.state_dict import head_from_detectron2
from fdconv_deploy.config import (
    FDConvConfig,
    Mask2FormerHeadConfig,
    MaskDINOHeadConfig,
    ResNetConfig,
    SegmentorConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.errors import ImageError
from fdconv_deploy.nn.heads import build_head, resize
from fdconv_deploy.nn.heads.mask2former_head import DecoderLayer
from fdconv_deploy.nn.heads.maskdino_head import boxes_of
from fdconv_deploy.nn.segmentor import Segmentor
from tests.nn.backbones.published import PROJECTS, float32_error
from tests.nn.query_heads import (
    OPENMMLAB,
    case_tensors,
    load_detectron2,
    load_openmmlab,
    renamed,
)

TOLERANCE = 1e-5
# Pixels whose two best scores are this near, as a share of the largest, may have either label.
NEAR_TIE = 1e-5

R50 = ResNetConfig(depth=50, conv=None)
SWIN_B = SwinTransformerConfig(
    embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12
)
SWIN_L = SWIN_B.model_copy(update={"embed_dims": 192, "num_heads": (6, 12, 24, 48)})


def error_of(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def watched(network, image):
    """Scores, and what every module gave, each time it ran."""
    seen = {}

    def watch(name):
        return lambda _m, _i, output: seen.setdefault(name, []).append(output)

    handles = [m.register_forward_hook(watch(n)) for n, m in network.named_modules()]
    with torch.no_grad():
        scores = network(image)
    for handle in handles:
        handle.remove()
    return scores, seen


def assert_same_labels(scores, labels):
    """``scores``: ``(classes, H, W)``; equal but for near-ties."""
    ours = scores.argmax(0)
    best = scores.topk(2, dim=0).values
    margin = (best[0] - best[1]) / scores.abs().max()
    assert (margin[ours != labels.long()] <= NEAR_TIE).all()


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "fdconv") for family in OPENMMLAB]
    + [("mask2former_r50", "plain"), ("mask2former_swin", "plain")],
)
def test_head_equals_openmmlab(oracle: Path, family, kind, proved):
    network = load_openmmlab(oracle, family, kind)
    index = json.loads((oracle / "families" / family / f"{kind}_index.json").read_text())
    compared = 0
    for case, facts in index["cases"].items():
        tensors = case_tensors(oracle, family, kind, case)
        scores, seen = watched(network, tensors["input"])
        own = float32_error(oracle, family, kind, case)
        tolerance = max(TOLERANCE, 3 * own)
        features, memories = seen["decode_head.pixel_decoder"][0]
        found = {"mask_features": features}
        found |= {f"memory{i}": memory for i, memory in enumerate(memories)}
        found |= {f"cls_logits{i}": x for i, x in enumerate(seen["decode_head.cls_embed"])}
        found["mask_logits4"] = seen["decode_head"][0][1]
        encoder = "decode_head.pixel_decoder.encoder.layers"
        prefix = "panoptic_head" if family == "mask2former_panoptic" else "decode_head"
        for layer in range(2):
            name = f"{encoder}.{layer}"
            found[name.replace("decode_head", prefix)] = seen[name][0]
        for name, value in found.items():
            if name in tensors:
                error = error_of(value, tensors[name])
                assert error <= tolerance, f"case {case}, {name}: {error:.1e}"
                compared += 1
        for step, hidden in enumerate(seen["decode_head.attention_mask"]):
            expected = tensors.get(f"attn_mask{step}")
            assert expected is None or torch.equal(hidden, expected.float())
        if "pred" in tensors:
            height, width = facts["meta"]["img_shape"]
            answer = resize(scores[:, :, :height, :width], facts["meta"]["ori_shape"], False)[0]
            assert_same_labels(answer, tensors["pred"])
            if "seg_logits" in tensors:
                step = 2 if facts["subsampled"] else 1
                assert error_of(answer[:, ::step, ::step], tensors["seg_logits"]) <= tolerance
            compared += 1
    proved("tensors of query heads equal to OpenMMLab's frameworks", compared)


@pytest.mark.parametrize("case", ["64x96", "97x131"])
@pytest.mark.parametrize("project", PROJECTS)
def test_head_equals_detectron2(oracle: Path, project, case, proved):
    network = load_detectron2(oracle, project)
    tensors = case_tensors(oracle, project, None, case)
    scores, seen = watched(network, tensors["input"])
    features, memories = seen["decode_head.pixel_decoder"][0]
    classes, masks, *boxes = seen["decode_head"][0]
    height, width = tensors["labels"].shape
    found = {"mask_features": features, "pred_logits": classes, "pred_masks": masks}
    if boxes:
        found["pred_boxes"] = boxes[0]
    assert bool(boxes) == ("pred_boxes" in tensors)
    found |= {f"multi_scale.{i}": memory for i, memory in enumerate(memories)}
    found["sem_seg"] = scores[0, :, :height, :width]
    for name, value in found.items():
        error = error_of(value, tensors[name])
        assert error <= TOLERANCE, f"{name}: {error:.1e}"
    assert_same_labels(found["sem_seg"], tensors["labels"])
    resized = tensors["labels_resized"]
    assert_same_labels(resize(found["sem_seg"][None], resized.shape, False)[0], resized)
    for step, hidden in enumerate(seen.get("decode_head.attention_mask", [])):
        expected = tensors.get(f"decoder.{step}.attn_mask")
        if expected is not None:  # stored after rows that hide everything were freed
            free = hidden.amin(-1) == 0
            assert torch.equal(hidden[free], expected[free].float())
    proved("tensors of query heads equal to detectron2's projects", len(found))


def shapes(state):
    return {name: list(value.shape) for name, value in state.items()}


def full_size(backbone, head, kernel_num):
    conv = None if kernel_num is None else FDConvConfig(kernel_num=kernel_num)
    backbone = backbone.model_copy(update={"conv": conv})
    head = head.model_copy(update={"in_channels": backbone.output_widths})
    with torch.device("meta"):
        return Segmentor(SegmentorConfig(backbone=backbone, decode_head=head))


def mask2former(classes, **changes):
    return Mask2FormerHeadConfig(
        in_channels=(0,) * 4,
        in_index=(0, 1, 2, 3),
        channels=256,
        num_classes=classes,
        **changes,
    )


def maskdino(classes, **changes):
    return MaskDINOHeadConfig(
        in_channels=(0,) * 4,
        in_index=(0, 1, 2, 3),
        channels=256,
        num_classes=classes,
        **changes,
    )


SEMANTIC_DINO = maskdino(
    150,
    num_queries=100,
    two_stage=False,
    no_object=True,
    class_scores="softmax",
    encoder_feedforward=1024,
)
KEYS = {
    "mask2former_r50_cityscapes": (R50, mask2former(19)),
    "mask2former_swin-b_ade20k": (SWIN_B, mask2former(150)),
    "mask2former_swin-l_ade20k": (SWIN_L, mask2former(150)),
    "mask2former_r50_coco-panoptic": (R50, mask2former(133)),
}
PROJECT_KEYS = {
    "mask2former_r50_ade20k": (R50, mask2former(150)),
    "mask2former_swinb_ade20k": (SWIN_B, mask2former(150)),
    "mask2former_swinl_ade20k": (SWIN_L, mask2former(150)),
    "maskdino_r50_ade20k": (R50, SEMANTIC_DINO),
    "maskdino_swinl_ade20k_assumed": (SWIN_L, SEMANTIC_DINO),
    "maskdino_swinl_coco_panoptic_config": (
        SWIN_L,
        maskdino(133, levels=(0, 1, 2, 3), extra_levels=1, feature_order="low2high"),
    ),
}


@pytest.mark.parametrize("kind", ["plain", "fdconv_kn64"])
@pytest.mark.parametrize("name", KEYS)
def test_full_size_keys_are_openmmlabs(oracle: Path, name, kind):
    listed = json.loads((oracle / f"families/keys/{name}_{kind}_keys.json").read_text())
    network = full_size(*KEYS[name], None if kind == "plain" else 64)
    theirs = {k.replace("panoptic_head.", "decode_head."): v[0] for k, v in listed.items()}
    assert shapes(network.state_dict()) == theirs


@pytest.mark.parametrize("kind", ["", "fdconv64_"])
@pytest.mark.parametrize("name", PROJECT_KEYS)
def test_full_size_keys_are_detectron2s(oracle: Path, name, kind):
    path = oracle / f"query_heads/full_size/{name}_{kind}keys.json.gz"
    listed = json.loads(gzip.decompress(path.read_bytes()))["keys"]
    theirs = {k: torch.empty(v[0], device="meta") for k, v in listed.items()}
    network = full_size(*PROJECT_KEYS[name], 64 if kind else None)
    assert shapes(renamed(theirs)) == shapes(network.state_dict())


def test_old_names_of_detectron2_are_read():
    """Of files whose head had no version: the pixel decoder's name twice, or not at all."""
    value = torch.zeros(1)
    expected = {"pixel_decoder.output_convs.0.gn.weight": value}
    for prefix in ("pixel_decoder.", "pixel_decoder.pixel_decoder.", ""):
        assert head_from_detectron2({f"{prefix}layer_1.norm.weight": value}) == expected
    old = head_from_detectron2({"predictor.static_query.weight": value})
    assert old == {"query_feat.weight": value}


def small(config, **changes):
    values = {
        "in_channels": (8, 8, 8, 8),
        "in_index": (0, 1, 2, 3),
        "channels": 8,
        "mask_channels": 8,
        "norm_groups": 2,
        "num_classes": 5,
        "num_queries": 6,
        "encoder_layers": 1,
        "encoder_heads": 2,
        "encoder_feedforward": 16,
        "decoder_layers": 2,
        "decoder_heads": 2,
        "decoder_feedforward": 16,
    }
    return config(**(values | changes))


def maps(batch=1):
    torch.manual_seed(1)
    return [torch.randn(batch, 8, 16 >> i, 24 >> i) for i in range(4)]


def test_pre_norm_decoder_layer_is_detectron2s():
    """Written out after ``forward_pre`` of Mask2Former's three kinds of layers."""
    torch.manual_seed(0)
    config = small(Mask2FormerHeadConfig, hidden_channels=8, pre_norm=True)
    head = build_head(config).eval()
    layer = head.transformer_decoder.layers[0]
    for norm in layer.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, places = torch.randn(1, 6, 8), torch.randn(6, 8)
    keys, values = torch.randn(1, 7, 8), torch.randn(1, 7, 8)
    hidden = (torch.rand(1, 6, 7) < 0.5).float()
    hidden[0, 2] = 1
    layer.requires_grad_(False)
    found = layer(x, places, keys, values, hidden)

    def ask(module, query, key, value, mask=None):
        order = (t.transpose(0, 1) for t in (query, key, value))
        return module(*order, attn_mask=mask)[0].transpose(0, 1)

    mask = hidden[0].bool()
    mask[mask.all(-1)] = False
    normal = layer.norms[0](x)
    y = x + ask(layer.cross_attn.attn, normal + places, keys, values, mask)
    normal = layer.norms[1](y)
    y = y + ask(layer.self_attn.attn, normal + places, normal + places, normal)
    y = y + layer.ffn(layer.norms[2](y))
    assert error_of(found, y) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_levels": 2},
        {"levels": (0, 1, 2, 3), "extra_levels": 1, "feature_order": "low2high"},
        {"learn_tgt": True},
        {"initialize_box_type": "mask2box"},
        {"initialize_box_type": "bitmask", "no_object": True},
        {"temperature": None},
    ],
)
@torch.no_grad()
def test_maskdino_of_every_kind_gives_finite_scores_that_depend_on_the_image(changes):
    torch.manual_seed(0)
    head = build_head(small(MaskDINOHeadConfig, **changes)).eval()
    classes, masks, boxes = head(maps(2))
    scores = head.semantic_scores(classes, masks, (64, 96))
    assert scores.shape == (2, 5, 64, 96)
    assert scores.isfinite().all()
    assert not torch.allclose(scores[0], scores[1])
    assert boxes.shape == (2, classes.shape[1], 4)
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_maskdino_names_the_size_that_has_too_few_tokens():
    head = build_head(small(MaskDINOHeadConfig, num_queries=5000)).eval()
    with pytest.raises(ImageError, match=r"5000 queries of .* has \d+\. Give a larger size"):
        head(maps(1))


def test_boxes_around_masks():
    masks = torch.full((1, 2, 4, 10), -1.0)
    masks[0, 0, 1:3, 2:7] = 1
    # Columns 2 to 6 and rows 1 to 2; the end lies after the last, or is the last.
    after = torch.tensor([[4.5 / 10, 2 / 4, 5 / 10, 2 / 4], [0, 0, 0, 0]])
    within = torch.tensor([4 / 10, 1.5 / 4, 4 / 10, 1 / 4])
    torch.testing.assert_close(boxes_of(masks, exclusive=True)[0], after)
    torch.testing.assert_close(boxes_of(masks, exclusive=False)[0, 0], within)


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (Mask2FormerHeadConfig, {"levels": (2, 3)}, "three levels"),
        (Mask2FormerHeadConfig, {"decoder_heads": 3}, "decoder_heads must divide 256"),
        (Mask2FormerHeadConfig, {"in_index": (0, 1, 2)}, "takes four maps"),
        (MaskDINOHeadConfig, {"class_scores": "softmax"}, "output for no object"),
        (MaskDINOHeadConfig, {"hidden_channels": 128}, "256 channels"),
        (
            MaskDINOHeadConfig,
            {"two_stage": False, "initialize_box_type": "bitmask"},
            "needs two_stage",
        ),
        (
            MaskDINOHeadConfig,
            {"feature_order": "low2high", "extra_levels": 2},
            "more than one extra level",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, says):
    with pytest.raises(ValidationError, match=says):
        small(config, **changes)


def published_layer(layer, pre_norm, x, query_pos, memory, pos, mask):
    """A decoder layer as Mask2Former's repository writes it, on torch's own attention.

    ``CrossAttentionLayer``, ``SelfAttentionLayer`` and ``FFNLayer`` with ``forward_pre`` or
    ``forward_post``; axes are (L, B, C), ``mask`` is (B·heads, Q, S), True where hidden.
    """
    cross, own, ffn = layer.norms
    inner, outer = layer.ffn.layers[0][0], layer.ffn.layers[1]

    def step(x, norm, part):
        return x + part(norm(x)) if pre_norm else norm(x + part(x))

    mask = mask.clone()
    mask[mask.sum(-1) == mask.shape[-1]] = False
    x = step(x, cross, lambda t: layer.cross_attn.attn(
        t + query_pos, memory + pos, memory, attn_mask=mask)[0])  # fmt: skip
    x = step(x, own, lambda t: layer.self_attn.attn(t + query_pos, t + query_pos, t)[0])
    return step(x, ffn, lambda t: outer(torch.relu(inner(t))))


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_decoder_layers_norms_are_where_mask2former_has_them(pre_norm):
    """Before or after; no checkpoint of the reference data has them before."""
    torch.manual_seed(0)
    config = Mask2FormerHeadConfig(
        in_channels=(8, 16, 32, 64), in_index=(0, 1, 2, 3), channels=32, num_classes=5,
        num_queries=6, hidden_channels=32, decoder_heads=4, decoder_feedforward=48,
        pre_norm=pre_norm,
    )  # fmt: skip
    layer = DecoderLayer(config, "torch").double().eval()
    for norm in layer.norms:
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    x, places = torch.randn(2, 6, 32).double(), torch.randn(6, 32).double()
    memory, pos = torch.randn(2, 2, 20, 32).double()
    hidden = (torch.rand(2, 6, 20) < 0.5).double()
    hidden[1, 3] = 1  # sees nothing, so everything
    found = layer(x, places, memory + pos, memory, hidden)
    expected = published_layer(
        layer, pre_norm, x.transpose(0, 1), places[:, None], memory.transpose(0, 1),
        pos.transpose(0, 1), hidden.bool().repeat_interleave(4, 0),
    )  # fmt: skip
    assert error_of(found, expected.transpose(0, 1)) < 1e-12
