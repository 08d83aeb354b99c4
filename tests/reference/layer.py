"""The layer: attentions, spectrum to kernels, bands, convolution; one image at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.spectrum import band_mask, bin_order, own_size_mask

Float64 = NDArray[np.float64]


def sigmoid(z: Float64) -> Float64:
    return np.exp(-np.logaddexp(0, -z))


def softmax(z: Float64, axis: int) -> Float64:
    powers = np.exp(z - z.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def convolve(
    x: Float64,
    weight: Float64,
    padding: Sequence[Sequence[int]],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Float64:
    """One image ``(I, H, W)`` with ``(O, I/groups, kh, kw)``, zero-padded: ``(O, H', W')``."""
    x = np.pad(x, ((0, 0), *padding))
    size = [
        (length - step * (kernel - 1) - 1) // jump + 1
        for length, kernel, step, jump in zip(
            x.shape[1:], weight.shape[2:], dilation, stride, strict=True
        )
    ]
    result = np.zeros((len(weight), *size))
    outs, ins = len(weight) // groups, weight.shape[1]
    for group in range(groups):
        into, out = slice(group * ins, group * ins + ins), slice(group * outs, group * outs + outs)
        for u, v in np.ndindex(*weight.shape[2:]):
            top, left = u * dilation[0], v * dilation[1]
            seen = x[into, top:, left:][:, :: stride[0], :: stride[1]][:, : size[0], : size[1]]
            result[out] += np.einsum("oi,ihw->ohw", weight[out, :, u, v], seen)
    return result


def low_pass(x: Float64, mask: NDArray[np.bool_]) -> Float64:
    """``irfft2(rfft2(x) ∘ mask)`` of ``(I, H, W)``, axis by axis."""
    spectrum = np.fft.fft(np.fft.rfft(x, axis=2), axis=1) * mask
    return np.fft.irfft(np.fft.ifft(spectrum, axis=1), n=x.shape[2], axis=2)


class ReferenceFDConv:
    """A layer of published arguments (defaults as published) and state-dict entries.

    Three things are copies', not the published class's: ``ksm_global_norm`` ("group", "none"),
    ``fbm_cfg["masks"]`` ("per_call") and an odd number of columns.

    Args:
        state: arrays by published key.
        order: flat bin indices ``(param_ratio, bins)`` if not as the published code sorts.
        arguments: of the published constructor.
    """

    def __init__(
        self,
        state: Mapping[str, NDArray],
        arguments: Mapping[str, Any],
        order: NDArray[np.int64] | None = None,
    ) -> None:
        defaults: dict[str, Any] = dict(
            stride=1, padding=0, dilation=1, groups=1, kernel_num=4, use_fdconv_if_c_gt=16,
            use_fdconv_if_k_in=(1, 3), use_fbm_if_k_in=(3,), use_fbm_for_stride=False,
            kernel_temp=1.0, temp=None, att_multi=2.0, param_ratio=1, param_reduction=1.0,
            ksm_only_kernel_att=False, use_ksm_local=True, ksm_local_act="sigmoid",
            ksm_global_act="sigmoid", convert_param=True, fbm_cfg=None, ksm_global_norm="batch",
        )  # fmt: skip
        self.state = {k: np.asarray(v, dtype=np.float64) for k, v in state.items()}
        self.given = defaults | dict(arguments)
        given = self.given
        self.ins, self.outs = given["in_channels"], given["out_channels"]
        self.kernel, self.stride, self.dilation = (
            (v, v) if isinstance(v, int) else tuple(v)
            for v in (given["kernel_size"], given["stride"], given["dilation"])
        )
        self.dynamic = (
            min(self.ins, self.outs) > given["use_fdconv_if_c_gt"]
            and self.kernel[0] in given["use_fdconv_if_k_in"]
        )
        self.planes, self.groups = given["param_ratio"], given["kernel_num"]
        if self.groups is None:
            self.groups = self.outs // 2
            given["kernel_temp"] = math.sqrt(self.groups * self.planes)
        if given["temp"] is None:
            given["temp"] = given["kernel_temp"]
        self.rows, self.columns = self.outs * self.kernel[0], self.ins * self.kernel[1]
        self._order = order

    def padding(self) -> list[tuple[int, int]]:
        """Before and after each axis."""
        padding = self.given["padding"]
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return [(t // 2, t - t // 2) for t in totals]
        if padding == "valid":
            return [(0, 0), (0, 0)]
        both = (padding, padding) if isinstance(padding, int) else padding
        return [(p, p) for p in both]

    def order(self) -> NDArray[np.int64]:
        """``(param_ratio, bins kept)``: flat bins, lowest first."""
        if self._order is not None:
            return self._order
        kept = self.rows * (self.columns // 2 + 1)
        if self.given["param_reduction"] < 1:
            kept = int(kept * self.given["param_reduction"])
        return np.tile(bin_order(self.rows, self.columns)[:kept], (self.planes, 1))

    def _gate(self, logits: Float64, act: str) -> Float64:
        return (
            sigmoid(logits) * self.given["att_multi"] if act == "sigmoid" else 1 + np.tanh(logits)
        )

    def global_attention(self, average: Float64) -> dict[str, Float64 | float]:
        """Channel, filter, spatial and kernel attention of one image's ``(I,)`` average."""
        read = {k.removeprefix("KSM_Global."): v for k, v in self.state.items()}
        z = read["fc.weight"][:, :, 0, 0] @ average
        if self.given["ksm_global_norm"] == "batch":
            z = (z - read["bn.running_mean"]) / np.sqrt(read["bn.running_var"] + 1e-5)
        elif self.given["ksm_global_norm"] == "group":
            z = (z - z.mean()) / np.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)
        if self.given["ksm_global_norm"] != "none":
            z = z * read["bn.weight"] + read["bn.bias"]
        h = read["relu.scale"] * np.maximum(z, 0) ** 2 + read["relu.bias"]

        def head(name: str, temperature: float) -> Float64:
            weight = read[f"{name}_fc.weight"][:, :, 0, 0]
            return (weight @ h + read[f"{name}_fc.bias"]) / temperature

        act, temp = self.given["ksm_global_act"], self.given["temp"]
        result: dict[str, Float64 | float] = dict(channel=1.0, filter=1.0, spatial=1.0)
        if not self.given["ksm_only_kernel_att"]:
            result["channel"] = self._gate(head("channel", temp), act)
            result["filter"] = self._gate(head("filter", temp), act)
            if self.kernel[0] > 1:
                result["spatial"] = self._gate(head("spatial", temp), act).reshape(self.kernel)
        logits = head("kernel", self.given["kernel_temp"])
        count = self.planes * self.groups
        if act == "softmax":
            result["kernel"] = softmax(logits, 0)
        elif act == "sigmoid":
            result["kernel"] = sigmoid(logits) * 2 / count
        else:
            result["kernel"] = (1 + np.tanh(logits)) / count
        return result

    def local_attention(self, average: Float64) -> Float64:
        """``(O, I, kh, kw)`` of one image's average."""
        width = 2 * (round(math.log2(self.ins) / 2 + 0.5) // 2) + 1
        conv = self.state["KSM_Local.conv.weight"]
        assert conv.shape == (self.outs * math.prod(self.kernel), 1, width)
        normed = (average - average.mean()) / np.sqrt(average.var() + 1e-5)
        normed = normed * self.state["KSM_Local.norm.weight"] + self.state["KSM_Local.norm.bias"]
        padded = np.pad(normed, width // 2)
        logits = np.zeros((len(conv), self.ins))
        for tap in range(width):
            logits += conv[:, 0, tap, None] * padded[None, tap : tap + self.ins]
        logits = logits.reshape(self.outs, *self.kernel, self.ins).transpose(0, 3, 1, 2)
        return self._gate(logits, self.given["ksm_local_act"])

    def kernel_matrix(self, attention: Float64) -> Float64:
        """``(O·kh, I·kw)`` from ``(param_ratio·kernel_num,)``."""
        half, scale = self.columns // 2 + 1, min(self.ins, self.outs) // 2
        reduction = self.given["param_reduction"]
        total = np.zeros(self.rows * half, dtype=complex)
        for plane, order in enumerate(self.order()):
            if not self.given["convert_param"]:
                weight = self.state["weight"].reshape(self.outs, self.ins, *self.kernel)
                matrix = weight.transpose(0, 2, 1, 3).reshape(self.rows, self.columns)
                values = (np.fft.rfft2(matrix) / scale).reshape(-1)[order]
            else:
                stored = self.state["dft_weight"][plane]
                values = (stored[..., 0] + 1j * stored[..., 1]).reshape(-1)
                if reduction >= 1:
                    values = values[order]
            if reduction >= 1:
                values = values * (scale * self.groups * self.planes / reduction)
            gates = attention[plane * self.groups : (plane + 1) * self.groups]
            total[order] += values * np.repeat(gates, len(order) // self.groups)
        matrix = np.fft.ifft(total.reshape(self.rows, half), axis=0)
        return np.fft.irfft(matrix, n=self.columns, axis=1)

    def kernel_of(self, average: Float64) -> Float64:
        """``(O, I, kh, kw)`` of one image's average."""
        attention = self.global_attention(average)
        matrix = self.kernel_matrix(attention["kernel"])
        kernel = matrix.reshape(self.outs, self.kernel[0], self.ins, self.kernel[1])
        kernel = kernel.transpose(0, 2, 1, 3) * attention["spatial"]
        kernel = kernel * np.reshape(attention["channel"], (1, -1, 1, 1))
        kernel = kernel * np.reshape(attention["filter"], (-1, 1, 1, 1))
        if self.given["use_ksm_local"]:
            kernel = kernel * self.local_attention(average)
        return kernel

    def modulates_bands(self) -> bool:
        """Whether the input is seen band by band."""
        by_stride = self.given["use_fbm_for_stride"] and self.stride[0] > 1
        return self.kernel[0] in self.given["use_fbm_if_k_in"] or by_stride

    def bands(self, x: Float64) -> Float64:
        """Band modulation of one image ``(I, H, W)``."""
        config: dict[str, Any] = dict(
            k_list=[2], lowfreq_att=False, act="sigmoid", spatial_group=1, max_size=(64, 64),
            masks="cached",
        )  # fmt: skip
        given = self.given["fbm_cfg"]
        config |= dict(k_list=[2, 4, 8]) if given is None else given
        groups = self.ins if config["spatial_group"] > 64 else config["spatial_group"]

        def weigh(band: int, part: Float64) -> Float64:
            weight = self.state[f"FBM.freq_weight_conv_list.{band}.weight"]
            bias = self.state[f"FBM.freq_weight_conv_list.{band}.bias"]
            reach = weight.shape[-1] // 2
            logits = convolve(x, weight, [(reach, reach)] * 2, groups=groups)
            logits = logits + bias[:, None, None]
            gates = {
                "sigmoid": lambda: sigmoid(logits) * 2,
                "tanh": lambda: 1 + np.tanh(logits),
                "softmax": lambda: softmax(logits, 0) * groups,
            }[config["act"]]()
            return part * np.repeat(gates, self.ins // groups, 0)

        total, previous = np.zeros_like(x), x
        for band, k in enumerate(config["k_list"]):
            if config["masks"] == "per_call":
                mask = own_size_mask(k, *x.shape[1:])
            else:
                mask = band_mask(k, *x.shape[1:], config["max_size"])
            low = low_pass(x, mask)
            total, previous = total + weigh(band, previous - low), low
        if config["lowfreq_att"]:
            previous = weigh(len(config["k_list"]), previous)
        return total + previous

    def __call__(self, x: NDArray) -> Float64:
        """``(B, I, H, W)`` -> ``(B, O, H', W')``."""
        return np.stack([self.one(image) for image in np.asarray(x, dtype=np.float64)])

    def one(self, x: Float64) -> Float64:
        """One image ``(I, H, W)`` -> ``(O, H', W')``."""
        groups = 1
        if self.dynamic:
            kernel = self.kernel_of(x.mean((1, 2)))
            x = self.bands(x) if self.modulates_bands() else x
        else:
            kernel, groups = self.state["weight"], self.given["groups"]
        y = convolve(x, kernel, self.padding(), self.stride, self.dilation, groups)
        bias = self.state.get("bias")
        return y if bias is None else y + bias[:, None, None]
