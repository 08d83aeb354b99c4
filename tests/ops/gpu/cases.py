"""Layers run through the GPU kernels in Triton's interpreter, one process for all.

    TRITON_INTERPRET=1 python -m tests.ops.gpu.cases NAME…

Prints one JSON object: for each case its errors against the float64 layer, as shares of the
largest value. Triton reads the variable when it is imported, so tests run this apart.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

import fdconv_deploy.folding.cuda.layer as layer_module
from benchmarks.gpu.launches import launches
from fdconv_deploy.folding.cuda import FusedConv2d, fuse_network
from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.nn import FDConv2d, FDLinear, FDTokenConv
from fdconv_deploy.ops import torch_ops
from fdconv_deploy.ops.frequency_assembly.launch import column_transform, transform_of
from fdconv_deploy.ops.launch import run_kernel
from tests.reference.lively import enliven, error, lively_input


@dataclass(frozen=True)
class Case:
    """A layer, an input, and what the kernels are asked for.

    over: a map, tokens as an FDTokenConv, or tokens as an FDLinear; size is then their number, 1.
    offset: of the input's values.
    """

    channels: tuple[int, int]
    kernel: int | tuple[int, int] = 1
    groups: int = 4
    batch: int = 1
    size: tuple[int, int] = (5, 6)
    dtype: str = "float32"
    channels_last: bool = False
    normed: bool = False
    slow: bool = False
    offset: float = 0.0
    over: Literal["map", "tokens", "linear"] = "map"
    arguments: dict[str, Any] = field(default_factory=dict)

    def layer(self) -> Any:
        ins, outs = self.channels
        if self.over != "map":
            kind = FDTokenConv if self.over == "tokens" else FDLinear
            return enliven(kind(ins, outs, kernel_num=self.groups, **self.arguments))
        given = {"use_fbm_if_k_in": [], "use_fdconv_if_k_in": [1, 2, 3, 5]} | self.arguments
        return enliven(FDConv2d(ins, outs, self.kernel, kernel_num=self.groups, **given))

    def input(self) -> torch.Tensor:
        x = lively_input((self.batch, self.channels[0], *self.size)) + self.offset
        return x if self.over == "map" else x.flatten(2).transpose(1, 2).contiguous()

    def average(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3) if self.over == "map" else 1)

    def folded(self, layer: Any) -> FoldedConv:
        if not self.normed:
            return fold_layer(layer, self.size, name="layer")
        scale, shift = self.normalisation()
        return fold_layer(layer, self.size, name="layer", scale=scale, shift=shift)

    def normalisation(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(2, self.channels[1]))


LAST_HALF: dict[str, Any] = {"channels_last": True, "dtype": "float16"}
ONLY = {"ksm_only_kernel_att": True}
LAYERS: dict[str, Case] = {
    "pointwise": Case((32, 32)),
    "pointwise, more out, batch 3": Case((18, 64), batch=3),
    "pointwise, more in, features scaled": Case((128, 32), size=(2, 3)),
    "3x3": Case((32, 32), 3, arguments={"padding": 1}),
    "3x3, half, last": Case((32, 32), 3, arguments={"padding": 1}, **LAST_HALF),
    "bfloat16": Case((32, 32), dtype="bfloat16"),
    "3x3, batch 2, stride 2, last": Case(
        (32, 32), 3, batch=2, channels_last=True, arguments={"stride": 2}, slow=True
    ),
    "1x3, batch 2, stride 2, last": Case(
        (24, 20), (1, 3), batch=2, channels_last=True, arguments={"stride": 2}
    ),
    "no local": Case((32, 32), 3, arguments={"use_ksm_local": False}),
    "no spatial, softmax": Case((24, 24), (3, 1), arguments={**ONLY, "ksm_global_act": "softmax"}),
    "no gates, no local": Case((32, 24), arguments={**ONLY, "use_ksm_local": False}),
    "tanh, other gain": Case((24, 24), arguments={"ksm_global_act": "tanh", "att_multi": 1.5}),
    "planes": Case((32, 24), arguments={"param_ratio": 3}),
    "half of the bins": Case((32, 32), arguments={"param_reduction": 0.5}),
    "second slots": Case((24, 24), groups=12),
    "more than 256 attentions": Case((32, 32), groups=272),
    "odd part 27": Case((54, 18)),
    "odd channels out": Case((18, 21), groups=2),
    "odd channels in": Case((27, 18), groups=2, batch=2),
    "odd channels in, dense columns": Case((29, 24), groups=3),
    "odd channels in, 3x3": Case((19, 18), 3, groups=3, slow=True),
    "GroupNorm": Case((32, 32), arguments={"ksm_global_norm": "group"}),
    "dense rows": Case((32, 29), groups=17),
    "dense columns": Case((58, 24)),
    "dense both": Case((58, 29), groups=3),
    "2x2": Case((18, 20), 2, groups=5),
    "1x3": Case((24, 20), (1, 3)),
    "5x5": Case((20, 20), 5, groups=17, slow=True),
    "normed": Case((32, 32), normed=True, size=(9, 9)),
    "normed, features scaled": Case((32, 32), normed=True, size=(1, 2), batch=2),
    "tokens": Case((32, 24), over="tokens", size=(30, 1)),
    "tokens, batch 2, features scaled": Case((64, 32), over="tokens", size=(6, 1), batch=2),
    "tokens, half": Case((32, 64), over="tokens", size=(9, 1), batch=2, dtype="float16"),
    "linear": Case((32, 24), over="linear", size=(30, 1)),
    "linear, softmax, odd": Case(
        (33, 20),
        groups=4,
        over="linear",
        size=(3, 1),
        batch=2,
        arguments={"ksm_global_act": "softmax", "param_ratio": 2},
    ),
    "linear, tanh": Case(
        (20, 36), over="linear", size=(9, 1), arguments={"ksm_global_act": "tanh", "bias": False}
    ),
    "asymmetric padding": Case((24, 24), 2, arguments={"padding": "same"}),
    "odd channels out, 3x3": Case((18, 21), 3, slow=True),
    "dense both, 3x3": Case((58, 29), 3, groups=2, slow=True),
    "FFN, wider": Case((192, 768), 1, 64, over="tokens", size=(40, 1), slow=True),
    "FFN, narrower": Case((768, 192), 1, 64, over="tokens", size=(40, 1), slow=True),
    "layer of R50, 64 to 64, 3x3": Case((64, 64), 3, 64, slow=True, **LAST_HALF),
    "layer of R50, 512 to 128": Case((512, 128), 1, 64, slow=True),
    "layer of R50, 128 to 512": Case((128, 512), 1, 64, slow=True),
    "layer of R50, 512 to 512, 3x3": Case((512, 512), 3, 64, slow=True, **LAST_HALF),
}


def bands(channels: int, size: tuple[int, int], **given: Any) -> Case:
    names = "dtype", "channels_last", "batch", "offset"
    options = {k: given.pop(k) for k in names if k in given}
    arguments = {"use_fbm_if_k_in": [1], "fbm_cfg": given, "use_ksm_local": False}
    return Case((channels, 20), size=size, groups=5, arguments=arguments, **options)


BANDS: dict[str, Case] = {
    "symmetric rows": bands(18, (12, 8), k_list=[2, 4, 8]),
    "symmetric rows, last, batch 2": bands(
        18, (12, 8), k_list=[2, 4, 8], channels_last=True, batch=2
    ),
    "complex rows, batch 2": bands(18, (13, 15), k_list=[2, 4, 8], batch=2),
    "masks per call": bands(18, (12, 9), k_list=[2, 4, 8], masks="per_call"),
    "complex rows, half, last": bands(18, (13, 15), k_list=[2, 4, 8], **LAST_HALF),
    "large values, half": bands(18, (13, 15), k_list=[2, 4], dtype="float16", offset=2e4),
    "one band, weighted low-pass": bands(18, (9, 9), k_list=[2], lowfreq_att=True),
    "softmax over groups": bands(18, (8, 9), k_list=[2, 4], act="softmax", spatial_group=2),
    "a map per channel, last": bands(
        24, (8, 9), k_list=[8, 2], spatial_group=65, channels_last=True
    ),
    "tanh, wide conv": bands(18, (11, 7), k_list=[2, 3, 4, 8], act="tanh", spatial_kernel=5),
}


def memory(x: torch.Tensor, case: Case) -> torch.Tensor:
    x = x.to(getattr(torch, case.dtype))
    if case.over != "map":
        return x
    return x.contiguous(memory_format=torch.channels_last) if case.channels_last else x


@torch.no_grad()
def layer_errors(case: Case) -> dict[str, Any]:
    layer = case.layer()
    folded = case.folded(layer)
    x = case.input()
    fused = FusedConv2d(folded, getattr(torch, case.dtype), case.channels_last)
    made: list[torch.Tensor] = []
    assemble = fused.kernels
    fused.kernels = lambda *a: made.append(assemble(*a)) or made[0]  # type: ignore[method-assign]
    y = fused(memory(x, case))
    result: dict[str, Any] = {}
    kernels = made[0]
    layer.double()
    seen = case.average(x.double())
    local = layer.KSM_Local(seen) if layer.KSM_Local is not None else None
    expected = layer.kernels(layer.KSM_Global(seen), local, full=True)
    output = layer(x.double())
    if case.normed:
        scale, shift = torch.from_numpy(case.normalisation())
        expected = expected * scale[:, None, None, None]
        output = output * scale[:, None, None] + shift[:, None, None]
    assert folded.spectrum is not None
    stored = folded.spectrum.row_transform.slots
    stored = stored[stored >= 0]
    result["kernel"] = error(kernels, expected.reshape(kernels.shape))
    result["layer"] = error(y, output)
    result["memory format"] = (
        kernels.is_contiguous(memory_format=torch.channels_last) and y.shape == output.shape
        if case.channels_last
        else kernels.is_contiguous()
    )
    result["second slots"] = len(stored) > len(set(stored.tolist()))
    result["dense"] = (
        transform_of(folded.spectrum.rows) is None,
        column_transform(folded.spectrum.columns, folded.kernel_size[1]) is None,
    )
    result["sides"] = folded.channel_side, folded.filter_side
    result["attends"] = fused.attends
    result["wide"] = fused.get_buffer("groups").dtype == torch.int32
    return result


@torch.no_grad()
def band_errors(case: Case) -> dict[str, Any]:
    layer = case.layer()
    folded = case.folded(layer)
    x = case.input()
    fused = FusedConv2d(folded, getattr(torch, case.dtype), case.channels_last)
    assert fused.bands is not None
    assert folded.bands is not None
    seen = fused.bands(memory(x, case))
    expected = layer.double().FBM(x.double())
    return {
        "bands": error(seen, expected),
        "memory format": seen.is_contiguous(
            memory_format=torch.channels_last if case.channels_last else torch.contiguous_format
        ),
        "complex rows": folded.bands.complex_rows,
    }


class Block(torch.nn.Module):
    """Plain, dynamic and constant convolutions, BatchNorms, shortcuts, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 24, 3, padding=1)
        self.down = torch.nn.Conv2d(24, 24, 1, 2, groups=2)
        self.dynamic = enliven(FDConv2d(24, 24, 3, 2, padding=1, kernel_num=4))
        self.constant = enliven(FDConv2d(24, 24, 3, padding=1, kernel_num=4))
        self.twice = enliven(FDConv2d(24, 24, 1, kernel_num=4))
        self.last = torch.nn.Conv2d(24, 5, 2, padding="same")
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(24) for _ in range(5))
        for i, norm in enumerate(self.norms):
            generator = torch.Generator().manual_seed(i)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.5, generator=generator)
            norm.running_mean.normal_(0, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in self.constant.named_parameters():
            if "_fc" in name or "KSM_Local.conv" in name:
                parameter.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.stem(x)))
        y = torch.relu(self.norms[1](self.dynamic(x)))
        y = self.norms[2](self.constant(y)) + self.norms[3](self.down(x))
        y = torch.relu(self.norms[4](self.twice(y.relu_())))
        return self.last(self.twice(y).sigmoid() + y)


