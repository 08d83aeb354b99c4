"""Checkpoints as the real Lightning saves them, with hyper-parameters of OmegaConf.

    python make.py FOLDER

The network is an attribute of the module (once ``model``, once ``seg_model`` in a wrapper), the
loss and a metric stand beside it with buffers of their own, and the hyper-parameters hold what
users put there: OmegaConf's, an enum, a path, a date, numpy's numbers.
"""

from __future__ import annotations

import datetime
import enum
import shutil
import sys
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from omegaconf import OmegaConf
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric


class Mode(enum.Enum):
    WHOLE = "whole"


class Network(nn.Module):
    """Only the names of mmsegmentation's: what is proved here is the file around them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.ModuleDict({"conv_seg": nn.Conv2d(4, 2, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode_head["conv_seg"](self.backbone(x))


class Module(L.LightningModule):
    def __init__(self, settings: object, attribute: str, **more: object) -> None:
        super().__init__()
        self.save_hyperparameters()
        network = Network()
        setattr(self, attribute, torch.compile(network) if attribute == "net" else network)
        self.attribute = attribute
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0]).reshape(2, 1, 1))
        self.train_loss = MeanMetric()
        self.train_loss.persistent(True)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        network = getattr(self, self.attribute)
        logits = getattr(network, "_orig_mod", network)(batch)
        loss = self.criterion(logits, torch.ones_like(logits))
        self.train_loss(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(destination: Path, attribute: str, callbacks: list[object]) -> None:
    settings = OmegaConf.create(
        {"net": {"depth": 18, "bands": "${kinds}"}, "kinds": [2, 4, 8], "mode": Mode.WHOLE}
    )
    module = Module(
        settings,
        attribute,
        root=Path("/data/street"),
        day=datetime.datetime(2026, 11, 1, tzinfo=datetime.timezone.utc),
        mode=Mode.WHOLE,
        scale=np.float32(0.5),
        mean=np.array([1.0, 2.0]),
    )
    with tempfile.TemporaryDirectory() as name:
        keeper = ModelCheckpoint(dirpath=name, filename="last", save_last=False)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[keeper, *callbacks],
            default_root_dir=name,
        )
        L.seed_everything(0)
        trainer.fit(module, DataLoader(torch.randn(4, 3, 8, 8), batch_size=2))
        shutil.copy(keeper.best_model_path, destination)


def main(destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    train(destination / "model.ckpt", "model", [])
    train(destination / "compiled.ckpt", "net", [])
    ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    train(destination / "averaged.ckpt", "seg_model", [ema])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
