"""A folded layer whose kernels are assembled by two GPU kernels; without gradients."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.ops.attention.launch import (
    GateSizes,
    Pooling,
    finish_launch,
    gates_launch,
    pool_launch,
)
from fdconv_deploy.ops.frequency_assembly.launch import (
    assembly_sizes,
    attend_rows_launch,
    column_launch,
    column_transform,
    half_shape,
    kernel_spectrum,
    root_table,
    row_launch,
    transform_of,
)
from fdconv_deploy.ops.frequency_band_modulation.launch import (
    BandSizes,
    filter_launch,
    modulate_launch,
    project_launch,
    takes_convolution,
)
from fdconv_deploy.ops.launch import run_kernel

Sides = tuple[int, int, int, int]


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


class Fork:
    """The context of work that runs beside what comes after it, until `join`.

    Captured, it is a branch of the CUDA graph. Tensors made inside may be read only after `join`,
    and be given up only then; so no memory is taken while the other stream still reads it. Without
    a GPU nothing runs beside anything.

    active: whether such work is being called at the moment.
    """

    active = False

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._stack = ExitStack()

    def __enter__(self) -> Fork:
        Fork.active = True
        if self._main is not None:
            beside = _stream_beside(self._main)
            beside.wait_stream(self._main)
            self._stack.enter_context(torch.cuda.stream(beside))
        return self

    def __exit__(self, *error: object) -> None:
        Fork.active = False
        self._stack.close()

    def join(self) -> None:
        """Let what comes next wait for the work inside."""
        if self._main is not None:
            self._main.wait_stream(_stream_beside(self._main))


@lru_cache
def _stream_beside(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream, so that threads that use streams of their own do not meet."""
    return torch.cuda.Stream(main.device)


