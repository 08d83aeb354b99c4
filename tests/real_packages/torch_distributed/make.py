"""Files of training on several devices, as PyTorch itself writes them on one process.

    python make.py FOLDER

FSDP2's state dict of DTensors, a folder of torch.distributed.checkpoint, and the state dict of a
network in torch.compile and in activation checkpointing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Network(nn.Module):
    """Only the names of mmsegmentation's: what is proved here is the file around them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.ModuleDict({"conv_seg": nn.Conv2d(4, 2, 1)})


def main(destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    torch.manual_seed(0)
    network = Network()
    network.backbone = checkpoint_wrapper(torch.compile(network.backbone))
    torch.save(network.state_dict(), destination / "wrapped.pth")
    network = Network()
    dcp.save({"model": network.state_dict()}, checkpoint_id=destination / "dcp")
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    torch.save({"model": network.state_dict()}, destination / "fsdp2.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
