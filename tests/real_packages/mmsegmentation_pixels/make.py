"""Write networks of mmsegmentation 1.2.2 and what it makes of images: see README.md."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent / "mmsegmentation")]

from compiled_operators import declare  # noqa: E402

declare()

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmcv.transforms import Compose  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner.checkpoint import save_checkpoint  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402
from published_backbone import ResNet_FDConv  # noqa: E402, F401 - registers itself
from torch import nn  # noqa: E402

SIZE = (41, 57)
CONV = {
    "type": "FDConv",
    "kernel_num": 4,
    "use_fdconv_if_c_gt": 7,
    "fbm_cfg": {"max_size": (32, 32)},
}


def head(**fields: Any) -> dict[str, Any]:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    values = {"in_channels": 16, "in_index": 2, "channels": 8, "num_convs": 1}
    return {
        "type": "FCNHead", **values, "concat_input": False, "dropout_ratio": 0.1,
        "norm_cfg": {"type": "BN", "requires_grad": True}, "align_corners": False,
        "loss_decode": loss, **fields,
    }  # fmt: skip


def config(
    mean: list[float],
    std: list[float],
    load: dict[str, Any],
    decode_head: dict[str, Any],
    **model: Any,
) -> Config:
    return Config(
        {
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": {
                    "type": "SegDataPreProcessor", "mean": mean, "std": std, "bgr_to_rgb": True,
                    "pad_val": 0, "seg_pad_val": 255,
                },
                "backbone": {
                    "type": "ResNet_FDConv", "depth": 18, "in_channels": len(mean),
                    "base_channels": 4, "stem_channels": 8, "num_stages": 3,
                    "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0, 1, 2),
                    "norm_cfg": {"type": "BN", "requires_grad": True}, "style": "pytorch",
                    "conv_cfg": CONV,
                },
                "decode_head": decode_head,
                "train_cfg": {},
                "test_cfg": {"mode": "whole"},
                **model,
            },
            "test_pipeline": [
                load,
                {"type": "Resize", "scale": (80, 50), "keep_ratio": True},
                {"type": "PackSegInputs"},
            ],
        }
    )  # fmt: skip


CASES: dict[str, tuple[Config, tuple[str, ...]]] = {
    "four": (
        config(
            [1353.0, 1117.2, 1042.0, 2301.5], [245.7, 333.0, 395.1, 1083.0],
            {"type": "LoadSingleRSImageFromFile"},
            head(num_classes=2, out_channels=1),
            auxiliary_head=head(
                in_channels=8, in_index=1, num_classes=2, out_channels=1, threshold=0.5
            ),
        ),
        ("background", "road"),
    ),
    "gray": (
        config(
            [116.0], [57.0], {"type": "LoadImageFromFile", "color_type": "grayscale"},
            head(num_classes=1, threshold=0.5),
        ),
        ("background", "road"),
    ),
    "rgba": (
        config(
            [110.0, 120.0, 130.0, 200.0], [50.0, 55.0, 60.0, 40.0],
            {"type": "LoadImageFromFile", "color_type": "unchanged"},
            head(num_classes=2),
        ),
        ("background", "road"),
    ),
    "deep": (
        config(
            [30000.0], [15000.0], {"type": "LoadImageFromFile", "color_type": "unchanged"},
            head(num_classes=2, out_channels=1, threshold=0.7, align_corners=True),
            test_cfg={"mode": "slide", "crop_size": (32, 48), "stride": (20, 30)},
        ),
        ("road",),
    ),
}  # fmt: skip


def picture(seed: int, bands: int) -> np.ndarray:
    """(SIZE, bands) float64 from 0 to 1: blocks, slopes and noise."""
    random = np.random.default_rng(seed)
    coarse = random.random((6, 7, bands))
    grown = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).reshape(*SIZE, bands)
    return np.clip(0.9 * np.round(grown * 5) / 5 + 0.1 * random.random((*SIZE, bands)), 0, 1)


def loaded(name: str, pipeline: list[dict[str, Any]], seed: int) -> tuple[dict[str, Any], Compose]:
    """What the pipeline begins with, and the steps to go through."""
    if name == "four":
        array = (picture(seed, 4) * 4000).astype(np.uint16)
        # What LoadSingleRSImageFromFile hands on, once GDAL has read the file.
        results = {
            "img": array.astype(np.float32),
            "img_path": "",
            "img_shape": SIZE,
            "ori_shape": SIZE,
        }
        return {**results, "raw": array}, Compose(pipeline[1:])
    if name == "gray":
        cv2.imwrite(str(HERE / "gray.png"), (picture(seed, 3) * 255).astype(np.uint8))
    elif name == "rgba":
        cv2.imwrite(str(HERE / "rgba.png"), (picture(seed, 4) * 255).astype(np.uint8))
    else:
        cv2.imwrite(str(HERE / "deep.png"), (picture(seed, 1) * 65535).astype(np.uint16))
    return {"img_path": str(HERE / f"{name}.png")}, Compose(pipeline)


@torch.no_grad()
def write(name: str) -> None:
    """One checkpoint and its answers."""
    cfg, classes = CASES[name]
    seed = list(CASES).index(name)
    torch.manual_seed(seed)
    network = MODELS.build(cfg.model)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    for key, value in network.state_dict().items():
        if key.endswith("conv_seg.weight"):
            value.normal_(0, 0.5)
    network.eval()
    results, compose = loaded(name, cfg.test_pipeline, seed)
    raw = results.pop("raw", None)
    packed = compose(results)
    data = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    batch = network.data_preprocessor(data)
    first = network(batch["inputs"])
    decode = network.decode_head
    if decode.out_channels == 1:  # the median pixel lies at the threshold
        wanted = math.log(decode.threshold / (1 - decode.threshold))
        decode.conv_seg.bias += wanted - first.median()
    else:
        decode.conv_seg.bias -= first.mean((0, 2, 3))
    answer = network.predict(batch["inputs"], batch["data_samples"])[0]
    meta = {
        "cfg": cfg.pretty_text,
        "dataset_meta": {"classes": classes, "palette": [[9, 9, 9]] * len(classes)},
    }
    save_checkpoint({"meta": meta, "state_dict": network.state_dict()}, str(HERE / f"{name}.pth"))
    labels = answer.pred_sem_seg.data[0].numpy()
    np.savez_compressed(
        HERE / f"{name}.npz",
        input=batch["inputs"][0].numpy(),
        seg_logits=answer.seg_logits.data.numpy(),
        labels=labels.astype(np.uint8),
        **({} if raw is None else {"raw": raw}),
    )
    print(
        name, batch["inputs"].shape, f"class 1: {labels.mean():.2f}, threshold {decode.threshold}"
    )


def main() -> None:
    """Write every case."""
    register_all_modules()
    for name in CASES:
        write(name)


if __name__ == "__main__":
    main()
