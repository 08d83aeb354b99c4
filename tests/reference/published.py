"""A stand-in for users' copies of the published FDConv class, and for their variants.

It has the published class's attributes, submodules and buffers, and computes by the float64
reference. Nothing of it is `fdconv_deploy`'s, so that only its structure can give it away.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.layer import ReferenceFDConv
from tests.reference.spectrum import band_mask, bin_order


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))


class KernelSpatialModulation_Global(nn.Module):
    def __init__(self, conv: Any, options: dict[str, Any]) -> None:
        super().__init__()
        kernel = conv.kernel_size[0]
        hidden = max(int(conv.in_channels * options["reduction"]), 16)
        self.act_type, self.kernel_size = options["ksm_global_act"], kernel
        self.kernel_num = options["kernel_num"] * options["param_ratio"]
        self.temperature, self.kernel_temp = options["temp"], options["kernel_temp"]
        self.ksm_only_kernel_att = options["ksm_only_kernel_att"]
        self.att_multi, self.spatial_freq_decompose = options["att_multi"], False
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(conv.in_channels, hidden, 1, bias=False)
        norm = {"batch": nn.BatchNorm2d(hidden), "group": nn.GroupNorm(1, hidden)}
        kind, name = options["ksm_global_norm"], options["norm_name"]
        setattr(self, name, norm.get(kind, nn.Identity()))
        self.relu = StarReLU()
        if not self.ksm_only_kernel_att:
            self.channel_fc = nn.Conv2d(hidden, conv.in_channels, 1)
            self.filter_fc = nn.Conv2d(hidden, conv.out_channels, 1)
            if kernel > 1:
                self.spatial_fc = nn.Conv2d(hidden, kernel * kernel, 1)
        if self.kernel_num > 1:
            self.kernel_fc = nn.Conv2d(hidden, self.kernel_num, 1)


class KernelSpatialModulation_Local(nn.Module):
    def __init__(self, conv: Any) -> None:
        super().__init__()
        width = round(math.log2(conv.in_channels) / 2 + 0.5) // 2 * 2 + 1
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.kn, self.out_n, self.channel = 1, conv.out_channels * taps, conv.in_channels
        self.use_global = False
        self.conv = nn.Conv1d(1, self.out_n, width, padding=width // 2, bias=False)
        self.norm = nn.LayerNorm(conv.in_channels)


class FrequencyBandModulation(nn.Module):
    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        config = dict(k_list=[2], lowfreq_att=False, act="sigmoid", spatial_group=1,
                      spatial_kernel=3, max_size=(64, 64), masks="cached") | config  # fmt: skip
        groups = channels if config["spatial_group"] > 64 else config["spatial_group"]
        self.k_list, self.lowfreq_att, self.in_channels = config["k_list"], config["lowfreq_att"], 0
        self.act, self.spatial_group, self.fs_feat = config["act"], groups, "feat"
        reach = config["spatial_kernel"]
        self.freq_weight_conv_list = nn.ModuleList(
            nn.Conv2d(channels, groups, reach, padding=reach // 2, groups=groups)
            for _ in range(len(self.k_list) + self.lowfreq_att)
        )
        if config["masks"] == "per_call":
            return
        height, width = config["max_size"]
        masks = [band_mask(k, height, width, config["max_size"]) for k in self.k_list]
        stacked = torch.stack([torch.from_numpy(mask) for mask in masks])[:, None]
        self.register_buffer("cached_masks", stacked, persistent=False)


class FDConv(nn.Conv2d):
    """Published arguments; `order` are flat bin indices if not as the published code sorts.

    Of its own: ``ksm_global_norm`` ("batch", "group", "none") under the name ``norm_name``,
    ``fbm_cfg["masks"]`` ("per_call"), and any number of columns.
    """

    def __init__(self, *args: Any, order: Tensor | None = None, **given: Any) -> None:
        options: dict[str, Any] = dict(
            reduction=0.0625, kernel_num=4, use_fdconv_if_c_gt=16, use_fdconv_if_k_in=[1, 3],
            use_fbm_if_k_in=[3], use_fbm_for_stride=False, kernel_temp=1.0, temp=None,
            att_multi=2.0, param_ratio=1, param_reduction=1.0, ksm_only_kernel_att=False,
            use_ksm_local=True, ksm_local_act="sigmoid", ksm_global_act="sigmoid",
            convert_param=True, linear_mode=False, fbm_cfg=None, ksm_global_norm="batch",
            norm_name="bn",
        )  # fmt: skip
        for name in ("use_fdconv_if_stride_in", "att_grid", "spatial_freq_decompose"):
            given.pop(name, None)  # published, and never read
        options |= {name: given.pop(name) for name in list(given) if name in options}
        super().__init__(*args, **given)
        for name in ("kernel_num", "param_ratio", "param_reduction", "use_ksm_local", "att_multi",
                     "use_fdconv_if_c_gt", "use_fdconv_if_k_in", "ksm_local_act",
                     "ksm_global_act", "use_fbm_if_k_in"):  # fmt: skip
            setattr(self, name, options[name])
        self.options, self.order = options, None
        height, width = self.kernel_size
        if min(self.in_channels, self.out_channels) <= self.use_fdconv_if_c_gt:
            return
        if height not in self.use_fdconv_if_k_in:
            return
        if self.kernel_num is None:
            self.kernel_num = options["kernel_num"] = self.out_channels // 2
            options["kernel_temp"] = math.sqrt(self.kernel_num * self.param_ratio)
        if options["temp"] is None:
            options["temp"] = options["kernel_temp"]
        scale = min(self.in_channels, self.out_channels) // 2
        self.alpha = scale * self.kernel_num * self.param_ratio / self.param_reduction
        self.KSM_Global = KernelSpatialModulation_Global(self, options)
        strided = options["use_fbm_for_stride"] and self.stride[0] > 1
        if height in self.use_fbm_if_k_in or strided:
            bands = dict(k_list=[2, 4, 8]) if options["fbm_cfg"] is None else options["fbm_cfg"]
            self.FBM = FrequencyBandModulation(self.in_channels, bands)
        if self.use_ksm_local:
            self.KSM_Local = KernelSpatialModulation_Local(self)
        self.linear_mode = options["linear_mode"]
        rows, columns = self.out_channels * height, self.in_channels * width
        half = columns // 2 + 1
        if order is None:
            order = torch.from_numpy(bin_order(rows, columns))
        kept = int(rows * half * self.param_reduction) if self.param_reduction < 1 else rows * half
        self.order = order[:kept]
        flat = order[:kept].reshape(self.kernel_num, -1)
        indices = torch.stack([flat // half, flat % half])
        self.register_buffer("indices", torch.stack([indices] * self.param_ratio), persistent=False)
        if options["convert_param"]:
            matrix = self.weight.detach().permute(0, 2, 1, 3).reshape(rows, columns)
            spectrum = torch.view_as_real(torch.fft.rfft2(matrix)) / scale
            if self.param_reduction < 1:
                spectrum = spectrum.flatten(0, 1)[order[:kept]]
            self.dft_weight = nn.Parameter(torch.stack([spectrum] * self.param_ratio))
            del self.weight
        elif self.linear_mode:
            self.weight = nn.Parameter(self.weight.detach().squeeze())

    def forward(self, x: Tensor) -> Tensor:
        geometry = dict(
            in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups,
            kernel_size=self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation,
        )  # fmt: skip
        norm = f"KSM_Global.{self.options['norm_name']}."
        state = {
            key.replace(norm, "KSM_Global.bn."): value.numpy()
            for key, value in self.state_dict().items()
        }
        if "weight" in state and state["weight"].ndim == 2:
            state["weight"] = state["weight"][:, :, None, None]
        order = None if self.order is None else np.tile(self.order.numpy(), (self.param_ratio, 1))
        reference = ReferenceFDConv(state, geometry | self.options, order)
        return torch.from_numpy(reference(x.detach().numpy())).to(x)
