"""Write small networks of real mmsegmentation, and what it computes with them.

    python tests/real_packages/mmsegmentation/make.py      # see README.md

Network, heads, preprocessing, test modes and checkpoint are mmsegmentation's and mmengine's.
Of this project is only the convolution layer that is registered as ``FDConv``, which the
published code's tensors prove elsewhere.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

from compiled_operators import declare  # noqa: E402

declare()

import mmengine  # noqa: E402
import mmseg  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu  # noqa: E402
from mmengine.runner.checkpoint import save_checkpoint as save  # noqa: E402
from mmseg.datasets.transforms import PackSegInputs  # noqa: E402
from mmseg.registry import MODELS, TRANSFORMS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402
from published_backbone import ResNet_FDConv  # noqa: E402, F401 - registers itself
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fdconv_deploy.nn import FDConv2d  # noqa: E402
from tests.reference.lively import enliven, seeded  # noqa: E402

STOCK = Path(mmseg.__file__).parent / ".mim" / "configs"
CLASSES = ("sky", "road", "tree", "car", "wall")
PALETTE = [[70, 130, 180], [128, 64, 128], [107, 142, 35], [0, 0, 142], [102, 102, 156]]
NORM = {"type": "SyncBN", "requires_grad": True}
# (height, width) of the image and of what the network sees: nothing divides anything.
IMAGE, NETWORK = (41, 53), (33, 43)


D8 = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}


def backbone(above: int = 7, **more: Any) -> dict[str, Any]:
    """A ResNet-18 with outputs of 2, 4, 8 and 16 channels.

    Layers of more than ``above`` channels are FDConv ones.
    """
    return {
        "type": "ResNet_FDConv",
        "depth": 18,
        "num_stages": 4,
        "base_channels": 2,
        "stem_channels": 8,
        "out_indices": (0, 1, 2, 3),
        "norm_cfg": NORM,
        "style": "pytorch",
        "conv_cfg": {"type": "FDConv", "kernel_num": 4, "use_fdconv_if_c_gt": above},
        **more,
    }


def head(kind: str, channels: int = 6, **more: Any) -> dict[str, Any]:
    """A decode head of five classes."""
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    common = {"channels": channels, "dropout_ratio": 0.1, "num_classes": len(CLASSES)}
    return {"type": kind, **common, "norm_cfg": NORM, "loss_decode": loss, **more}


def fcn(**more: Any) -> dict[str, Any]:
    """The usual auxiliary head."""
    one = {"in_channels": 8, "in_index": 2, "num_convs": 1, "concat_input": False}
    return head("FCNHead", **one | more)


CASES: dict[str, dict[str, Any]] = {
    "psp": {
        "backbone": backbone(above=3, **D8, deep_stem=True),
        "decode_head": head("PSPHead", in_channels=16, in_index=3, align_corners=False),
        "auxiliary_head": fcn(align_corners=False),
    },
    "psp_aligned": {
        "backbone": backbone(**D8),
        "decode_head": head(
            "PSPHead", in_channels=16, in_index=-1, pool_scales=(1, 2, 5), align_corners=True
        ),
        "test_cfg": {"mode": "slide", "crop_size": (25, 31), "stride": (17, 21)},
    },
    "aspp": {
        "backbone": backbone(**D8, avg_down=True, deep_stem=True),
        "decode_head": head(
            "ASPPHead", in_channels=16, in_index=3, dilations=(1, 2, 4, 36), align_corners=True
        ),
        "auxiliary_head": head("PSPHead", in_channels=8, in_index=2, align_corners=True),
    },
    "sep_aspp": {
        "backbone": backbone(
            strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), multi_grid=(1, 2), deep_stem=True
        ),
        "decode_head": head(
            "DepthwiseSeparableASPPHead",
            in_channels=16,
            in_index=3,
            dilations=(1, 3, 6, 12),
            c1_in_channels=2,
            c1_channels=3,
            align_corners=False,
        ),
        "auxiliary_head": head("ASPPHead", in_channels=8, in_index=2, dilations=(3, 1)),
    },
    "sep_aspp_aligned": {
        "backbone": backbone(**D8),
        "decode_head": head(
            "DepthwiseSeparableASPPHead",
            in_channels=16,
            in_index=3,
            c1_in_channels=2,
            c1_channels=6,
            align_corners=True,
        ),
        "auxiliary_head": fcn(align_corners=True),
        "test_cfg": {"mode": "slide", "crop_size": (25, 31), "stride": (17, 21)},
    },
    "sep_aspp_coarse": {
        "backbone": backbone(**D8),
        "decode_head": head(
            "DepthwiseSeparableASPPHead",
            in_channels=16,
            in_index=3,
            dilations=(1, 2),
            c1_in_channels=0,
            c1_channels=0,
        ),
    },
    "fcn_joined": {
        "backbone": backbone(),
        "decode_head": head(
            "FCNHead",
            in_channels=[4, 16, 2],
            in_index=[1, 3, 0],
            input_transform="resize_concat",
            align_corners=True,
            norm_cfg=None,
            dilation=2,
        ),
    },
}


def build(name: str, model: dict[str, Any]) -> tuple[nn.Module, Config]:
    """A case's network in eval mode, every branch alive, and its config."""
    preprocessor = {
        "type": "SegDataPreProcessor",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True,
        "pad_val": 0,
        "seg_pad_val": 255,
    }
    config = Config(
        {
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": preprocessor,
                "train_cfg": {},
                "test_cfg": {"mode": "whole"},
                **model,
            },
            "test_pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "Resize", "scale": NETWORK[::-1], "keep_ratio": False},
                {"type": "PackSegInputs"},
            ],
        }
    )
    torch.manual_seed(list(CASES).index(name))
    network = revert_sync_batchnorm(MODELS.build(config.model))
    enliven_all(network, list(CASES).index(name))
    return network, config


