"""Mask2Former and MaskDINO: from either framework's files to its scores; what is refused."""

from __future__ import annotations

import gzip
import json
import pickle
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdconv_deploy.checkpoints import (
    LoadedSegmentor,
    inspect_checkpoint,
    load_segmentor,
    read_checkpoint,
    save_checkpoint,
)
from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.loading import read_config
from fdconv_deploy.checkpoints.state_dict import framework_of, in_openmmlab_names
from fdconv_deploy.config import PanopticConfig
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.runtime.preprocessing import normalise, published_size, resize
from tests.checkpoints.small import saved, shapes_of
from tests.checkpoints.test_families import index_of, input_of, loaded, relative
from tests.nn.backbones.test_backbones import KEYS, PROJECT_KEYS

PROJECTS = ("mask2former_r50", "mask2former_swin", "maskdino_r50", "maskdino_swin")
FAMILIES = ("mask2former_r50", "mask2former_swin")
TOLERANCE = 1e-5


def project_file(oracle: Path, project: str) -> Path:
    (path,) = (oracle / "query_heads" / project).glob("model_final.*")
    return path


def config_file(oracle: Path, project: str) -> Path:
    return oracle / "query_heads" / project / "config.yaml"


@cache
def state_of(oracle: Path, project: str) -> dict[str, Tensor]:
    return dict(read_checkpoint(project_file(oracle, project)).state_dict)


@cache
def project(oracle: Path, name: str) -> LoadedSegmentor:
    return load_segmentor(project_file(oracle, name), config=config_file(oracle, name))


