"""Checkpoints as detectron2 writes them, by the class of fvcore that it writes them with.

    python make.py FOLDER

detectron2's DetectionCheckpointer is fvcore's Checkpointer; it is on no package index itself. The
``.pkl`` is made as its converters (tools/convert-torchvision-to-d2.py and the model zoo's) make
them: a pickle of numpy arrays under ``model``, with ``__author__`` and ``matching_heuristics``.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn


class Network(nn.Module):
    """Names of a detectron2 model: a backbone and a semantic head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})
        self.sem_seg_head = nn.ModuleDict({"predictor": nn.Conv2d(4, 2, 1)})
        self.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1))


def main(destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    sum(p.square().sum() for p in network.parameters()).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, CosineParamScheduler(1.0, 0.1))
    keeper = Checkpointer(network, str(destination), optimizer=optimizer, scheduler=scheduler)
    PeriodicCheckpointer(keeper, period=1, max_iter=10).step(0, trainer_note="iteration 0")
    (destination / "last_checkpoint").unlink()
    (destination / "model_0000000.pth").rename(destination / "model.pth")
    arrays = {name: value.numpy() for name, value in network.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    for protocol in (2, 4, 5):
        with (destination / f"model_{protocol}.pkl").open("wb") as file:
            pickle.dump(content, file, protocol=protocol)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