@torch.no_grad()
def enliven_all(network: nn.Module, seed: int) -> None:
    """Leave no layer as it was initialised, and measure each BatchNorm's statistics."""
    generator = seeded(seed)
    modules = dict(network.named_modules())
    layers = {k: m for k, m in modules.items() if isinstance(m, FDConv2d) and m.is_dynamic}
    for index, layer in enumerate(layers.values()):
        spectrum = layer.dft_weight.detach().clone()
        enliven(layer, seed + index)
        layer.dft_weight.copy_(spectrum)
        for name, parameter in layer.named_parameters():
            if name.endswith("_fc.weight"):
                parameter *= 0.3  # no image drives an attention to its end
    norms = {k: m for k, m in modules.items() if isinstance(m, nn.BatchNorm2d)}
    blocks = {id(m.norm3 if hasattr(m, "norm3") else m.norm2)
              for m in modules.values() if hasattr(m, "norm2")}  # fmt: skip
    for name, norm in norms.items():
        inner = any(name.startswith(f"{layer}.") for layer in layers)
        gain = 0.4 if inner else 0.3 if id(norm) in blocks else 1.0
        norm.reset_running_stats()
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * gain + gain / 2)
        if not inner:
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.2)
    for module in modules.values():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
    for name in ("decode_head", "auxiliary_head"):  # initialised next to nothing
        if hasattr(network, name):
            weight = getattr(network, name).conv_seg.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    network.train()
    for step in range(3):
        for norm in norms.values():
            norm.momentum = 1 / (step + 1)  # the mean over the batches seen
        images = torch.stack([picture(100 * seed + 10 * step + i, (96, 96)) for i in range(8)])
        outputs = network.extract_feat((images.permute(0, 3, 1, 2).float() - 116) / 57)
        network.decode_head(outputs)
        if network.with_auxiliary_head:
            network.auxiliary_head(outputs)
    network.eval()
    images = torch.stack([picture(900 + seed + i, NETWORK) for i in range(4)])
    logits = network((images.permute(0, 3, 1, 2).float() - 116) / 57)
    network.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))  # let every class win somewhere


def picture(seed: int, size: tuple[int, int]) -> Tensor:
    """Something with edges and areas: (height, width, 3) uint8."""
    generator = seeded(seed)
    coarse = torch.rand((1, 3, 5, 6), generator=generator) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0]
    steps = (smooth / 40).round() * 40
    noise = torch.randn((3, *size), generator=generator) * 6
    return (steps + noise).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