@pytest.mark.parametrize("name", PROJECTS)
def test_network_of_detectron2_equals_it(oracle: Path, name: str, proved: Any) -> None:
    network = project(oracle, name)
    how = network.architecture.preprocessing
    assert (how.resample, how.size_divisor, how.scale) == ("pillow", 32, (2048, 512))
    for case in ("64x96", "97x131"):
        tensors = load_file(oracle / f"query_heads/{name}/case_{case}.safetensors")
        image = tensors["image"].numpy()
        padded = tuple(-(-side // 32) * 32 for side in image.shape[:2])
        tensor = torch.from_numpy(normalise(image, how, padded))[None]
        if "input" in tensors:
            torch.testing.assert_close(tensor, tensors["input"], rtol=0, atol=1e-6)
        with torch.no_grad():
            scores = network(tensor)[0, :, : image.shape[0], : image.shape[1]]
        assert relative(scores, tensors["sem_seg"]) <= TOLERANCE
        best = scores.topk(2, 0).values
        sure = best[0] - best[1] > 1e-5 * scores.max()
        assert (scores.argmax(0) == tensors["labels"])[sure].all()
    proved("networks equal to detectron2's projects", 2)


@pytest.mark.parametrize("name", ["mask2former_r50", "mask2former_swin", "maskdino_r50"])
def test_network_of_detectron2_is_known_without_a_config(oracle: Path, name: str) -> None:
    """By names and shapes and the projects' defaults, which are listed as assumed."""
    found = infer_config(state_of(oracle, name))
    expected = project(oracle, name).architecture
    # The config of a ResNet states the stem's channels, which are the usual ones.
    plain = {"stem_channels": None} if name.endswith("r50") else {}
    assert found.architecture.backbone == expected.backbone.model_copy(update=plain)
    assert found.architecture.decode_head == expected.decode_head
    assumed = {setting.field for setting in found.assumed}
    assert {"decode_head.encoder_heads", "decode_head.norm_groups"} <= assumed
    assert {"preprocessing.resample", "preprocessing.size_divisor"} <= assumed


def test_number_of_queries_that_no_weight_shows_is_said(oracle: Path) -> None:
    """Of a MaskDINO whose queries are chosen among the encoder's tokens."""
    state = state_of(oracle, "maskdino_swin")
    (note,) = (note for note in infer_config(state).notes if "queries" in note)
    assert "300 is assumed" in note
    assert "decode_head.num_queries" in note
    config = read_config(config_file(oracle, "maskdino_swin"))
    assert not [note for note in infer_config(state, config=config).notes if "queries" in note]


@pytest.mark.parametrize("kind", ["fdconv", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_network_of_openmmlab_equals_it(oracle: Path, family: str, kind: str, proved: Any) -> None:
    network = loaded(oracle, family, kind)
    divisor = network.architecture.preprocessing.size_divisor
    assert divisor == (32 if family.endswith("r50") else 1)
    cases = index_of(oracle, family, kind)["cases"]
    for name, case in cases.items():
        tensors = load_file(oracle / f"families/{family}/{kind}_{name}.safetensors")
        image = input_of(network, tensors, oracle / "families" / family / case["image"])
        height, width = image.shape[-2:]
        image = torch.nn.functional.pad(image, (0, -width % divisor, 0, -height % divisor))
        with torch.no_grad():
            scores = network(image)[:, :, :height, :width]
        scores = torch.nn.functional.interpolate(scores, case["image_hw"], mode="bilinear")[0]
        if "seg_logits" in tensors:
            step = 2 if case["subsampled"] else 1
            error = relative(scores[:, ::step, ::step], tensors["seg_logits"])
            # One of the ResNets loses more than this to float32 in the framework, too.
            own = 2 * case["rel_err_float32_vs_float64"]
            assert error <= max(TOLERANCE, own), f"{name}: {error:.1e}"
        best = scores.topk(2, 0).values
        sure = best[0] - best[1] > 1e-4 * case["absmax"]
        assert (scores.argmax(0) == tensors["pred"])[sure].all()
    proved("Mask2Formers equal to mmsegmentation's", len(cases))


def test_panoptic_network_of_mmdetection_is_read(oracle: Path) -> None:
    path = oracle / "families/mask2former_panoptic/fdconv_train.pth"
    found = load_segmentor(path)
    assert found.architecture.panoptic == PanopticConfig(
        thing_classes=(0, 1, 2, 3, 4, 5),
        panoptic_on=True,
        instance_on=True,
        filter_low_score=True,
        max_per_image=20,
    )
    assert found.architecture.preprocessing.size_divisor == 32
    assert found.architecture.classes[:2] == ("person", "bicycle")
    assert any(key.startswith("panoptic_head.") for key in read_checkpoint(path).state_dict)


@pytest.mark.parametrize("kind", ["fdconv", "plain"])
@pytest.mark.parametrize("name", [name for name in KEYS if name.startswith("mask2former")])
def test_full_size_openmmlab_network_is_rebuilt(oracle: Path, name: str, kind: str) -> None:
    backbone, kernel_num = KEYS[name]
    suffix = kind if kind == "plain" else f"fdconv_kn{kernel_num}"
    listed = json.loads((oracle / f"families/keys/{name}_{suffix}_keys.json").read_text())
    assert_rebuilt({key: (shape, dtype) for key, (shape, dtype) in listed.items()}, backbone)


@pytest.mark.parametrize("kind", ["", "fdconv64_"])
@pytest.mark.parametrize("name", PROJECT_KEYS)
def test_full_size_detectron2_network_is_rebuilt(oracle: Path, name: str, kind: str) -> None:
    packed = (oracle / f"query_heads/full_size/{name}_{kind}keys.json.gz").read_bytes()
    listed = json.loads(gzip.decompress(packed))["keys"]
    backbone = PROJECT_KEYS[name]
    if hasattr(backbone, "merging"):
        backbone = backbone.model_copy(update={"merging": "position"})
    keys = {k: v for k, v in listed.items() if not k.startswith("criterion.")}
    assert_rebuilt({key: (value[0], value[1]) for key, value in keys.items()}, backbone)


def assert_rebuilt(keys: dict[str, tuple[list[int], str]], backbone: Any) -> None:
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for key, (shape, dtype) in keys.items()
    }
    found = infer_config(state).architecture
    assert found.backbone.model_copy(update={"conv": None}) == backbone.model_copy(
        update={"conv": None}
    )
    rebuilt = shapes_of(found)
    named = in_openmmlab_names(state)
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in named.items()}


def load_changed(tmp_path: Path, oracle: Path, name: str, state: dict[str, Tensor]) -> Any:
    path = saved(tmp_path / "changed.pth", {"model": state, "iteration": 1})
    return load_segmentor(path, config=config_file(oracle, name))


def image_of(oracle: Path, name: str) -> Tensor:
    tensors = load_file(oracle / f"query_heads/{name}/case_64x96.safetensors")
    how = project(oracle, name).architecture.preprocessing
    return torch.from_numpy(normalise(tensors["image"].numpy(), how))[None]


def test_older_names_are_read(oracle: Path, tmp_path: Path) -> None:
    """``static_query``, and pixel decoders whose names lost or doubled a part."""
    name = "mask2former_r50"
    image = image_of(oracle, name)
    with torch.no_grad():
        expected = project(oracle, name)(image)
    inner = "sem_seg_head.pixel_decoder."
    for change in (
        lambda key: key.replace("predictor.query_feat", "predictor.static_query"),
        lambda key: key.replace(inner, f"{inner}pixel_decoder."),
        lambda key: key.replace(inner, "sem_seg_head."),
    ):
        state = {change(key): value for key, value in state_of(oracle, name).items()}
        assert state.keys() != state_of(oracle, name).keys()
        with torch.no_grad():
            assert torch.equal(load_changed(tmp_path, oracle, name, state)(image), expected)


def test_names_of_mmdetection_2_are_read(oracle: Path, tmp_path: Path) -> None:
    path = oracle / "families/mask2former_panoptic/fdconv_train.pth"
    checkpoint = read_checkpoint(path)
    older = {
        key.replace("cross_attn.attn", "attentions.0.attn")
        .replace("self_attn.attn", "attentions.1.attn")
        .replace("encoder.layers.0.self_attn", "encoder.layers.0.attentions.0")
        .replace("encoder.layers.1.self_attn", "encoder.layers.1.attentions.0")
        .replace(".ffn.layers", ".ffns.0.layers"): value
        for key, value in checkpoint.state_dict.items()
    }
    assert older.keys() != checkpoint.state_dict.keys()
    content = {"state_dict": older, "meta": checkpoint.meta}
    found = load_segmentor(saved(tmp_path / "older.pth", content)).state_dict()
    for key, value in load_segmentor(path).state_dict().items():
        assert torch.equal(found[key], value)


def test_copies_of_one_parameter_may_be_left_out_but_not_differ(
    oracle: Path, tmp_path: Path
) -> None:
    """safetensors and hand-made files keep a shared tensor once; MaskDINO's keep eight copies."""
    name = "maskdino_swin"
    state = state_of(oracle, name)
    copies = ("predictor.bbox_embed.", "predictor.decoder.bbox_embed.", "predictor.decoder.norm.")
    once = {key: value for key, value in state.items() if not any(c in key for c in copies)}
    assert len(once) == len(state) - 4 * 6 - 2
    once.pop("sem_seg_head.predictor.label_enc.weight")  # for training alone
    image = image_of(oracle, name)
    with torch.no_grad():
        expected = project(oracle, name)(image)
        save_file({k: v.contiguous() for k, v in once.items()}, tmp_path / "once.safetensors")
        found = load_segmentor(tmp_path / "once.safetensors", config=config_file(oracle, name))
        assert relative(found(image), expected) <= TOLERANCE
    changed = "sem_seg_head.predictor.decoder.bbox_embed.1.layers.2.bias"
    with pytest.raises(CheckpointError, match=r"bbox_embed.*bbox_embed.* differ\. Expected equal"):
        load_changed(tmp_path, oracle, name, state | {changed: state[changed] + 1})


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("mask2former_r50", "predictor.transformer_cross_attention_layers.2"),
        ("mask2former_r50", "predictor.transformer_ffn_layers"),
        ("mask2former_r50", "predictor.class_embed"),
        ("mask2former_r50", "pixel_decoder.mask_features"),
        ("mask2former_r50", "pixel_decoder.transformer.encoder.layers.0"),
        ("mask2former_r50", "pixel_decoder"),
        ("maskdino_r50", "pixel_decoder"),
        ("maskdino_r50", "predictor.decoder.layers.0"),
        ("maskdino_r50", "predictor.query_feat"),
        ("maskdino_r50", "predictor.decoder.ref_point_head"),
    ],
)
def test_missing_parts_are_named(oracle: Path, tmp_path: Path, name: str, lost: str) -> None:
    state = {k: v for k, v in state_of(oracle, name).items() if f".{lost}." not in k}
    assert len(state) < len(state_of(oracle, name))
    with pytest.raises(CheckpointError, match=r"missing|is not there"):
        load_changed(tmp_path, oracle, name, state)


