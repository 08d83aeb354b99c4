"""Checkpoints as the real mmengine saves them in training, and as mmsegmentation publishes them.

    python make.py FOLDER

A network of two small layers is trained for three iterations by mmengine's Runner, with its
message hub, optimizer and schedulers, once without and once with the EMA hook; mmsegmentation's
own publish tool then makes the published file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import mmengine
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

CONFIG = """
model = dict(type='EncoderDecoder', data_preprocessor=dict(type='BaseDataPreprocessor'),
             backbone=dict(type='ResNet_FDConv', depth=18), decode_head=dict(type='FCNHead'))
crop_size = (64, 64)
"""


@MODELS.register_module()
class EncoderDecoder(BaseModel):
    """Only the names of mmsegmentation's: what is proved here is the file around them."""

    def __init__(self, backbone: object, decode_head: object, data_preprocessor: object) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.ModuleDict({"conv_seg": nn.Conv2d(4, 2, 1)})

    def forward(self, x: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
        logits = self.decode_head["conv_seg"](self.backbone(x))
        return {"decode.loss_ce": logits.square().mean(), "decode.acc_seg": logits.mean()}


class Noise(Dataset):
    metainfo: ClassVar = {"classes": ("road", "sky"), "palette": [[128, 64, 128], [70, 130, 180]]}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))}


def train(folder: Path, hooks: list[dict[str, object]]) -> Path:
    cfg = Config.fromstring(CONFIG, ".py")
    runner = Runner(
        model=cfg.model,
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=Noise(),
            batch_size=2,
            sampler=dict(type="InfiniteSampler", shuffle=True),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=2),
            dict(type="PolyLR", power=0.9, by_epoch=False, begin=2, end=3),
        ],
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3),
            logger=dict(type="LoggerHook", interval=1),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=0),
        experiment_name="real",
        cfg=cfg,
    )
    runner.train()
    return folder / "iter_3.pth"


def main(destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    tool = Path(mmengine.__file__).parents[1] / "mmseg/.mim/tools/misc/publish_model.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(train(folder / "train", []), destination / "train.pth")
        ema = train(folder / "ema", [dict(type="EMAHook")])
        shutil.copy(ema, destination / "train_ema.pth")
        # The tool calls torch.load as torch 1 did; its own switch lets it.
        subprocess.run(
            [sys.executable, str(tool), str(folder / "train/iter_3.pth"), str(folder / "out.pth")],
            check=True,
            env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        )
        # It moves the file in a process it does not wait for, and calls it ou-…: `out.pth`
        # without any of the letters of `.pth` at its end.
        for _ in range(100):
            found = list(folder.glob("*-????????.pth"))
            if found:
                break
            subprocess.run(["sleep", "0.1"], check=True)
        shutil.copy(found[0], destination / "published.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
