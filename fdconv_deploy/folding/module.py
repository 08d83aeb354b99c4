"""A folded layer as a PyTorch module: the same constants as in the exported graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.modulation import FoldedModulation


def _hold(module: nn.Module, source: Any, *names: str, prefix: str = "") -> None:
    """Make buffers of some of an object's arrays."""
    for name in names:
        value = getattr(source, name)
        module.register_buffer(prefix + name, None if value is None else torch.from_numpy(value))


class FoldedBandModulation(nn.Module):
    """Band modulation at one size: ``(B, I, H, W)`` float -> the same shape."""

    def __init__(self, bands: FoldedBands) -> None:
        super().__init__()
        self.bands = bands
        _hold(self, bands, "to_columns", "to_rows", "conv_weight", "conv_bias", "mix", "mix_bias")
        for index, band in enumerate(bands.bands):
            _hold(self, band, "from_rows", "from_columns", prefix=f"band{index}_")

    def low_passes(self, x: Tensor) -> list[Tensor]:
        """The input seen through each mask, ``(B, I, H, W)`` each."""
        batch, channels, height, _ = x.shape
        rows = 2 * height if self.bands.complex_rows else height
        projected = (x @ self.get_buffer("to_columns")).reshape(batch, channels, rows, -1)
        coefficients = self.get_buffer("to_rows") @ projected
        result = []
        for index, band in enumerate(self.bands.bands):
            kept = coefficients[..., : band.rows, : band.columns]
            back = self.get_buffer(f"band{index}_from_rows") @ kept
            back = back.reshape(batch, channels, height, -1)
            result.append(back @ self.get_buffer(f"band{index}_from_columns"))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, I, H, W)`` at the folded size."""
        bands = self.bands
        batch, _, height, width = x.shape
        weight, groups = self.get_buffer("conv_weight"), bands.groups
        logits = F.conv2d(
            x, weight, self.get_buffer("conv_bias"), padding=weight.shape[-1] // 2, groups=groups
        )
        if bands.softmax:
            logits = logits.reshape(batch, groups, -1, height, width)
            active = logits.softmax(1).reshape(batch, -1, height, width)
        else:
            active = logits.sigmoid()
        mix = self.get_buffer("mix")[:, :, None, None]
        factors = F.conv2d(active, mix, self.get_buffer("mix_bias"), groups=groups)
        factors = factors.reshape(batch, groups, bands.terms, 1, height, width)

        def term(index: int, part: Tensor) -> Tensor:
            return factors[:, :, index] * part.reshape(batch, groups, -1, height, width)

        total = term(0, x)
        for index, low in enumerate(self.low_passes(x)):
            total = total + term(index + 1, low)
        return total.reshape(x.shape)


class FoldedAttention(nn.Module):
    """All global attentions of a layer: ``(B, I)`` float32 averages -> ``(B, heads)``.

    In the order of `FoldedModulation`; their constant factors are in the spectrum.
    """

    def __init__(self, modulation: FoldedModulation) -> None:
        super().__init__()
        self.modulation = modulation
        _hold(self, modulation, "hidden", "hidden_bias", "heads", "head_bias")
        if modulation.norm is not None:
            _hold(self, modulation.norm, "weight", "bias", prefix="norm_")

    def forward(self, average: Tensor) -> Tensor:
        """``average``: ``(B, I)``."""
        hidden = F.linear(average, self.get_buffer("hidden"), self.get_buffer("hidden_bias"))
        if (norm := self.modulation.norm) is not None:
            weight = self.get_buffer("norm_weight")
            if norm.bias is None:
                hidden = F.rms_norm(hidden, weight.shape, weight, norm.epsilon)
            else:
                bias = self.get_buffer("norm_bias")
                hidden = F.layer_norm(hidden, weight.shape, weight, bias, norm.epsilon)
        hidden = hidden.relu()
        if self.modulation.squared:
            hidden = hidden.square()
        logits = F.linear(hidden, self.get_buffer("heads"), self.get_buffer("head_bias"))
        if not self.modulation.softmax:
            return logits.sigmoid()
        return torch.cat([part.softmax(1) for part in logits.split(self.modulation.sizes, 1)], 1)


class FoldedConv2d(nn.Module):
    """A folded FDConv layer: ``(B, I, H, W)`` float at the folded size -> ``(B, O, H', W')``.

    Over tokens, be they ``(B, L, I)`` or of more axes between, or ``(B, I)``, one each: the same
    with O features. Includes a BatchNorm that was folded in. Any batch size.
    """

    def __init__(self, folded: FoldedConv) -> None:
        super().__init__()
        self.folded = folded
        self.bands = FoldedBandModulation(folded.bands) if folded.bands is not None else None
        _hold(self, folded, "bias", "output_scale", "constant_weight")
        if folded.constant_weight is not None or folded.spectrum is None:
            return
        self.gates = FoldedAttention(folded.modulation)
        if folded.local is not None:
            _hold(self, folded.local, "norm_weight", "norm_bias", "weight", prefix="local_")
        columns, rows = folded.spectrum.column_transform, folded.spectrum.row_transform
        constants = {f"column_stage{i}": stage for i, stage in enumerate(columns.stages)}
        constants |= {f"row_stage{i}": stage for i, stage in enumerate(rows.stages)}
        constants |= {"row_outer": rows.outer}
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value.astype(np.float32)))
        self.register_buffer("spectrum", torch.from_numpy(folded.spectrum.values))
        self.register_buffer("groups", torch.from_numpy(folded.spectrum.groups.astype(np.int32)))

    def attention(self, average: Tensor) -> dict[str, Tensor]:
        """``(B, I)`` averages -> kernel, filter, spatial and channel attention, ``(B, n)`` each.

        Their constant factors are in the spectrum. Absent ones are empty.
        """
        parts = self.gates(average).split(self.folded.modulation.sizes, 1)
        return dict(zip(("kernel", "filter", "spatial", "channel"), parts, strict=True))

    def kernel_matrix(self, kernel_attention: Tensor) -> Tensor:
        """``(B, P·G)`` -> kernel matrices ``(B, R, C)``, by constant products."""
        assert self.folded.spectrum is not None
        columns = self.folded.spectrum.column_transform
        rows = self.folded.spectrum.row_transform
        batch = kernel_attention.shape[0]

        def staged(x: Tensor, axis: str, stages: int) -> Tensor:
            for number in range(stages):
                stage = self.get_buffer(f"{axis}_stage{number}")
                x = stage @ x.reshape(batch, len(stage), stage.shape[2], -1)
            return x

        weights = kernel_attention[:, self.get_buffer("groups")]  # (B, planes, F, fm, slots)
        x = (weights[:, :, :, None] * self.get_buffer("spectrum")).sum(1)
        x = staged(x, "column", len(columns.stages))
        x = x.reshape(batch, 2 * columns.length, -1).transpose(1, 2)
        x = staged(x, "row", len(rows.stages))
        x = self.get_buffer("row_outer") @ x.reshape(batch, 2 * rows.classes, -1)
        return x.reshape(batch, rows.length, -1)

    def local_attention(self, average: Tensor) -> Tensor:
        """``(B, I)`` averages -> local attention ``(B, R, C)``, its factor in the spectrum."""
        local = self.folded.local
        assert local is not None
        batch, channels = average.shape
        width, taps = self.folded.kernel_size[1], local.taps
        weight, bias = self.get_buffer("local_norm_weight"), self.get_buffer("local_norm_bias")
        normalised = F.layer_norm(average, (channels,), weight, bias, local.epsilon)
        windows = F.pad(normalised, (taps // 2, taps // 2)).unfold(1, taps, 1).transpose(1, 2)
        diagonal = torch.eye(width, dtype=average.dtype, device=average.device)
        taken = windows[:, None, :, :, None] * diagonal[:, None, None, :]
        taken = taken.reshape(batch, width * taps, channels * width)
        return (self.get_buffer("local_weight") @ taken).sigmoid()

    def kernels(self, average: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One kernel per image, ``(B, O, I, kh, kw)``, from averages ``(B, I)``.

        And what scales the input and the output of the convolution instead, ``(B, I)``, ``(B, O)``.
        """
        folded, batch = self.folded, average.shape[0]
        out_channels, in_channels = folded.out_channels, folded.in_channels
        height, width = folded.kernel_size
        attention = self.attention(average)
        kernel = self.kernel_matrix(attention["kernel"])
        if folded.local is not None:
            kernel = kernel * self.local_attention(average)
        kernel = kernel.reshape(batch, out_channels, height, in_channels, width)
        if folded.modulation.spatial:
            kernel = kernel * attention["spatial"].reshape(batch, 1, height, 1, width)
        channel = attention["channel"] if folded.modulation.channel else None
        if channel is not None and folded.channel_side == "kernel":
            kernel, channel = kernel * channel[:, None, None, :, None], None
        scale = self._output_scale()
        if folded.modulation.filter:
            scale = attention["filter"] if scale is None else attention["filter"] * scale
        if scale is not None and folded.filter_side == "kernel":
            kernel, scale = kernel * scale[:, :, None, None, None], None
        return kernel.transpose(2, 3), channel, scale

    def _output_scale(self) -> Tensor | None:
        return None if self.output_scale is None else self.get_buffer("output_scale")[None]

    def _weight(self, average: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.constant_weight is None:
            return self.kernels(average)
        return self.get_buffer("constant_weight"), None, self._output_scale()

    def forward(self, x: Tensor) -> Tensor:
        """``x``: at the folded size."""
        folded = self.folded
        given = x.reshape(len(x), -1, x.shape[-1]) if folded.tokens else x
        expected: tuple[int, ...] = (folded.in_channels, *folded.input_size)
        if folded.tokens:
            expected = folded.input_size[0], folded.in_channels
        if tuple(given.shape[1:]) != expected:
            raise ValueError(
                f"layer {folded.name!r} was folded for inputs (B, "
                f"{', '.join(map(str, expected))}), got {tuple(x.shape)}. Fold the network again "
                f"for this {'number of tokens' if folded.tokens else 'size'}."
            )
        if folded.tokens:
            return self._over_tokens(given).reshape(*x.shape[:-1], folded.out_channels)
        batch = x.shape[0]
        average = x.mean((2, 3))
        if self.bands is not None:
            x = self.bands(x)
        top, left, bottom, right = folded.padding
        weight, channel, scale = self._weight(average)
        groups = 1
        if self.constant_weight is None:
            weight, groups = weight.reshape(-1, folded.in_channels, *folded.kernel_size), batch
            if channel is not None:
                x = x * channel[:, :, None, None]
            x = x.reshape(1, -1, *folded.input_size)
        if top == bottom and left == right:
            padding = (top, left)
        else:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        y = F.conv2d(x, weight, None, folded.stride, padding, folded.dilation, groups)
        y = y.reshape(batch, folded.out_channels, *folded.output_size)
        if scale is not None:
            y = y * scale[:, :, None, None]
        return y if self.bias is None else y + self.get_buffer("bias")[:, None, None]

    def _over_tokens(self, tokens: Tensor) -> Tensor:
        weight, channel, scale = self._weight(tokens.mean(1))
        if channel is not None:
            tokens = tokens * channel[:, None]
        y = tokens @ weight[..., 0, 0].transpose(-1, -2)
        if scale is not None:
            y = y * scale[:, None]
        return y if self.bias is None else y + self.get_buffer("bias")
