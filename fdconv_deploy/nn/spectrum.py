"""The Fourier disjoint weight: which spectrum bins share which kernel attention.

A layer's kernels are one matrix ``M`` of R = O·kh rows and C = I·kw columns. Its half
spectrum ``rfft2(M)``, R × (C/2 + 1) complex, is cut into ``kernel_num`` groups of equal
size by radius. Radii tie often and ties straddle group borders, so the order in which
the sort leaves equal radii is part of every trained checkpoint, though no checkpoint
stores it. Source: paper section 3.1; ties as the published code sorts them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fdconv_deploy.errors import UnsupportedLayerError

FrequencyOrder = Literal["torch", "stable"] | Tensor


def bin_radii(rows: int, columns: int) -> Tensor:
    """Distance of every half-spectrum bin from the zero frequency, in cycles per sample.

    ``(rows, columns // 2 + 1)`` float32 on the CPU. The norm fuses multiply and add, as the
    published code's does on every CPU torch has vector kernels for: without the fusion, bins of
    3×3 layers change groups.
    """
    vertical = torch.fft.fftfreq(rows, dtype=torch.float32, device="cpu")
    horizontal = torch.fft.rfftfreq(columns, dtype=torch.float32, device="cpu")
    # One rounding of w·w + round(h·h): the product of two float32 is exact in float64.
    squared_rows = (vertical * vertical).double()[:, None]
    squared = (squared_rows + horizontal.double()[None, :] ** 2).float()
    # numpy's square root rounds correctly; torch's vector one is off in the last bit.
    return torch.from_numpy(np.sqrt(squared.numpy()))


@lru_cache(maxsize=256)
def bin_order(rows: int, columns: int, method: str = "torch") -> Tensor:
    """Flat, row-major bin indices by ascending radius, ``(rows·(columns//2+1),)`` int64.

    ``method="torch"`` leaves ties as ``torch.sort`` does on a CPU without
    ``stable=True`` (the published code; bit for bit libstdc++'s ``std::sort``);
    ``"stable"`` leaves them in row-major order. The result is shared: do not write to it.
    """
    if method not in ("torch", "stable"):
        raise UnsupportedLayerError(
            f"frequency_order must be 'torch', 'stable' or an index tensor, got {method!r}."
        )
    if method == "torch":
        _check_sort()
    return torch.sort(bin_radii(rows, columns).reshape(-1), stable=method == "stable").indices


# The published code's order of the bins of a 64→64 1×1 layer, where three quarters of all bins
# lie elsewhere than in a stable order: by it, this machine's sort is told from another.
PROBE = (64, 64)
PROBE_SHA256 = "0895ece4afe833654820c3567cfd1982610c6105a59d83503ed10885f8936da7"


@lru_cache(maxsize=1)
def _check_sort() -> None:
    """Refuse a torch whose sort leaves ties otherwise than the published code's did.

    No release promises it; a silent change would give wrong kernels without an error.
    """
    order = torch.sort(bin_radii(*PROBE).reshape(-1), stable=False).indices
    if hashlib.sha256(order.numpy().tobytes()).hexdigest() != PROBE_SHA256:
        raise UnsupportedLayerError(
            f"torch {torch.__version__} on this machine sorts equal radii in another order than "
            "the published FDConv code did, so checkpoints would get wrong frequency groups. "
            "Install a torch that keeps it (2.13 does on x86-64), or give the order a checkpoint "
            "was trained with: frequency_order='stable' or a tensor of indices."
        )


@lru_cache(maxsize=256)
def _named_indices(
    rows: int, columns: int, groups: int, ratio: int, kept: int, method: str
) -> Tensor:
    half = columns // 2 + 1
    order = bin_order(rows, columns, method)[:kept].reshape(groups, -1)
    both = torch.stack([order // half, order % half])
    return both.expand(ratio, *both.shape)


def frequency_indices(
    rows: int,
    columns: int,
    groups: int,
    *,
    ratio: int = 1,
    reduction: float = 1.0,
    order: FrequencyOrder = "torch",
) -> Tensor:
    """Row and column of every kept bin, by frequency group.

    Args:
        rows, columns: size of the kernel matrix, O·kh and I·kw.
        groups, ratio: ``kernel_num`` and ``param_ratio``; each ratio has the same groups.
        reduction: ``param_reduction``; below 1, only that share of the lowest bins is kept.
        order: how ties are left (see `bin_order`), or the indices themselves.

    Returns:
        ``(ratio, 2, groups, bins_per_group)`` int64; axis 1 is row, column.

    Raises:
        UnsupportedLayerError: the bins do not divide by ``groups``, or a given tensor has
            another shape or does not name each kept bin once.
    """
    bins = rows * (columns // 2 + 1)
    kept = int(bins * reduction) if reduction < 1 else bins
    if kept % groups:
        usable = [g for g in range(groups - 1, 0, -1) if kept % g == 0][:1]
        raise UnsupportedLayerError(
            f"kernel_num={groups} does not divide this layer's {kept} frequency bins "
            f"({rows} rows × {columns // 2 + 1} columns of half spectrum"
            f"{'' if kept == bins else f', reduced by {reduction}'}). "
            f"Use a kernel_num that does (the next lower is {usable[0]}), or keep the layer plain: "
            "an FDConv2d by raising use_fdconv_if_c_gt."
        )
    if isinstance(order, str):
        return _named_indices(rows, columns, groups, ratio, kept, order)

    expected = (ratio, 2, groups, kept // groups)
    if tuple(order.shape) != expected:
        raise UnsupportedLayerError(
            f"frequency_order must have shape {expected} (param_ratio, 2, kernel_num, bins per "
            f"group) for this layer, got {tuple(order.shape)}."
        )
    indices = order.to("cpu", torch.int64)
    flat = indices[:, 0] * (columns // 2 + 1) + indices[:, 1]
    unique = all(row.unique().numel() == kept for row in flat.reshape(ratio, -1))
    if not unique or int(indices.min()) < 0 or int(flat.max()) >= bins:
        raise UnsupportedLayerError(
            "frequency_order must name each kept frequency bin exactly once; "
            "the tensor given repeats bins or leaves the spectrum."
        )
    return indices


def kernel_spectrum(weight: Tensor) -> Tensor:
    """The half spectrum that a layer stores for a kernel ``(O, I, kh, kw)`` of any float type.

    ``(O·kh, I·kw/2 + 1, 2)`` float32, real and imaginary: ``rfft2`` of the matrix ``M[o·kh + u,
    i·kw + v]``, divided by ``min(I, O) // 2``.
    """
    out, into, height, width = weight.shape
    matrix = weight.transpose(1, 2).reshape(out * height, into * width)
    return torch.view_as_real(torch.fft.rfft2(matrix.float())) / (min(out, into) // 2)


def group_map(indices: Tensor, rows: int, columns: int) -> Tensor:
    """Which group each bin is in: ``(ratio, rows, columns//2+1)`` int64, -1 where dropped."""
    ratio, _, groups, per_group = indices.shape
    result = torch.full((ratio, rows, columns // 2 + 1), -1, dtype=torch.int64)
    labels = torch.arange(groups)[:, None].expand(groups, per_group)
    for plane, (at_row, at_column) in zip(result, indices, strict=True):
        plane[at_row, at_column] = labels
    return result
