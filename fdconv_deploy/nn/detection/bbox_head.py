"""The box head: what a region shows, and where exactly that is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import BoxHeadConfig


class BoxHead(nn.Module):
    """mmdetection's Shared2FCBBoxHead."""

    def __init__(self, in_channels: int, config: BoxHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = in_channels * config.roi.output_size**2
        self.shared_fcs = nn.ModuleList()
        for _ in range(config.num_shared_fcs):
            self.shared_fcs.append(nn.Linear(width, config.fc_out_channels))
            width = config.fc_out_channels
        boxes = 1 if config.reg_class_agnostic else config.num_classes
        self.fc_cls = nn.Linear(width, config.num_classes + 1)
        self.fc_reg = nn.Linear(width, 4 * boxes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and deltas.

        Args:
            regions: ``(R, C, s, s)`` float32.

        Returns:
            Scores before the softmax, ``(R, classes + 1)``, background last; deltas
            ``(R, classes, 4)``, or ``(R, 1, 4)`` if they are the same for all classes.
        """
        x = regions.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x).unflatten(1, (-1, 4))