@pytest.mark.parametrize(
    ("name", "section", "says"),
    [
        ("mask2former_swin", {"num_queries": 100}, "num_queries: the config says 100"),
        ("mask2former_swin", {"num_classes": 150}, "num_classes: the config says 150"),
        ("mask2former_swin", {"encoder_heads": 7}, "heads × 3 levels × points"),
        ("mask2former_swin", {"norm_groups": 7}, "norm_groups"),
        ("mask2former_swin", {"decoder_layers": 9}, "decoder_layers: the config says 9"),
        ("maskdino_swin", {"feature_order": "high2low"}, "feature_order"),
        ("maskdino_swin", {"two_stage": False}, "two_stage"),
        ("maskdino_swin", {"class_scores": "softmax"}, "no output for no object"),
        ("maskdino_swin", {"no_object": True}, "no_object"),
    ],
)
def test_config_of_another_head_is_refused(
    oracle: Path, name: str, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer_config(state_of(oracle, name), config=Config({"model": {"decode_head": section}}))


def test_config_of_another_network_is_refused(oracle: Path) -> None:
    other = read_config(config_file(oracle, "mask2former_r50"))
    with pytest.raises(CheckpointError, match=r"is a ResNet, and the weights .* SwinTransformer"):
        infer_config(state_of(oracle, "mask2former_swin"), config=other)


def test_feed_forward_networks_of_heads_may_be_fdconv(oracle: Path) -> None:
    """As the published converter leaves a whole Mask2Former."""
    from fdconv_deploy.config import FDConvConfig

    conv = FDConvConfig(kernel_num=8)
    for name in ("mask2former_r50", "maskdino_r50"):
        architecture = project(oracle, name).architecture
        head = architecture.decode_head.model_copy(update={"conv": conv})
        state = shapes_of(architecture.model_copy(update={"decode_head": head}))
        found = infer_config(state).architecture.decode_head
        assert found.conv is not None
        assert found.conv.kernel_num == 8
        assert found.model_copy(update={"conv": None}) == architecture.decode_head


@pytest.mark.parametrize("name", [*PROJECTS, "segformer_mit", "upernet_convnext", "panoptic"])
def test_network_is_told_back_by_its_own_config(oracle: Path, tmp_path: Path, name: str) -> None:
    """Saved as OpenMMLab names it, read again: the same network, and nothing of it assumed."""
    if name in PROJECTS:
        network = project(oracle, name)
    else:
        family = "mask2former_panoptic" if name == "panoptic" else name
        network = load_segmentor(oracle / f"families/{family}/fdconv_train.pth")
    architecture = network.architecture
    path = tmp_path / "saved.pth"
    save_checkpoint(path, network, architecture)
    found = load_segmentor(path)
    assert found.architecture == architecture
    assert {s.field for s in found.inference.assumed} <= {"classes", "palette"}
    weights = network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in found.state_dict().items())