class FinishedConv2d(nn.Module):
    """A convolution with what comes after it: bias, shortcut, ReLU and the next layer's pooling.

    padding: top, left, bottom, right. bias, weight: ``(O,)`` and ``(O, I/groups, kh, kw)``, a
    following BatchNorm in them; without a weight `run` is given one for each image.
    """

    bias: Tensor | None

    def __init__(
        self,
        *,
        stride: tuple[int, int],
        padding: Sides,
        dilation: tuple[int, int],
        groups: int = 1,
        bias: np.ndarray | None,
        weight: np.ndarray | None,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.dtype, self.channels_last = groups, dtype, channels_last
        constants = {"bias": bias, "weight": weight}
        for name, value in constants.items():
            tensor = None if value is None else torch.tensor(value, dtype=torch.float32)
            if tensor is not None and name == "weight":
                tensor = self._laid_out(tensor.to(dtype))
            self.register_buffer(name, tensor)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=_memory(self.channels_last))

    def run(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        shortcut: Tensor | None = None,
        hidden: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve, and finish.

        Args:
            x: ``(B, I, H, W)`` of ``dtype``.
            weight: one kernel per image, ``(B·O, I, kh, kw)``.
            shortcut: ``(B, O, H', W')``, added.
            hidden: ``(A, O)`` float32, of the dynamic layer that reads the outcome.
            relu: whether negative values become 0.

        Returns:
            The outcome, and where ``hidden`` is given that pooled: parts of its average and of the
            hidden layer, see `Pooling`.
        """
        y = self._convolved(x, self.get_buffer("weight") if weight is None else weight,
                            shared=weight is None)  # fmt: skip
        if self.bias is None and shortcut is None and hidden is None and not relu:
            return y, None
        pooling = Pooling(y.shape[1], y.shape[2] * y.shape[3], 0 if hidden is None else len(hidden))
        last = not y.is_contiguous()
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=_memory(last))
        launch = finish_launch(
            pooling, last, _type(y.dtype), biased=self.bias is not None,
            added=shortcut is not None, relu=relu, pooled=hidden is not None,
        )  # fmt: skip
        shape = (0,) if hidden is None else (len(y), pooling.splits, pooling.stride)
        partial = y.new_empty(shape, dtype=torch.float32)
        run_kernel(launch, y, self.bias, shortcut, hidden, partial, y)
        return y, None if hidden is None else partial

    def _convolved(self, x: Tensor, weight: Tensor, shared: bool) -> Tensor:
        """Each image with its own kernel; with the one kernel if ``shared``."""
        batch = len(x)
        top, left, bottom, right = self.padding
        if tuple(weight.shape[2:]) == (1, 1) and not any(self.padding) and not shared:
            return self._pointwise(x, weight)
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = self._laid_out(x)
        padding, stride, dilation = (top, left), self.stride, self.dilation
        if shared or batch == 1:
            return F.conv2d(x, weight, None, stride, padding, dilation, self.groups)
        if self.channels_last:
            # Channels of several images do not lie side by side there, as one convolution of
            # B groups would need them.
            images = zip(x.split(1), weight.split(len(weight) // batch), strict=True)
            results = [F.conv2d(i, w, None, stride, padding, dilation) for i, w in images]
            return self._laid_out(torch.cat(results))
        joined = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(joined, weight, None, stride, padding, dilation, batch)
        return y.reshape(batch, -1, *y.shape[2:])

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A 1×1 convolution is one batched matrix product."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        batch, channels, height, width = x.shape
        matrices = weight.view(batch, -1, channels)
        if self.channels_last:
            pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
            y = torch.bmm(pixels, matrices.transpose(1, 2))
            return y.view(batch, height, width, -1).permute(0, 3, 1, 2)
        y = torch.bmm(matrices, x.reshape(batch, channels, -1))
        return y.view(batch, -1, height, width)


class FusedConv2d(nn.Module):
    """A folded FDConv layer on a GPU: ``(B, I, H, W)`` -> ``(B, O, H', W')``, any batch.

    Over tokens ``(B, …, I)`` -> ``(B, …, O)``, as `FoldedConv2d`; channels are last there anyway.
    Attentions and kernels are computed in float32 and the kernels written in ``dtype``, which
    inputs and outputs have too. Its float32 constants stay so: do not cast the module.

    Args:
        folded: the layer at its input size. All of its gates scale the kernels here, whose last
            kernel takes them for nothing.
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
        folded = replace(folded, channel_side="kernel", filter_side="kernel")
        self.folded, self.dtype = folded, dtype
        self.channels_last = channels_last or folded.tokens
        self.bands: FusedBandModulation | None = None
        if folded.bands is not None:
            self.bands = FusedBandModulation(folded.bands, dtype, channels_last)
        constant = folded.constant_weight
        if constant is not None and folded.output_scale is not None:
            constant = constant * folded.output_scale[:, None, None, None]
        self.convolution = FinishedConv2d(
            stride=folded.stride, padding=folded.padding, dilation=folded.dilation,
            bias=folded.bias, weight=constant, dtype=dtype, channels_last=self.channels_last,
        )  # fmt: skip
        if self.dynamic:
            self._prepare_assembly()

    def _prepare_assembly(self) -> None:
        """Constants and launches of the kernels that make the convolution's."""
        folded, last = self.folded, self.channels_last
        assert folded.spectrum is not None
        spectrum = kernel_spectrum(*folded.spectrum.by_frequency())
        self.sizes = sizes = assembly_sizes(folded, spectrum)
        modulation, norm, local = folded.modulation, folded.modulation.norm, folded.local
        pixels = math.prod(folded.input_size)
        self.pooling = pooling = Pooling(folded.in_channels, pixels, len(modulation.hidden))
        gates = GateSizes.of(modulation, local)
        attending = attend_rows_launch(pooling, gates, modulation.kernel, sizes)
        self.pool_launch = pool_launch(pooling, last, _type(self.dtype))
        # None where the assembly's first kernel makes the gates.
        self.gates_launch = gates_launch(pooling, gates) if attending is None else None
        self.rows_launch = attending or row_launch(sizes)
        self.columns_launch = column_launch(sizes, channels_last=last, dtype=_type(self.dtype))
        column = column_transform(sizes.columns, folded.kernel_size[1])
        constants = {
            "hidden": modulation.hidden,
            "hidden_bias": modulation.hidden_bias,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
            "heads": modulation.heads,
            "head_bias": modulation.head_bias,
            "average_weight": None if local is None else local.norm_weight,
            "average_bias": None if local is None else local.norm_bias,
            "values": spectrum.values,
            "groups": spectrum.groups,
            "row_table": root_table(sizes.rows, transform_of(sizes.rows)),
            "column_table": root_table(sizes.columns, column),
            "local_weight": None if local is None else local.weight,
            "output_scale": folded.output_scale,
        }
        for name, value in constants.items():
            self.register_buffer(name, None if value is None else torch.tensor(value))

    @property
    def dynamic(self) -> bool:
        """Whether its kernels depend on the image."""
        return self.folded.constant_weight is None

    def _constants(self, names: str) -> list[Tensor | None]:
        return [getattr(self, name) for name in names.split()]

    def kernels(self, partial: Tensor) -> Tensor:
        """One kernel per image, ``(B·O, I, kh, kw)`` of ``dtype``, from the pooled input."""
        folded, sizes, batch = self.folded, self.sizes, len(partial)
        attention = self._constants(
            "hidden_bias norm_weight norm_bias heads head_bias average_weight average_bias"
        )
        spectrum = self._constants("values groups row_table")
        gates = partial.new_empty((batch, sizes.heads))
        # Normalised, for the local attention.
        average = partial.new_empty((0,) if folded.local is None else (batch, folded.in_channels))
        half = partial.new_empty((batch, *half_shape(sizes)))
        if self.gates_launch is None:
            run_kernel(self.rows_launch, partial, *attention, *spectrum, average, gates, half)
        else:
            run_kernel(self.gates_launch, partial, *attention, average, gates)
            if folded.modulation.softmax:
                parts = gates.split(folded.modulation.sizes, 1)
                gates = torch.cat([part.softmax(1) for part in parts], 1)
            run_kernel(self.rows_launch, gates, *spectrum, half)
        shape = batch * folded.out_channels, folded.in_channels, *folded.kernel_size
        weight = torch.empty(
            shape, dtype=self.dtype, device=partial.device,
            memory_format=_memory(self.channels_last),
        )  # fmt: skip
        table, *others = self._constants("column_table local_weight output_scale")
        run_kernel(self.columns_launch, half, gates, table, average, *others, weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``x``: of ``dtype`` at the folded size, on a GPU, or `BackendError`."""
        return self.run(x)[0]

    def run(
        self,
        x: Tensor,
        partial: Tensor | None = None,
        shortcut: Tensor | None = None,
        hidden: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `FinishedConv2d.run`; ``partial``: the pooled input where something pooled it."""
        folded, given = self.folded, x
        if folded.tokens:
            # As a map, which in memory they are one of with its channels last.
            x = x.reshape(len(x), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        expected = folded.in_channels, *folded.input_size
        if tuple(x.shape[1:]) != expected or x.dtype != self.dtype:
            raise BackendError(
                f"layer {folded.name!r} was folded for {self.dtype} inputs (B, "
                f"{', '.join(map(str, expected))}), got {x.dtype} {tuple(x.shape)}. "
                "Fold the network again for this size and type."
            )
        x = x.contiguous(memory_format=_memory(self.channels_last))
        fork = Fork(x.device)
        modulated = x
        if self.bands is not None:
            with fork:
                modulated = self.bands(x)
        kernels = None
        if self.dynamic:
            if partial is None:
                shape = len(x), self.pooling.splits, self.pooling.stride
                partial = x.new_empty(shape, dtype=torch.float32)
                run_kernel(self.pool_launch, x, self.get_buffer("hidden"), partial)
            kernels = self.kernels(partial)
        if self.bands is not None:
            fork.join()
        y, parts = self.convolution.run(modulated, kernels, shortcut, hidden, relu)
        if folded.tokens:
            y = y.permute(0, 2, 3, 1).reshape(*given.shape[:-1], -1)
        return y, parts


class FusedBandModulation(nn.Module):
    """``(B, I, H, W)`` of ``dtype`` -> the same, in the given memory format."""

    def __init__(self, bands: FoldedBands, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        self.bands, self.channels_last = bands, channels_last
        # Half precision has no room for a sum over a row of pixels: on the way there its mean.
        gain = bands.width
        to_rows = bands.to_rows.astype(np.float64)
        matrices = {
            "to_columns": bands.to_columns / gain,
            "through": np.stack([b.from_rows @ to_rows[: b.rows] for b in bands.bands]),
            "from_columns": np.concatenate([b.from_columns for b in bands.bands]) * gain,
            "conv_weight": bands.conv_weight,
            "windows": bands.conv_weight.transpose(2, 3, 0, 1),
        }
        maps, window = len(bands.conv_weight), bands.conv_weight.shape[-1]
        own = takes_convolution(bands.groups, maps, window, bands.softmax)
        del matrices["conv_weight" if own else "windows"]
        for name, matrix in matrices.items():
            self.register_buffer(name, torch.tensor(matrix, dtype=dtype).contiguous())
        self.own = own
        for name in ("conv_bias", "mix", "mix_bias"):
            self.register_buffer(name, torch.tensor(getattr(bands, name)))
        if channels_last and not own:
            weight = self.get_buffer("conv_weight")
            self.conv_weight = weight.contiguous(memory_format=torch.channels_last)
        self.sizes = sizes = BandSizes(
            bands.conv_weight.shape[1] * bands.groups, bands.height, bands.width,
            bands.to_columns.shape[1], 2 if bands.complex_rows else 1,
            tuple(band.columns for band in bands.bands), bands.groups, bands.mix.shape[1],
            window if own else 0,
        )  # fmt: skip
        form: Any = sizes, channels_last, _type(dtype)
        # Softmax is PyTorch's, over logits that the bias was added to.
        there = not bands.softmax
        self.launches = (
            project_launch(*form),
            filter_launch(*form),
            modulate_launch(*form, biased=there, sigmoid=there),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x``: at the folded size, in the memory format."""
        sizes, batch, memory = self.sizes, len(x), _memory(self.channels_last)
        mix, bias = self.get_buffer("mix"), self.get_buffer("conv_bias")
        projected = x.new_empty((batch, sizes.height, sizes.count, sizes.channels))
        filtered = x.new_empty((batch, sizes.rows, sizes.stored, sizes.channels))
        y = torch.empty_like(x, memory_format=memory)
        if self.own:
            windows: Tensor | None = self.get_buffer("windows")
            shape = batch, sizes.channel_blocks, sizes.shares, sizes.height * sizes.width
            given = x.new_empty(shape, dtype=torch.float32)
            shape = batch, sizes.maps, sizes.height, sizes.width
            logits = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)
        else:
            windows, given = None, mix  # any float32: no kernel follows it
            logits = self._logits(x).contiguous(memory_format=memory)
        project, filter_rows, modulate = self.launches
        run_kernel(project, x, self.get_buffer("to_columns"), windows, given, projected)
        run_kernel(filter_rows, projected, self.get_buffer("through"), given, logits, filtered)
        run_kernel(
            modulate, x, logits, bias, mix, self.get_buffer("mix_bias"), filtered,
            self.get_buffer("from_columns"), y,
        )  # fmt: skip
        return y

    def _logits(self, x: Tensor) -> Tensor:
        bands, weight = self.bands, self.get_buffer("conv_weight")
        logits = F.conv2d(x, weight, None, padding=weight.shape[-1] // 2, groups=bands.groups)
        if not bands.softmax:
            return logits
        grouped = logits.float() + self.get_buffer("conv_bias")[:, None, None]
        grouped = grouped.unflatten(1, (bands.groups, -1)).softmax(1)
        return grouped.reshape(logits.shape).to(x.dtype)
