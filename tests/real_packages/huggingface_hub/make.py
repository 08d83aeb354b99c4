"""A checkpoint in several files, as huggingface_hub writes it.

python make.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn


class Network(nn.Module):
    """Only the names of mmsegmentation's: what is proved here is the file around them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.ModuleDict({"conv_seg": nn.Conv2d(4, 2, 1)})


def main(destination: Path) -> None:
    torch.manual_seed(0)
    state = Network().state_dict()
    for name, safe in (("safetensors", True), ("bin", False)):
        folder = destination / name
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, folder, max_shard_size=300, safe_serialization=safe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
