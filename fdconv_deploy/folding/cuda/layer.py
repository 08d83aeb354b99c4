"""A folded layer whose kernels are assembled by two GPU kernels."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.module import FoldedAttention
from fdconv_deploy.ops.frequency_assembly.launch import (
    assembly_sizes,
    column_transform,
    kernel_spectrum,
    root_table,
    transform_of,
)
from fdconv_deploy.ops.frequency_assembly.torch_op import assemble_kernels
from fdconv_deploy.ops.frequency_band_modulation.torch_op import combine_bands


class FusedConv2d(nn.Module):
    """A folded FDConv layer on a GPU: ``(B, I, H, W)`` -> ``(B, O, H', W')``, any batch.

    Over tokens ``(B, …, I)`` -> ``(B, …, O)``, as `FoldedConv2d`; channels are last there anyway.
    Attentions and kernels are computed in float32 and the kernels written in ``dtype``, which
    inputs and outputs have too. Its float32 constants stay so: do not cast the module.

    Args:
        folded: the layer at its input size.
        dtype: float32, float16 or bfloat16.
        channels_last: the memory format of input, kernels and output.
    """

    def __init__(
        self,
        folded: FoldedConv,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.folded, self.dtype = folded, dtype
        self.channels_last = channels_last or folded.tokens
        self.bands = (
            FusedBandModulation(folded.bands, dtype, channels_last)
            if folded.bands is not None
            else None
        )
        constants: dict[str, np.ndarray | None] = {
            "bias": folded.bias,
            "output_scale": folded.output_scale,
            "constant_weight": folded.constant_weight,
            "local_weight": None,
        }
        self.sizes: list[int] = []
        if folded.constant_weight is None and folded.spectrum is not None:
            self.gates = FoldedAttention(folded.modulation)
            spectrum = kernel_spectrum(folded.spectrum.by_frequency())
            sizes = assembly_sizes(folded, spectrum)
            self.sizes = sizes.numbers()
            constants |= {
                "values": spectrum.values,
                "groups": spectrum.groups,
                "row_table": root_table(sizes.rows, transform_of(sizes.rows)),
                "column_table": root_table(
                    sizes.columns, column_transform(sizes.columns, folded.kernel_size[1])
                ),
            }
            if folded.local is not None:
                constants["local_weight"] = folded.local.weight
                constants["norm_weight"] = folded.local.norm_weight
                constants["norm_bias"] = folded.local.norm_bias
        for name, value in constants.items():
            tensor = None if value is None else torch.tensor(value)
            if tensor is not None and name == "constant_weight":
                tensor = self._laid_out(tensor.to(dtype))
            self.register_buffer(name, tensor)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def kernels(self, average: Tensor, gates: Tensor) -> Tensor:
        """One kernel per image, ``(B·O, I, kh, kw)`` of ``dtype``."""
        local = self.folded.local
        normalised = None
        if local is not None:
            weight, bias = self.get_buffer("norm_weight"), self.get_buffer("norm_bias")
            normalised = F.layer_norm(average, average.shape[1:], weight, bias, local.epsilon)
        scale = self.output_scale if self.folded.filter_side == "kernel" else None
        return assemble_kernels(
            gates,
            normalised,
            self.get_buffer("values"),
            self.get_buffer("groups"),
            self.get_buffer("row_table"),
            self.get_buffer("column_table"),
            self.local_weight,
            scale,
            self.sizes,
            self.dtype,
            self.channels_last,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, I, H, W)`` of ``dtype`` at the folded size.

        Raises:
            BackendError: x is of another shape or type, or not on a GPU.
        """
        folded = self.folded
        if folded.tokens:
            # As a map, which in memory they are one of with its channels last.
            tokens = x.reshape(len(x), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
            return self._over_map(tokens).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        return self._over_map(x)

    def _over_map(self, x: Tensor) -> Tensor:
        folded = self.folded
        expected = folded.in_channels, *folded.input_size
        if tuple(x.shape[1:]) != expected or x.dtype != self.dtype:
            raise BackendError(
                f"layer {folded.name!r} was folded for {self.dtype} inputs (B, "
                f"{', '.join(map(str, expected))}), got {x.dtype} {tuple(x.shape)}. "
                "Fold the network again for this size and type."
            )
        average = x.mean((2, 3), dtype=torch.float32)
        if self.bands is not None:
            x = self.bands(x)
        scale = None
        if self.constant_weight is not None:
            y = self._convolved(x, self.get_buffer("constant_weight"), shared=True)
            scale = None if self.output_scale is None else self.get_buffer("output_scale")[None]
        else:
            gates = self.gates(average)
            kernels = self.kernels(average, gates)
            if folded.modulation.channel and folded.channel_side == "feature":
                start = len(folded.modulation.heads) - folded.modulation.channel
                x = x * gates[:, start:, None, None].to(self.dtype)
            y = self._convolved(x, kernels, shared=False)
            if folded.filter_side == "feature":
                scale = self._filter(gates)
        if scale is not None:
            y = y * scale[:, :, None, None].to(self.dtype)
        if self.bias is not None:
            y = y + self.get_buffer("bias")[:, None, None].to(self.dtype)
        return y

    def _filter(self, gates: Tensor) -> Tensor | None:
        modulation = self.folded.modulation
        scale = None if self.output_scale is None else self.get_buffer("output_scale")[None]
        if modulation.filter == 0:
            return scale
        filter_ = gates[:, modulation.kernel : modulation.kernel + modulation.filter]
        return filter_ if scale is None else filter_ * scale

    def _convolved(self, x: Tensor, weight: Tensor, shared: bool) -> Tensor:
        """Each image with its own kernel; with the one kernel if ``shared``."""
        folded = self.folded
        batch = len(x)
        top, left, bottom, right = folded.padding
        if folded.kernel_size == (1, 1) and folded.padding == (0, 0, 0, 0) and not shared:
            return self._pointwise(x, weight)
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = self._laid_out(x)
        stride, dilation = folded.stride, folded.dilation
        if shared or batch == 1:
            return F.conv2d(x, weight, None, stride, (top, left), dilation)
        if self.channels_last:
            # Channels of several images do not lie side by side there, as one convolution of
            # B groups would need them.
            images = zip(x.split(1), weight.split(folded.out_channels), strict=True)
            results = [F.conv2d(i, w, None, stride, (top, left), dilation) for i, w in images]
            return self._laid_out(torch.cat(results))
        joined = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(joined, weight, None, stride, (top, left), dilation, batch)
        return y.reshape(batch, folded.out_channels, *folded.output_size)

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A 1×1 convolution is one batched matrix product."""
        folded = self.folded
        batch, (height, width) = len(x), folded.output_size
        x = x[:, :, :: folded.stride[0], :: folded.stride[1]]
        matrices = weight.view(batch, folded.out_channels, folded.in_channels)
        if self.channels_last:
            pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
            y = torch.bmm(pixels, matrices.transpose(1, 2))
            return y.view(batch, height, width, -1).permute(0, 3, 1, 2)
        y = torch.bmm(matrices, x.reshape(batch, folded.in_channels, -1))
        return y.view(batch, -1, height, width)


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
