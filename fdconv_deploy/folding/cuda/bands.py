"""Band modulation on the GPU: matrix products by cuBLAS, their weighted sum in one kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.ops.frequency_band_modulation.torch_op import combine_bands


class FusedBandModulation(nn.Module):
    """``(B, I, H, W)`` of ``dtype`` -> the same, in the given memory format."""

    def __init__(self, bands: FoldedBands, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        self.bands, self.channels_last = bands, channels_last
        # Half precision has no room for a sum over a whole image: √W off on the way there.
        gain = math.sqrt(bands.width)
        matrices = {"to_columns": bands.to_columns / gain, "to_rows": bands.to_rows}
        for index, band in enumerate(bands.bands):
            matrices[f"from_rows{index}"] = band.from_rows
            matrices[f"from_columns{index}"] = band.from_columns * gain
        for name, matrix in matrices.items():
            # Columns multiply from the left where the channels are last in memory.
            turned = matrix.T if channels_last and "columns" in name else matrix
            self.register_buffer(name, torch.tensor(turned).to(dtype).contiguous())
        self.register_buffer("conv_weight", torch.tensor(bands.conv_weight).to(dtype))
        self.register_buffer("conv_bias", torch.tensor(bands.conv_bias).to(dtype))
        self.register_buffer("mix", torch.tensor(bands.mix))
        self.register_buffer("mix_bias", torch.tensor(bands.mix_bias))

    def low_passes(self, x: Tensor) -> Tensor:
        """The input seen through each mask: ``(bands, B, …)``, laid out in memory as x."""
        if self.channels_last:
            return self._channels_last(x.permute(0, 2, 3, 1).contiguous())
        return self._contiguous(x.contiguous())

    def _contiguous(self, x: Tensor) -> Tensor:
        bands = self.bands
        batch, channels, height, width = x.shape
        rows = 2 * height if bands.complex_rows else height
        projected = (x @ self.get_buffer("to_columns")).reshape(batch * channels, rows, -1)
        coefficients = _from_left(self.get_buffer("to_rows"), projected)
        lows = x.new_empty((len(bands.bands), *x.shape))
        for index, band in enumerate(bands.bands):
            kept = coefficients[:, : band.rows, : band.columns]
            back = _from_left(self.get_buffer(f"from_rows{index}"), kept)
            back = back.reshape(batch * channels * height, -1)
            low = lows[index].view(-1, width)
            torch.mm(back, self.get_buffer(f"from_columns{index}"), out=low)
        return lows

    def _channels_last(self, x: Tensor) -> Tensor:
        bands = self.bands
        batch, height, width, channels = x.shape
        rows = 2 * height if bands.complex_rows else height
        image_rows = x.view(batch * height, width, channels)
        projected = _from_left(self.get_buffer("to_columns"), image_rows)
        projected = projected.view(batch, rows, -1)  # frequencies and channels together
        coefficients = _from_left(self.get_buffer("to_rows"), projected)
        lows = x.new_empty((len(bands.bands), *x.shape))
        for index, band in enumerate(bands.bands):
            kept = coefficients[:, : band.rows, : band.columns * channels]
            back = _from_left(self.get_buffer(f"from_rows{index}"), kept)
            back = back.reshape(batch * height, -1, channels)
            low = lows[index].view(batch * height, width, channels)
            matrix = self.get_buffer(f"from_columns{index}").expand(len(back), -1, -1)
            torch.bmm(matrix, back, out=low)
        return lows

    def forward(self, x: Tensor) -> Tensor:
        """``x``: at the folded size."""
        bands = self.bands
        batch, _, height, width = x.shape
        weight, groups = self.get_buffer("conv_weight"), bands.groups
        logits = F.conv2d(
            x, weight, self.get_buffer("conv_bias"), padding=weight.shape[-1] // 2, groups=groups
        )
        if bands.softmax:
            grouped = logits.reshape(batch, groups, -1, height, width)
            logits = grouped.float().softmax(1).to(x.dtype).reshape(logits.shape)
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.contiguous(memory_format=memory)
        return combine_bands(
            x,
            logits.contiguous(memory_format=memory),
            self.get_buffer("mix"),
            self.get_buffer("mix_bias"),
            self.low_passes(x),
            not bands.softmax,
        )


def _from_left(matrix: Tensor, batched: Tensor) -> Tensor:
    """``(m, k)`` times each of ``(n, k, l)``, without copying the matrix."""
    return torch.bmm(matrix.expand(len(batched), -1, -1), batched)
