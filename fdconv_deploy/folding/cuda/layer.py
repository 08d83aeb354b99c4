"""A folded layer whose kernels are assembled by two GPU kernels."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import astuple, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.ops.attention.launch import GateSizes, Pooling
from fdconv_deploy.ops.frequency_assembly.launch import (
    assembly_sizes,
    attend_rows_launch,
    column_transform,
    kernel_spectrum,
    root_table,
    transform_of,
)
from fdconv_deploy.ops.frequency_band_modulation.launch import takes_convolution
from fdconv_deploy.ops.torch_ops import (
    assemble_kernels,
    attend,
    attend_and_assemble,
    finish_convolution,
    modulate_bands,
    pool,
)

Sides = tuple[int, int, int, int]


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
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=memory)

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
            The outcome, and its parts of `attend` where ``hidden`` is given.
        """
        y = self._convolved(x, self.get_buffer("weight") if weight is None else weight,
                            shared=weight is None)  # fmt: skip
        if self.bias is None and shortcut is None and hidden is None and not relu:
            return y, None
        partial = finish_convolution(y, self.bias, shortcut, hidden, relu)
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
        self.bands = (
            FusedBandModulation(folded.bands, dtype, channels_last)
            if folded.bands is not None
            else None
        )
        constant = folded.constant_weight
        if constant is not None and folded.output_scale is not None:
            constant = constant * folded.output_scale[:, None, None, None]
        self.convolution = FinishedConv2d(
            stride=folded.stride, padding=folded.padding, dilation=folded.dilation,
            bias=folded.bias, weight=constant, dtype=dtype, channels_last=self.channels_last,
        )  # fmt: skip
        self.sizes: list[int] = []
        self.pooling: list[int] = []
        self.attends = False  # in the first kernel of the assembly
        constants: dict[str, np.ndarray | None] = {}
        if self.dynamic:
            assert folded.spectrum is not None
            spectrum = kernel_spectrum(*folded.spectrum.by_frequency())
            sizes = assembly_sizes(folded, spectrum)
            modulation, norm, local = folded.modulation, folded.modulation.norm, folded.local
            pooling = Pooling(
                folded.in_channels, math.prod(folded.input_size), len(modulation.hidden)
            )
            gates = GateSizes.of(modulation, local)
            launch = attend_rows_launch(pooling, gates, modulation.kernel, sizes)
            self.attends, self.sizes = launch is not None, sizes.numbers()
            self.pooling = list(astuple(pooling))
            column = column_transform(sizes.columns, folded.kernel_size[1])
            constants = {
                "values": spectrum.values,
                "groups": spectrum.groups,
                "row_table": root_table(sizes.rows, transform_of(sizes.rows)),
                "column_table": root_table(sizes.columns, column),
                "output_scale": folded.output_scale,
                "hidden": modulation.hidden,
                "hidden_bias": modulation.hidden_bias,
                "heads": modulation.heads,
                "head_bias": modulation.head_bias,
                "norm_weight": None if norm is None else norm.weight,
                "norm_bias": None if norm is None else norm.bias,
                "average_weight": None if local is None else local.norm_weight,
                "average_bias": None if local is None else local.norm_bias,
                "local_weight": None if local is None else local.weight,
            }
        for name, value in constants.items():
            self.register_buffer(name, None if value is None else torch.tensor(value))

    @property
    def dynamic(self) -> bool:
        """Whether its kernels depend on the image."""
        return self.folded.constant_weight is None

    def _constants(self, names: str) -> list[Tensor | None]:
        return [getattr(self, name) for name in names.split()]

    def _attentions(self) -> tuple[Any, ...]:
        """What makes attentions of a pooled input, as `attend` takes it."""
        names = "hidden_bias norm_weight norm_bias heads head_bias average_weight average_bias"
        sizes = GateSizes.of(self.folded.modulation, self.folded.local)
        epsilons = [sizes.epsilon, sizes.average_epsilon]
        return self._constants(names), self.pooling, epsilons, sizes.squared

    def attention(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``(B, heads)`` and the normalised average ``(B, I)`` from the pooled input."""
        modulation = self.folded.modulation
        gates, average = attend(partial, *self._attentions(), not modulation.softmax)
        if modulation.softmax:
            parts = gates.split(modulation.sizes, 1)
            gates = torch.cat([part.softmax(1) for part in parts], 1)
        return gates, average

    def kernels(self, partial: Tensor) -> Tensor:
        """One kernel per image, ``(B·O, I, kh, kw)`` of ``dtype``, from the pooled input."""
        names = "values groups row_table column_table local_weight output_scale"
        made = self._constants(names), self.sizes, self.dtype, self.channels_last
        if self.attends:
            kernel = self.folded.modulation.kernel
            return attend_and_assemble(partial, *self._attentions(), kernel, *made)
        return assemble_kernels(*self.attention(partial), *made)

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
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        x = x.contiguous(memory_format=memory)
        fork = Fork(x.device)
        modulated = x
        if self.bands is not None:
            with fork:
                modulated = self.bands(x)
        kernels = None
        if self.dynamic:
            if partial is None:
                partial = pool(x, self.get_buffer("hidden"))
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

    def forward(self, x: Tensor) -> Tensor:
        """``x``: at the folded size, in the memory format."""
        bands = self.bands
        shift: Tensor | None = self.get_buffer("conv_bias")
        logits = None if self.own else self._logits(x)
        if bands.softmax and logits is not None:
            batch, _, height, width = x.shape
            grouped = logits.float() + self.get_buffer("conv_bias")[:, None, None]
            grouped = grouped.reshape(batch, bands.groups, -1, height, width).softmax(1)
            logits, shift = grouped.reshape(logits.shape).to(x.dtype), None
        return modulate_bands(
            x,
            logits,
            self.get_buffer("windows") if self.own else None,
            shift,
            self.get_buffer("mix"),
            self.get_buffer("mix_bias"),
            self.get_buffer("to_columns"),
            self.get_buffer("through"),
            self.get_buffer("from_columns"),
            [band.columns for band in bands.bands],
            not bands.softmax,
        )

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.get_buffer("conv_weight")
        return F.conv2d(x, weight, None, padding=weight.shape[-1] // 2, groups=self.bands.groups)