def test_inspect_names_the_framework(oracle: Path, tmp_path: Path) -> None:
    name = "mask2former_swin"
    report = inspect_checkpoint(project_file(oracle, name), config_file(oracle, name))
    assert report.ready, report.problem
    assert (report.framework, report.format, report.kind) == (
        "detectron2",
        "detectron2",
        "segmentor",
    )
    assert report.dynamic_layers == 14
    assert report.training_size == (512, 512)  # INPUT.CROP
    backbone = {
        key.removeprefix("backbone."): value
        for key, value in state_of(oracle, name).items()
        if key.startswith("backbone.")
    }
    content = {"model": backbone, "__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps(content))
    report = inspect_checkpoint(tmp_path / "swin.pkl")
    assert (report.framework, report.kind) == ("detectron2", "backbone")
    assert report.backbone == project(oracle, name).architecture.backbone
    assert not report.ready
    assert framework_of({"backbone.layer1.0.conv1.weight": torch.ones(1)}) == "OpenMMLab"


def test_aliases_in_yaml_fill_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{o}'] * 8)}]" for o, n in pairwise(names)]
    path.write_text("\n".join(lines) + "\nMODEL: {}\n")
    with pytest.raises(CheckpointError, match=r"repeats itself by aliases to more than 100,000"):
        read_config(path)
    path.write_text("a: &a [1, 2]\nMODEL: {PIXEL_MEAN: *a, PIXEL_STD: *a}\n")
    assert read_config(path).section("model", "data_preprocessor")["std"] == [1, 2]


def test_tags_of_python_in_yaml_are_never_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "_BASE_: ../Base.yaml\n"
        "MODEL:\n"
        "  BACKBONE:\n    NAME: D2SwinTransformer\n"
        "  SWIN:\n    DEPTHS: [2, 2, 18, 2]\n"
        "INPUT:\n"
        f"  MIN_SIZE_TRAIN: !!python/object/apply:eval [\"open('{tmp_path}/x', 'w')\"]\n"
        "  MIN_SIZE_TEST: !!python/object/apply:os.system ['true']\n"
    )
    found = read_config(path)
    assert not (tmp_path / "x").exists()
    assert found.section("model", "backbone")["depths"] == [2, 2, 18, 2]
    assert "scale" not in found.values["test_pipeline"][1]
    assert any("line 8: INPUT.MIN_SIZE_TRAIN could not be read" in note for note in found.notes)
    assert any("builds on ../Base.yaml" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1, 2", "is not valid YAML"),
        ("- 1\n- 2\n", "expected MODEL and its sections"),
        ("model: 1\n", "expected MODEL and its sections"),
        ("MODEL: !!python/name:os.system\n", "expected MODEL and its sections"),
        ("a: " + "[" * 3000, "is not valid YAML"),
        ("MODEL:\n  BACKBONE: 7\n", "describes no network"),
        ("MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n", "describes no network"),
    ],
)
def test_yaml_of_something_else_is_refused(
    oracle: Path, tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_segmentor(project_file(oracle, "mask2former_swin"), config=path)


def test_broken_sections_of_yaml_do_not_break_the_reader(oracle: Path, tmp_path: Path) -> None:
    """A value of another kind than the framework writes is refused in a sentence."""
    text = config_file(oracle, "maskdino_swin").read_text()
    path = tmp_path / "config.yaml"
    for before, after in (
        ("WINDOW_SIZE: 4", "WINDOW_SIZE: [4, 5]"),
        ("TOTAL_NUM_FEATURE_LEVELS: 4", "TOTAL_NUM_FEATURE_LEVELS: many"),
        ("NUM_CLASSES: 11", "NUM_CLASSES: {a: 1}"),
        ("FORMAT: RGB", "FORMAT: [R, G]"),
        ("NHEADS: 8", "NHEADS: 0"),
        ("PIXEL_MEAN:", "PIXEL_MEAN: 7\n  OTHER:"),
    ):
        assert before in text
        path.write_text(text.replace(before, after))
        try:
            load_segmentor(project_file(oracle, "maskdino_swin"), config=path)
        except CheckpointError:
            continue


def test_bgr_networks_of_detectron2_are_told(oracle: Path, tmp_path: Path) -> None:
    text = config_file(oracle, "mask2former_r50").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("FORMAT: RGB", "FORMAT: BGR"))
    found = load_segmentor(project_file(oracle, "mask2former_r50"), config=path)
    assert found.architecture.preprocessing.bgr_to_rgb is False


def test_order_of_resizing_that_is_not_ours_is_said(oracle: Path, tmp_path: Path) -> None:
    text = config_file(oracle, "mask2former_r50").read_text()
    path, field = tmp_path / "config.yaml", "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: "
    for value, said in (("false", 0), ("true", 1)):
        path.write_text(text.replace(f"{field}false", f"{field}{value}"))
        notes = read_config(path).notes
        assert sum("before they become scores" in note for note in notes) == said
    # Of segments and objects it is ours.
    path.write_text(path.read_text().replace("PANOPTIC_ON: false", "PANOPTIC_ON: true"))
    assert not any("before they become scores" in note for note in read_config(path).notes)


def test_images_are_resized_as_detectron2_does(oracle: Path) -> None:
    """Pillow's bilinear averages where it shrinks; OpenCV's does not."""
    how = project(oracle, "mask2former_r50").architecture.preprocessing
    image = np.random.default_rng(0).integers(0, 256, (1200, 1800, 3), dtype=np.uint8)
    height, width = published_size(*image.shape[:2], how)
    assert (height, width) == (512, 768)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))
    assert np.array_equal(resize(image, height, width, how.resample), expected)
    assert not np.array_equal(resize(image, height, width), expected)
