#!/bin/bash
# mmsegmentation 1.2.2, SegTTAModel (tools/test.py --tta) with a head of one output: postprocess_result has already
# made its seg_logits a sigmoid, and merge_preds takes the sigmoid again. No probability is below 0.5 then, so that at
# the usual thresholds (0.3, 0.5) every pixel is class 1. Even one view, the image as it is, loses its answer.
# Seen: "class 1: 49.9 % by the model, 100.0 % by SegTTAModel of one view". Expected: the same twice.
# Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0 numpy==2.4.6 opencv-python==5.0.0.93 ftfy==6.3.1 \
    regex==2026.11.19 setuptools==79.0.1
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'EOF'
import sys
import types
from importlib.machinery import ModuleSpec

operators = types.ModuleType("mmcv._ext")  # mmcv-lite has no compiled operators, and none is called
operators.__spec__ = ModuleSpec("mmcv._ext", None)
operators.__getattr__ = lambda name: (lambda *a: None) if name[0] != "_" else getattr(object, name)
sys.modules["mmcv._ext"] = operators

import torch
from mmengine.config import ConfigDict
from mmseg.models.segmentors import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

register_all_modules()
torch.manual_seed(0)
model = MODELS.build(
    {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "mean": [127.0] * 3, "std": [60.0] * 3},
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8},
        "decode_head": {
            "type": "FCNHead", "in_channels": 64, "in_index": 3, "channels": 8, "num_convs": 1,
            "concat_input": False, "num_classes": 2, "out_channels": 1, "threshold": 0.5,
            "align_corners": False,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        },
        "test_cfg": ConfigDict(mode="whole"),
    }
).eval()
image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
meta = {"ori_shape": (96, 96), "img_shape": (96, 96), "img_path": ""}
data = lambda: {"inputs": [image], "data_samples": [SegDataSample(metainfo=meta)]}
with torch.no_grad():
    logits = model.encode_decode(model.data_preprocessor(data())["inputs"], [meta])
    model.decode_head.conv_seg.bias -= logits.median()  # half of the pixels are class 1
    one = model.test_step(data())[0].pred_sem_seg.data.mean().item()
    views = {key: [value] for key, value in data().items()}
    several = SegTTAModel(model).test_step(views)[0].pred_sem_seg.data.mean().item()
print(f"class 1: {one:.1%} by the model, {several:.1%} by SegTTAModel of one view".replace("%", " %"))
sys.exit(not (0.4 < one < 0.6 and several == 1))
EOF