class InPlace(torch.nn.Module):
    """What changes in place between a convolution and what could be its end; no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 20, 1)
        self.plain = torch.nn.Conv2d(20, 20, 1)
        self.dynamic = enliven(FDConv2d(20, 20, 1, kernel_num=2, use_fbm_if_k_in=[]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        given = x.sigmoid() - 0.5
        y = self.plain(given)
        moved = y + given.relu_()  # `plain` read it before
        x[:, :7].mul_(-2)
        pooled = self.dynamic(x)  # not of the stem as it was
        seen = moved[:, 3:]
        moved += self.plain(pooled)
        return moved, pooled, seen, self.plain(x[0]).relu()


class FeedForward(torch.nn.Module):
    """Layers over tokens, with what would be the end of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = enliven(FDLinear(12, 20, kernel_num=2), 1)
        self.second = enliven(FDTokenConv(20, 12, kernel_num=2), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


@torch.no_grad()
def token_errors() -> dict[str, Any]:
    network = FeedForward().eval()
    x = lively_input((2, 12, 6, 1)).flatten(2).mT.contiguous()
    return {"errors": [error(fuse_network(network, x)(x), network.double()(x.double()))]}


@torch.no_grad()
def in_place_errors(channels_last: bool) -> dict[str, Any]:
    network = InPlace().eval()
    x = lively_input((1, 3, 4, 3))
    fused = fuse_network(network, x, channels_last=channels_last)
    return {"errors": [*map(error, fused(x), network.double()(x.double()))]}


@torch.no_grad()
def network_errors(dtype: torch.dtype, channels_last: bool) -> dict[str, Any]:
    network = Block().eval()
    x = lively_input((2, 3, 8, 6))
    fused = fuse_network(network, x, dtype=dtype, channels_last=channels_last)
    launched: list[str] = []

    def recorded(launch: Any, *given: Any) -> None:
        launched.append(launch.kernel)
        run_kernel(launch, *given)

    with patch.object(torch_ops, "run_kernel", recorded):
        actual = fused(x)
    counted = [one for one in launches(fused, x) if one.launch is not None]
    uses = [m for m in fused.network.modules() if type(m).__name__ == "_Use"]
    return {
        "network": error(actual, network.double()(x.double())),
        "convolutions": [type(use.layer).__name__ for use in uses],
        "relus": [use.relu for use in uses],
        "pooled": [use.hidden is not None for use in uses],
        "nodes": [str(n.target) for n in fused.network.graph.nodes if n.op == "call_function"],
        "launched": launched,
        "counted": [one.operator for one in counted],
        "dtype": str(actual.dtype),
    }


@torch.no_grad()
def operator_checks() -> dict[str, Any]:
    """What PyTorch asks of an operator: a true schema, a fake that tells shape and strides."""
    given: list[tuple[Any, tuple[Any, ...]]] = []
    arguments = {"use_fbm_if_k_in": [1], "fbm_cfg": {"k_list": [2, 4]}}
    case = Case((18, 20), groups=5, size=(12, 8), arguments=arguments)
    alone = {**ONLY, "ksm_global_act": "softmax"}
    softmax = FDConv2d(18, 18, 1, kernel_num=3, **alone)
    layers = case.layer(), torch.nn.ReLU(), FDConv2d(20, 18, 1, kernel_num=3), softmax
    network = torch.nn.Sequential(*layers)
    operators = (
        "assemble_kernels attend_and_assemble pool finish_convolution attend modulate_bands".split()
    )
    for last in (False, True):
        with ExitStack() as stack:
            for name in operators:
                function = getattr(torch_ops, name)

                def record(*a: Any, function: Any = function) -> Any:
                    given.append((function, tuple(copy.deepcopy(a))))
                    return function(*a)

                stack.enter_context(patch.object(layer_module, name, record))
            x = lively_input((1, 18, 12, 8))
            fuse_network(network.eval(), x, dtype=torch.float16, channels_last=last)(x)
    for operator, call in given:
        torch.library.opcheck(operator, call, test_utils=("test_schema", "test_faketensor"))
    return {"operators": sorted({operator._name for operator, _ in given})}


NETWORKS: dict[str, Callable[[], dict[str, Any]]] = {
    "network": lambda: network_errors(torch.float32, channels_last=False),
    "network, half, last": lambda: network_errors(torch.float16, channels_last=True),
    "in place": lambda: in_place_errors(channels_last=False),
    "in place, last": lambda: in_place_errors(channels_last=True),
    "feed-forward network": token_errors,
    "operators": operator_checks,
}


def run(name: str) -> dict[str, Any]:
    if name in LAYERS:
        return layer_errors(LAYERS[name])
    if name in BANDS:
        return band_errors(BANDS[name])
    return NETWORKS[name]()


def main() -> None:
    # Also fills new memory with NaN, so that nothing reads what nothing wrote.
    torch.use_deterministic_algorithms(True)
    results = {}
    for name in sys.argv[1:]:
        start = time.perf_counter()
        torch.manual_seed(0)  # each case draws the same layer, whichever run before it
        try:
            results[name] = run(name)
        except Exception:
            results[name] = {"failed": traceback.format_exc(limit=-6)}
        results[name]["seconds"] = round(time.perf_counter() - start, 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