@torch.no_grad()
def write_case(name: str) -> None:
    """The checkpoint ``<name>.pth`` and the tensors ``<name>.safetensors``."""
    network, config = build(name, CASES[name])
    image = picture(7 + list(CASES).index(name), IMAGE)
    # mmsegmentation reads images as BGR.
    results: dict[str, Any] = {"img": np.ascontiguousarray(image.numpy()[..., ::-1])}
    results |= {"img_shape": IMAGE, "ori_shape": IMAGE, "img_path": "", "seg_map_path": ""}
    results = TRANSFORMS.build(config.test_pipeline[1])(results)
    packed = PackSegInputs()(results)
    data = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    batch = network.data_preprocessor(data, training=False)
    inputs, samples = batch["inputs"], batch["data_samples"]
    assert tuple(inputs.shape[2:]) == NETWORK
    tensors = {"image": image, "input": inputs, "head_logits": network(inputs)}
    if network.with_auxiliary_head:
        tensors["aux_logits"] = network.auxiliary_head(network.extract_feat(inputs))
    tensors["logits"] = network.inference(inputs, [samples[0].metainfo])
    answer = network.predict(inputs, samples)[0]
    ranked = answer.seg_logits.data.topk(2, dim=0).values
    tensors["labels"] = answer.pred_sem_seg.data[0].to(torch.uint8)
    tensors["margin"] = (ranked[0] - ranked[1]).half()
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / f"{name}.safetensors")
    checkpoint = {
        "meta": {
            "cfg": config.pretty_text,
            "seed": 0,
            "experiment_name": name,
            "time": "20260101_000000",
            "mmengine_version": mmengine.__version__,
            "epoch": 0,
            "iter": 1,
            "dataset_meta": {"classes": CLASSES, "palette": PALETTE},
        },
        "state_dict": weights_to_cpu(get_state_dict(network)),
    }
    path = HERE / f"{name}.pth"
    if name == "psp":
        save(checkpoint, str(path))
    else:
        # As mmdetection's publishing tool saves; a zip's record is larger than these tensors.
        torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    double = network.double()
    exact = double(inputs.double())
    noise = (tensors["head_logits"] - exact).abs().max() / exact.abs().max()
    share = tensors["labels"].flatten().bincount(minlength=5) / tensors["labels"].numel()
    moved = double(inputs.double() + 1e-6 * torch.randn(inputs.shape, dtype=torch.float64))
    drift = (moved - exact).abs().max() / exact.abs().max()
    layers = sum(isinstance(m, FDConv2d) and m.is_dynamic for m in network.modules())
    print(
        f"{name}: {layers} FDConv layers, {tuple(tensors['head_logits'].shape)}, float32 is "
        f"{noise:.1e} from float64, 1e-6 of noise moves {drift:.1e}; "
        f"classes {[round(float(part), 2) for part in share]}"
    )


def write_keys() -> None:
    """Names and shapes of stock networks at full size, and the names in every stock head."""
    networks: dict[str, Any] = {}
    backbones = []
    for name in ("pspnet_r50-d8", "deeplabv3_r50-d8", "deeplabv3plus_r50-d8"):
        config = Config.fromfile(STOCK / "_base_" / "models" / f"{name}.py")
        config.model.backbone.type = "ResNet_FDConv"
        config.model.backbone.deep_stem = True
        config.model.backbone.conv_cfg = {"type": "FDConv", "kernel_num": 32}
        network = MODELS.build(config.model)
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        backbones.append({k: v for k, v in shapes.items() if k.startswith("backbone.")})
        heads_only = {k: v for k, v in shapes.items() if not k.startswith("backbone.")}
        networks[name] = {"config": config.pretty_text, "shapes": heads_only}
        print(f"{name}: {len(shapes)} tensors")
    assert backbones[0] == backbones[1] == backbones[2]
    stock = {"backbone": backbones[0], "networks": networks}
    (HERE / "stock.json").write_text(json.dumps(stock, separators=(",", ":")) + "\n")

    heads: dict[str, list[str]] = {}
    cascades: dict[str, dict[str, Any]] = {}
    files = [*sorted((STOCK / "_base_" / "models").glob("*.py"))]
    files += [
        next((STOCK / place).glob("*.py")) for place in ("segnext", "ddrnet", "pidnet", "stdc")
    ]
    files += sorted((STOCK / "knet").glob("*r50-d8_fcn*")) + sorted(
        (STOCK / "sem_fpn").glob("*r50*")
    )
    for file in files:
        text = file.read_text()
        if "mmpretrain" in text or "mmdet" in text:  # packages that are not here
            continue
        model = Config.fromfile(file).model
        if "decode_head" not in model:  # a config that changes parts of another's heads
            continue
        both = [part for part in (model.get("decode_head"), model.get("auxiliary_head")) if part]
        for section in [
            s for part in both for s in (part if isinstance(part, (list, tuple)) else [part])
        ]:
            if section["type"] not in heads:
                names = MODELS.build(section).state_dict()
                # One name of each inner module tells as much as all of them.
                heads[section["type"]] = list(
                    {".".join(n.split(".")[:3]): n for n in names}.values()
                )
        if isinstance(model.decode_head, (list, tuple)):
            cascades[file.stem] = {
                "type": model.type,
                "heads": [section["type"] for section in model.decode_head],
            }
    content = {"heads": dict(sorted(heads.items())), "cascades": cascades}
    (HERE / "heads.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
    print(f"{len(heads)} heads: {', '.join(sorted(heads))}; cascades: {', '.join(cascades)}")


def main() -> None:
    """Write everything, or only the cases named on the command line (``keys``: the names)."""
    register_all_modules()
    torch.set_num_threads(1)
    start = time.monotonic()
    for name in sys.argv[1:] or [*CASES, "keys"]:
        write_keys() if name == "keys" else write_case(name)
    size = sum(
        f.stat().st_size for f in HERE.iterdir() if f.suffix in (".pth", ".safetensors", ".json")
    )
    print(f"{size / 1e6:.2f} MB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
