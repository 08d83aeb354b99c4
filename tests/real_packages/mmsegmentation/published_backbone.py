"""mmsegmentation's ResNet with this project's layer, by the names that configs give them.

To be imported after `compiled_operators.declare`.
"""

from __future__ import annotations

from typing import Any

from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS
from torch import nn

from fdconv_deploy.nn import FDConv2d


@MODELS.register_module(name="FDConv")
class FDConv(FDConv2d):
    """The published layer, by the name that configs give it."""


@MODELS.register_module()
class ResNet_FDConv(ResNet):
    """mmsegmentation's ResNet with plain shortcuts, as the published one has them."""

    def make_res_layer(self, **options: Any) -> nn.Module:
        """A stage, its convolutions those of ``conv_cfg`` and its shortcut's plain."""
        stage = super().make_res_layer(**options)
        shortcut = stage[0].downsample
        for index, module in enumerate(shortcut or ()):
            if isinstance(module, FDConv2d):
                shortcut[index] = nn.Conv2d(
                    module.in_channels, module.out_channels, 1, module.stride, bias=False
                )
        return stage
