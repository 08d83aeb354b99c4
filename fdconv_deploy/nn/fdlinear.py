"""The published linear form of FDConv, for token inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.modulation import NEAR_ZERO, attention_channels
from fdconv_deploy.nn.spectrum import FrequencyOrder, assemble_spectrum, frequency_indices


class LinearModulation(nn.Module):
    """``KSM_Global`` of a linear layer: RMSNorm and ReLU, no spatial attention."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        *,
        reduction: float,
        temp: float,
        kernel_temp: float,
        att_multi: float,
        act: str,
    ) -> None:
        super().__init__()
        hidden = attention_channels(in_features, reduction)
        self.groups, self.act = groups, act
        self.temp, self.kernel_temp, self.att_multi = temp, kernel_temp, att_multi
        self.fc = nn.Linear(in_features, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.channel_fc = nn.Linear(hidden, in_features)
        self.filter_fc = nn.Linear(hidden, out_features)
        self.kernel_fc = nn.Linear(hidden, groups)
        for head in (self.channel_fc, self.filter_fc, self.kernel_fc):
            nn.init.normal_(head.weight, std=NEAR_ZERO)
            nn.init.zeros_(head.bias)

    def forward(self, average: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, I)`` -> channel ``(B, I)``, filter ``(B, O)``, kernel ``(B, P·G)``."""
        h = F.relu(self.norm(self.fc(average)))

        def gate(head: nn.Linear) -> Tensor:
            logits = head(h) / self.temp
            if self.act == "softmax":
                return torch.softmax(logits, dim=1)
            if self.act == "tanh":
                return 1 + torch.tanh(logits)
            return torch.sigmoid(logits) * self.att_multi

        logits = self.kernel_fc(h) / self.kernel_temp
        if self.act == "softmax":
            kernel = torch.softmax(logits, dim=1) * self.groups
        elif self.act == "tanh":
            kernel = 1 + torch.tanh(logits)
        else:
            kernel = torch.sigmoid(logits) * 2
        return gate(self.channel_fc), gate(self.filter_fc), kernel


class FDLinear(nn.Linear):
    """Frequency Dynamic linear layer: one weight matrix per sequence.

    ``forward``: ``(B, N, I)`` -> ``(B, N, O)``, the weights of a sequence from its mean
    over N; or ``(N, I)`` -> ``(N, O)``, each row with weights of its own. Odd
    ``in_features`` work.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        reduction … convert_param: as published; see `FDConv2d`.
        frequency_order: see `FDConv2d`.

    Raises:
        UnsupportedLayerError: arguments that describe no layer, with what to change.
    """

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        reduction: float = 0.0625,
        kernel_num: int | None = 4,
        kernel_temp: float | None = 1.0,
        temp: float | None = None,
        att_multi: float = 2.0,
        param_ratio: int = 1,
        param_reduction: float = 1.0,
        ksm_global_act: str = "sigmoid",
        convert_param: bool = True,
        frequency_order: FrequencyOrder = "torch",
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if kernel_num is None:
            kernel_num = out_features // 2
            kernel_temp = math.sqrt(kernel_num * param_ratio)
        if kernel_temp is None:
            raise UnsupportedLayerError(
                "kernel_temp=None is only defined with kernel_num=None. Give a number, e.g. 1.0."
            )
        if ksm_global_act not in ("sigmoid", "tanh", "softmax"):
            raise UnsupportedLayerError(
                f"ksm_global_act must be 'sigmoid', 'tanh' or 'softmax', got {ksm_global_act!r}."
            )
        if param_reduction < 1 and not convert_param:
            raise UnsupportedLayerError(
                "param_reduction < 1 drops spectrum bins, so it needs convert_param=True."
            )
        self.kernel_num, self.param_ratio = kernel_num, param_ratio
        self.param_reduction, self.convert_param = param_reduction, convert_param
        self.rows, self.columns = out_features, in_features
        self.spectrum_scale = min(in_features, out_features) // 2
        self.alpha = 1.0
        if param_reduction >= 1:
            self.alpha = self.spectrum_scale * param_ratio / param_reduction
        self.KSM_Global = LinearModulation(
            in_features,
            out_features,
            kernel_num * param_ratio,
            reduction=reduction,
            temp=kernel_temp if temp is None else temp,
            kernel_temp=kernel_temp,
            att_multi=att_multi,
            act=ksm_global_act,
        )
        indices = frequency_indices(
            out_features,
            in_features,
            kernel_num,
            ratio=param_ratio,
            reduction=param_reduction,
            order=frequency_order,
        )
        self.register_buffer("indices", indices, persistent=False)
        self.dft_weight: nn.Parameter | None = None
        if convert_param:
            spectrum = self._spectrum_of_weight().detach()
            if param_reduction < 1:
                rows, columns = indices[0].flatten(1).to(spectrum.device)
                spectrum = spectrum[:, rows, columns]
            self.dft_weight = nn.Parameter(spectrum.contiguous())
            del self.weight
            self.register_parameter("weight", None)

    def _spectrum_of_weight(self) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(self.weight.float())) / self.spectrum_scale
        return spectrum.expand(self.param_ratio, *spectrum.shape)

    def weights(self, average: Tensor) -> Tensor:
        """``(B, I)`` averages -> weight matrices ``(B, O, I)`` float32."""
        channel, filter_, kernel = self.KSM_Global(average)
        stored = self._spectrum_of_weight() if self.dft_weight is None else self.dft_weight
        spectrum = assemble_spectrum(
            stored,
            kernel,
            self.indices,
            (self.out_features, self.in_features // 2 + 1),
            alpha=self.alpha,
            sorted_bins=self.param_reduction < 1,
        )
        matrix = torch.fft.irfft2(
            torch.view_as_complex(spectrum), s=(self.out_features, self.in_features)
        )
        return matrix * channel[:, None] * filter_[:, :, None]

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``(B, N, I)`` or ``(N, I)`` float -> the same with O features.

        Raises:
            UnsupportedLayerError: ``cu_seqlens`` is given, the published argument for sequences of
                several lengths behind each other in one.
        """
        if cu_seqlens is not None:
            raise UnsupportedLayerError(
                "cu_seqlens packs sequences of several lengths into one input (N, "
                f"{self.in_features}), and a graph of static shapes has one length. Give sequences "
                f"of one length as (B, N, {self.in_features}), without cu_seqlens."
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.in_features or x.numel() == 0:
            raise ValueError(
                f"FDLinear expects a non-empty (B, N, {self.in_features}) or "
                f"(N, {self.in_features}) input, got {tuple(x.shape)}."
            )
        tokens = x if x.ndim == 3 else x[:, None]
        y = torch.bmm(tokens, self.weights(tokens.mean(1)).transpose(1, 2).to(x.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y if x.ndim == 3 else y[:, 0]
