"""The published FDConv layers, exact: arguments, state-dict keys, arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from fdconv_deploy.config import BandModulationConfig, FDConvConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.band_modulation import BandModulation
from fdconv_deploy.nn.modulation import (
    GlobalAttention,
    GlobalModulation,
    LinearModulation,
    LocalModulation,
)
from fdconv_deploy.nn.spectrum import FrequencyOrder, frequency_indices, kernel_spectrum

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


# Published arguments that no result depends on.
_UNREAD = ("use_fdconv_if_stride_in", "att_grid", "spatial_freq_decompose")


def _read(arguments: Mapping[str, Any]) -> FDConvConfig:
    """A layer's arguments, as the published code reads them.

    ``fbm_cfg=None`` stands for the layer's own default (bands 2, 4, 8); a dict without
    ``k_list`` means one band, ``[2]``. Keys of it that the published code never reads are dropped.
    """
    read = {name: value for name, value in arguments.items() if name not in _UNREAD}
    if unknown := set(read).difference(FDConvConfig.model_fields):
        raise TypeError(
            f"FDConv2d has no {', '.join(sorted(unknown))}. Beside nn.Conv2d's arguments and "
            f"frequency_order it has {', '.join([*FDConvConfig.model_fields, *_UNREAD])}."
        )
    bands = read.get("fbm_cfg")
    if bands is None:
        read.pop("fbm_cfg", None)
    elif not isinstance(bands, BandModulationConfig):
        if bands.get("spatial", "conv") != "conv":
            raise UnsupportedLayerError(
                f"fbm_cfg.spatial must be 'conv', the one kind there is, got {bands['spatial']!r}."
            )
        known = {k: v for k, v in bands.items() if k in BandModulationConfig.model_fields}
        read["fbm_cfg"] = {"k_list": (2,)} | known
    try:
        return FDConvConfig(**read)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnsupportedLayerError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}."
        ) from None


class FDConv2d(nn.Conv2d):
    """Frequency Dynamic Convolution: each image's kernels from a learned spectrum.

    ``forward``: ``(B, I, H, W)`` -> ``(B, O, H', W')``, as ``nn.Conv2d``. A layer is
    dynamic if ``min(I, O) > use_fdconv_if_c_gt`` and its kernel height is in
    ``use_fdconv_if_k_in``; otherwise it is the plain convolution with a ``weight``.
    An odd ``in_channels`` × kernel width is inverted to its own width, as in copies that give
    ``irfft2`` its size; the published class makes it a column short and fails.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode: as ``nn.Conv2d``. A dynamic layer pads with zeros whatever
            ``padding_mode`` says, and takes ``groups=1`` only.
        arguments: the fields of `FDConvConfig`, as published; ``fbm_cfg`` may be a dict.
            ``use_fdconv_if_stride_in``, ``att_grid`` and ``spatial_freq_decompose`` (where it has
            no effect) are accepted and unread.
        frequency_order: how equal radii are ordered, ``"torch"`` (the published code),
            ``"stable"``, or the indices themselves, ``(param_ratio, 2, kernel_num, M)``.

    Raises:
        UnsupportedLayerError: arguments the published code breaks on, with what to change.

    Source: paper equations 3 to 8; ``FDConv`` of the published code.
    """

    indices: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        frequency_order: FrequencyOrder = "torch",
        **arguments: Any,
    ) -> None:
        geometry = in_channels, out_channels, kernel_size, stride, padding, dilation
        super().__init__(*geometry, groups, bias, padding_mode)
        height, width = self.kernel_size
        channels = min(in_channels, out_channels)
        config = _read(arguments)
        self.is_dynamic = (
            channels > config.use_fdconv_if_c_gt and height in config.use_fdconv_if_k_in
        )
        if not self.is_dynamic:
            return

        kernel_num, kernel_temp = config.kernel_num, config.kernel_temp
        self.param_ratio, self.param_reduction = config.param_ratio, config.param_reduction
        self.convert_param = config.convert_param
        if kernel_num is None:
            kernel_num = out_channels // 2
            kernel_temp = math.sqrt(kernel_num * self.param_ratio)
        self.kernel_num = kernel_num
        self.rows, self.columns = out_channels * height, in_channels * width
        self._refuse_what_cannot_work(config, arguments.get("spatial_freq_decompose", False))
        assert kernel_temp is not None
        # Spectra are stored divided by this, so that their entries are of order one.
        self.spectrum_scale = channels // 2
        self.alpha = 1.0
        if self.param_reduction >= 1:
            self.alpha = self.spectrum_scale * kernel_num * self.param_ratio / self.param_reduction

        self.KSM_Global = self._modulation(config, kernel_num * self.param_ratio, kernel_temp)
        self.FBM: BandModulation | None = None
        if height in config.use_fbm_if_k_in or (config.use_fbm_for_stride and self.stride[0] > 1):
            self.FBM = BandModulation(in_channels, config.fbm_cfg)
        self.KSM_Local: LocalModulation | None = None
        if config.use_ksm_local:
            self.KSM_Local = LocalModulation(in_channels, out_channels, (height, width), config)
        indices = frequency_indices(
            self.rows,
            self.columns,
            kernel_num,
            ratio=self.param_ratio,
            reduction=self.param_reduction,
            order=frequency_order,
        )
        self.register_buffer("indices", indices, persistent=False)
        if self.convert_param:
            self.dft_weight = nn.Parameter(self.stored_spectrum(self.weight.detach()))
            del self.weight
            self.register_parameter("weight", None)
        elif config.linear_mode:
            self.weight = nn.Parameter(self.weight.detach()[:, :, 0, 0].contiguous())

    def _refuse_what_cannot_work(self, config: FDConvConfig, decompose: bool) -> None:
        """Turn what the published code breaks on, often much later, into sentences."""
        height, width = self.kernel_size
        only_kernel = config.ksm_only_kernel_att
        refused = {
            f"groups={self.groups} is not possible for a dynamic layer. Use groups=1, or raise "
            "use_fdconv_if_c_gt so that it stays a plain convolution.": self.groups != 1,
            f"kernel_num and param_ratio must be 1 or more, got {self.kernel_num} and "
            f"{self.param_ratio}.": self.kernel_num < 1 or self.param_ratio < 1,
            "kernel_temp=None is only defined with kernel_num=None. Give a number, as 1.0.": (
                config.kernel_temp is None and config.kernel_num is not None
            ),
            "spatial_freq_decompose=True gives channel and filter attentions twice the channels, "
            "which the published layer cannot apply. Set it to False.": (
                decompose and not only_kernel
            ),
            "spatial attention is defined for square kernels and for height 1. Use "
            "ksm_only_kernel_att=True or a square kernel.": (
                height != width and height > 1 and not only_kernel
            ),
            "linear_mode=True with convert_param=False takes 1×1 kernels only.": (
                config.linear_mode and not self.convert_param and self.kernel_size != (1, 1)
            ),
            "param_reduction < 1 drops spectrum bins, so it needs convert_param=True.": (
                self.param_reduction < 1 and not self.convert_param
            ),
        }
        for problem, found in refused.items():
            if found:
                raise self._refusal(problem)

    def _refusal(self, problem: str) -> UnsupportedLayerError:
        sizes = f"{self.in_channels}→{self.out_channels}, kernel {self.kernel_size}"
        return UnsupportedLayerError(f"FDConv layer {sizes}: {problem}")

    def _modulation(
        self, config: FDConvConfig, groups: int, kernel_temp: float
    ) -> GlobalModulation | LinearModulation:
        """The global attentions of ``groups`` kernels."""
        if groups == 1:
            raise self._refusal(
                "kernel_num=1 with param_ratio=1 leaves no kernel attention. "
                "Use kernel_num ≥ 2 or param_ratio ≥ 2."
            )
        size = self.kernel_size[0], self.kernel_size[1]
        return GlobalModulation(
            self.in_channels, self.out_channels, size, groups, kernel_temp, config
        )

    def stored_spectrum(self, weight: Tensor) -> Tensor:
        """What a converted layer stores for a plain kernel: its spectrum ``param_ratio`` times.

        Of ``param_reduction`` below 1 the bins kept, ``(P, bins, 2)``, in the order of the indices.
        """
        shape = self.out_channels, self.in_channels, *self.kernel_size
        spectrum = kernel_spectrum(weight.reshape(shape))
        if self.param_reduction >= 1:
            return spectrum.repeat(self.param_ratio, 1, 1, 1)
        kept = self.indices.flatten(2).to(spectrum.device)
        return torch.stack([spectrum[rows, columns] for rows, columns in kept])

    def modulated_spectrum(self, kernel_attention: Tensor) -> Tensor:
        """The stored spectra, weighed by group and added: ``(B, P·G)`` -> ``(B, R, C/2 + 1, 2)``.

        float32, real beside imaginary.
        """
        stored = self.dft_weight if self.convert_param else self.stored_spectrum(self.weight)
        weights = kernel_attention.reshape(-1, self.param_ratio, self.kernel_num, 1, 1)
        size = len(kernel_attention), self.rows, self.columns // 2 + 1, 2
        result = torch.zeros(size, dtype=stored.dtype, device=stored.device)
        for plane, (rows, columns) in enumerate(self.indices):
            if self.param_reduction < 1:  # stored in the order of the indices, without alpha
                grouped = stored[plane].unflatten(0, (self.kernel_num, -1))
            else:
                grouped = stored[plane][rows, columns] * self.alpha
            result[:, rows, columns] += grouped * weights[:, plane]
        return result

    def kernel_matrix(self, kernel_attention: Tensor) -> Tensor:
        """The inverse transform of `modulated_spectrum`: ``(B, R, C)`` float32.

        ``irfft2`` inverts the rows first and then drops what is imaginary in column 0 and
        in the Nyquist column; attention breaks the symmetry there, so this order matters.
        """
        spectrum = self.modulated_spectrum(kernel_attention)
        if spectrum.dtype in (torch.float16, torch.bfloat16):
            spectrum = spectrum.float()
        size = (self.rows, self.columns)
        return torch.fft.irfft2(torch.view_as_complex(spectrum), s=size, dim=(1, 2))

    def average(self, x: Tensor) -> Tensor:
        """``(B, I)``: the mean over all positions of an input, which the attentions are of."""
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def attention(self, x: Tensor) -> tuple[GlobalAttention, Tensor | None]:
        """Global attentions and the local one, ``(B, O, I, kh, kw)``, of an input."""
        average = self.average(x)
        local = self.KSM_Local(average) if self.KSM_Local is not None else None
        return self.KSM_Global(average), local

    def kernels(self, attention: GlobalAttention, local: Tensor | None, *, full: bool) -> Tensor:
        """One kernel per image, ``(B, O, I, kh, kw)`` float32.

        ``full=False`` leaves channel and filter attention out, for a caller that scales
        the convolution's input and output instead.
        """
        kernel = self.kernel_matrix(attention.kernel)
        kernel = kernel.reshape(
            -1, self.out_channels, self.kernel_size[0], self.in_channels, self.kernel_size[1]
        ).transpose(2, 3)
        if attention.spatial is not None:
            kernel = kernel * attention.spatial[:, None, None]
        if local is not None:
            kernel = kernel * local
        if full and attention.channel is not None and attention.filter is not None:
            kernel = kernel * attention.channel[:, None, :, None, None]
            kernel = kernel * attention.filter[:, :, None, None, None]
        return kernel

    def modulates_kernel(self, height: int, width: int) -> bool:
        """Whether channel and filter attention scale the kernel (else input and output).

        The published code takes whichever touches fewer numbers; both are equal.
        """
        weights = self.out_channels * self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        return weights < (self.in_channels + self.out_channels) * height * width

    def _kernels_for(
        self, x: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Kernels, and what scales the convolution's input and output instead of them."""
        attention, local = self.attention(x)
        full = self.modulates_kernel(height, width)
        kernel = self.kernels(attention, local, full=full).to(x.dtype)
        if full or attention.channel is None or attention.filter is None:
            return kernel, None, None
        return kernel, attention.channel.to(x.dtype), attention.filter.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` float -> ``(B, O, H', W')``, of the input's dtype."""
        if not self.is_dynamic:
            return super().forward(x)
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[0] == 0:
            raise ValueError(
                f"FDConv2d expects a non-empty (B, {self.in_channels}, H, W) input, "
                f"got {tuple(x.shape)}."
            )
        batch, _, height, width = x.shape
        kernel, channel, filter_ = self._kernels_for(x, height, width)
        if self.FBM is not None:
            x = self.FBM(x)
        if channel is not None:
            x = x * channel[:, :, None, None]
        y = F.conv2d(
            x.reshape(1, -1, height, width),
            kernel.reshape(-1, self.in_channels, *self.kernel_size),
            None,
            self.stride,
            self.padding,
            self.dilation,
            batch,
        )
        y = y.reshape(batch, self.out_channels, *y.shape[-2:])
        if filter_ is not None:
            y = y * filter_[:, :, None, None]
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)


class FDTokenConv(FDConv2d):
    """A 1×1 FDConv layer in a linear layer's place: one weight matrix per image, for its tokens.

    ``forward``: ``(B, …, I)`` -> ``(B, …, O)``, as ``nn.Linear`` but for the batch axis, which
    there must be. It computes what `FDConv2d` does with the tokens as a map ``(B, I, L, 1)``, and
    has its state-dict keys, so the mean that the attentions are of is over all of an image's
    tokens. Where the layer is plain, its ``weight`` is a 1×1 convolution's.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        arguments: of `FDConv2d`, as ``kernel_num=16``; so are the errors.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **arguments: Any
    ) -> None:
        super().__init__(in_features, out_features, 1, bias=bias, **arguments)
        self.in_features, self.out_features = in_features, out_features
        if self.is_dynamic and self.FBM is not None:
            raise UnsupportedLayerError(
                "use_fbm_if_k_in has 1, but tokens are no map whose frequency bands could be "
                "modulated. Leave 1 out of it."
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """Take a plain layer's weight as linear layers have it, too, ``(O, I)``."""
        weight = state_dict.get(f"{prefix}weight")
        if not self.is_dynamic and isinstance(weight, Tensor) and weight.ndim == 2:
            state_dict[f"{prefix}weight"] = weight[:, :, None, None]
        super()._load_from_state_dict(state_dict, prefix, *others, **named)

    def average(self, x: Tensor) -> Tensor:
        """``(B, I)``: the mean over all of an image's tokens."""
        return x.flatten(1, -2).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, …, I)`` float, of three axes or more -> ``(B, …, O)``, of the input's dtype."""
        if not self.is_dynamic:
            return F.linear(x, self.weight.flatten(1), self.bias)
        if x.ndim < 3 or x.shape[-1] != self.in_channels or x.numel() == 0:
            raise ValueError(
                f"FDTokenConv expects a non-empty (B, …, {self.in_channels}) input of at least "
                f"three axes, got {tuple(x.shape)}."
            )
        tokens = x.flatten(1, -2)
        kernel, channel, filter_ = self._kernels_for(x, tokens.shape[1], 1)
        if channel is not None:
            tokens = tokens * channel[:, None]
        y = tokens @ kernel[..., 0, 0].transpose(1, 2)
        if filter_ is not None:
            y = y * filter_[:, None]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_channels)


class FDLinear(FDTokenConv):
    """Frequency Dynamic linear layer, the published linear form: one weight matrix per sequence.

    ``forward``: ``(B, N, I)`` -> ``(B, N, O)``, the weights of a sequence from its mean
    over N; or ``(N, I)`` -> ``(N, O)``, each row with weights of its own. Odd
    ``in_features`` work. Its global attention is `LinearModulation`; it has no local one.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        arguments: as published, see ``ARGUMENTS``; `FDConv2d`'s of these names.

    Raises:
        UnsupportedLayerError: arguments that describe no layer, with what to change.
    """

    ARGUMENTS = (
        "reduction kernel_num kernel_temp temp att_multi param_ratio param_reduction "
        "ksm_global_act convert_param frequency_order"
    ).split()

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **arguments: Any
    ) -> None:
        if unknown := set(arguments).difference(self.ARGUMENTS):
            raise TypeError(
                f"FDLinear has no {', '.join(sorted(unknown))}. Beside in_features, out_features "
                f"and bias it has {', '.join(self.ARGUMENTS)}."
            )
        fixed: dict[str, Any] = {"use_fdconv_if_c_gt": 0, "use_ksm_local": False}
        super().__init__(in_features, out_features, bias, linear_mode=True, **fixed, **arguments)
        if self.param_reduction >= 1:
            self.alpha = self.spectrum_scale * self.param_ratio / self.param_reduction

    def _modulation(
        self, config: FDConvConfig, groups: int, kernel_temp: float
    ) -> LinearModulation:
        return LinearModulation(self.in_channels, self.out_channels, groups, kernel_temp, config)

    def modulates_kernel(self, height: int, width: int) -> bool:
        """Always: the published code has no other way."""
        return True

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
        return super().forward(x) if x.ndim == 3 else super().forward(x[:, None])[:, 0]


def conv_or_fdconv(
    config: FDConvConfig | None,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    *,
    order: FrequencyOrder,
    bias: bool = True,
) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1: FDConv where a config is given, else plain."""
    padding = dilation * (kernel_size // 2)
    shape = in_channels, out_channels, kernel_size, stride, padding, dilation
    if config is None:
        return nn.Conv2d(*shape, bias=bias)
    return FDConv2d(*shape, bias=bias, frequency_order=order, **dict(config))


def linear_or_fdconv(
    config: FDConvConfig | None, in_features: int, out_features: int, *, order: FrequencyOrder
) -> nn.Module:
    """A linear layer with a bias: FDConv over tokens where a config is given, else plain."""
    if config is None:
        return nn.Linear(in_features, out_features)
    return FDTokenConv(in_features, out_features, frequency_order=order, **dict(config))


def dynamic_layers(network: nn.Module) -> dict[str, FDConv2d]:
    """A network's dynamic layers by name, each once though it be shared."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FDConv2d) and module.is_dynamic
    }
