"""Networks side by side on one GPU, each with its baseline: fused, ONNX Runtime, as published."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fdconv_deploy
from benchmarks.gpu.kernels import dtype_name
from benchmarks.gpu.timing import call_seconds, compute_seconds
from fdconv_deploy.folding.cuda import CapturedNetwork, FusedNetwork, fuse_network
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.network import fold_layers
from fdconv_deploy.nn import FDConv2d, ResNet
from fdconv_deploy.nn.fdconv import dynamic_layers

SIZE = 512
BATCHES = 1, 8, 32
TYPES = torch.float16, torch.float32
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2}
FDCONV, BASELINE = "FDConv", "baseline"


class LastFeature(nn.Module):
    """A backbone that gives its last feature map alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]


def pictures(count: int, size: int) -> Tensor:
    """``(count, 3, size, size)``: noise at every scale, the coarser the stronger, as in photos."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, size, size)
    cells = 2
    while cells <= size:
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        total += F.interpolate(noise, (size, size), mode="bilinear") * 4 / cells**0.5
        cells *= 2
    return (total - total.mean()) / total.std()


def _toy() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    few: dict[str, Any] = {"kernel_num": 4}
    dynamic = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), FDConv2d(32, 32, 1, **few), FDConv2d(32, 20, 1, **few)
    )
    plain = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 20, 1))
    with torch.no_grad():
        for name, parameter in dynamic.named_parameters():
            if "KSM" in name and parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return dynamic.eval(), plain.eval()


class Networks:
    """An FDConv network and its baseline, folded once, and what they answer in float64.

    Args:
        dry: a toy, on the CPU.
    """

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        if dry:
            self.of, self.image = (
                dict(zip((FDCONV, BASELINE), _toy(), strict=True)),
                pictures(1, 12),
            )
        else:
            from benchmarks.networks import backbone, trained_like

            images = pictures(6, 128)
            self.of = {
                name: trained_like(LastFeature(ResNet(backbone(50, groups))), images=images)
                for name, groups in ((FDCONV, 64), (BASELINE, None))
            }
            self.image = pictures(1, SIZE)
        self.folded: dict[str, FoldedConv] = fold_layers(self.of[FDCONV], self.image)
        self._fused: dict[tuple[str, torch.dtype, int], FusedNetwork] = {}
        self.expected = {}
        with torch.no_grad():
            for name, network in self.of.items():
                double = copy.deepcopy(network).double().to(self.device)
                self.expected[name] = double(self.image.double().to(self.device)).cpu()
                del double

    @property
    def layers(self) -> dict[str, tuple[FDConv2d, FoldedConv]]:
        """The first layer of each shape of kernel, by that shape."""
        found: dict[str, tuple[FDConv2d, FoldedConv]] = {}
        for name, layer in dynamic_layers(self.of[FDCONV]).items():
            assert isinstance(layer, FDConv2d)
            height, width = layer.kernel_size
            shape = f"{layer.in_channels}→{layer.out_channels} {height}×{width}"
            found.setdefault(shape, (layer, self.folded[name]))
        return found

    def batch(self, size: int) -> Tensor:
        """Copies of the image, so that any row of the answer has the same reference."""
        return self.image.repeat(size, 1, 1, 1)

    def fused(self, name: str, dtype: torch.dtype, size: int) -> FusedNetwork:
        """One of the two, its batches of this size in this type; made once."""
        key = name, dtype, size
        if key not in self._fused:
            self._fused[key] = fuse_network(
                self.of[name], self.batch(size), dtype=dtype,
                channels_last=dtype is torch.float16, folded=self.folded if name == FDCONV else {},
            )  # fmt: skip
        return self._fused[key]

    def error(self, name: str, actual: Tensor) -> float:
        """Of an answer's last image, relative to the largest value."""
        expected = self.expected[name]
        difference = (actual[-1:].double().cpu() - expected).abs().max()
        return float(difference / expected.abs().max())


def _row(
    networks: Networks, name: str, backend: str, dtype: torch.dtype, size: int, **more: Any
) -> dict[str, Any]:
    return {
        "network": name,
        "backend": backend,
        "dtype": dtype_name(dtype),
        "batch": size,
        "limit": LIMITS[dtype],
        **more,
    }


@torch.no_grad()
def _timed(
    networks: Networks, name: str, backend: str, dtype: torch.dtype, size: int,
    run: Callable[[], Tensor], x: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Compute apart from copies: ``run`` reads ``x`` on the GPU and leaves its answer there."""
    answer = run()
    error = networks.error(name, answer)
    copies: dict[str, float] = {}
    if not networks.dry:
        given, taken = x.cpu().pin_memory(), torch.empty_like(answer, device="cpu").pin_memory()
        copies["h2d_ms"] = compute_seconds(lambda: x.copy_(given, non_blocking=True), 0.2) * 1e3
        copies["d2h_ms"] = (
            compute_seconds(lambda: taken.copy_(answer, non_blocking=True), 0.2) * 1e3
        )
    seconds = compute_seconds(run)
    return _row(
        networks, name, backend, dtype, size, ms=seconds * 1e3, timed="compute", error=error,
        **copies,
    )  # fmt: skip


def fused(networks: Networks, name: str, dtype: torch.dtype, size: int) -> dict[str, Any]:
    """This package's kernels; the baseline is fused as far as it can be. In a CUDA graph."""
    network, x = networks.fused(name, dtype, size), networks.batch(size)
    if networks.dry:
        return _timed(networks, name, "fused", dtype, size, lambda: network(x), x)
    held = CapturedNetwork(network, x)
    held(x)  # its input is the image from here on
    return _timed(
        networks, name, "fused, CUDA graph", dtype, size, held.replay, x.to("cuda", dtype)
    )


def eager(
    networks: Networks, name: str, dtype: torch.dtype, size: int, compiled: bool = False
) -> dict[str, Any]:
    """PyTorch as it is; half precision is autocast, since Fourier transforms have no other."""
    network: Any = copy.deepcopy(networks.of[name]).to(networks.device)
    if compiled:
        network = torch.compile(network)
    x = networks.batch(size).to(networks.device)

    def run() -> Tensor:
        with torch.autocast(networks.device, torch.float16, enabled=dtype is torch.float16):
            return network(x)

    backend = "torch.compile" if compiled else "eager"
    return _timed(networks, name, backend, dtype, size, run, x)


def onnxruntime(networks: Networks, name: str, size: int) -> dict[str, Any]:
    """A bundle in float32, in the runtime's own CUDA provider; calls with their copies."""
    if find_spec("fdconv_deploy.export") is None:  # its folder in a clone has another place
        fdconv_deploy.__path__.append(str(Path(__file__).parents[2]))
    from fdconv_deploy.export.api import export_module
    from fdconv_deploy.runtime.backends import BackendOptions, select

    x = networks.batch(size)
    wanted = "onnxruntime-cpu" if networks.dry else "onnxruntime-cuda"
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_module(networks.of[name], x, Path(folder) / "bundle")
        backend, _, graphs = select(bundle, wanted, BackendOptions())
        graph: Any = graphs.get(size) or backend.load(bundle, size)
        feeds = {bundle.manifest.inputs[size][0].name: x.numpy()}
        (answer,) = graph.run(feeds).values()
        more = {}
        if hasattr(graph, "phases"):
            runs = [graph.phases(feeds) for _ in range(10)]
            for phase in ("h2d", "compute", "d2h"):
                more[f"{phase}_ms"] = median(getattr(run, phase) for run in runs) * 1e3
        return _row(
            networks, name, wanted, torch.float32, size,
            ms=call_seconds(lambda: graph.run(feeds)) * 1e3, timed="call",
            manner=getattr(graph, "manner", backend.operators),
            error=networks.error(name, torch.from_numpy(answer)), **more,
        )  # fmt: skip


Part = tuple[str, Callable[[], dict[str, Any]], float]


def in_pytorch(networks: Networks) -> Iterator[Part]:
    """What to measure, what that takes and about how many seconds; the most telling first."""
    dry = networks.dry
    for size in BATCHES[:1] if dry else BATCHES:
        for dtype in TYPES:
            what = f"{dtype_name(dtype)}, batch {size}"
            for name in (FDCONV, BASELINE):
                yield f"{name}, fused, {what}", partial(fused, networks, name, dtype, size), 15
            # Autocast on a CPU knows no float16 convolution.
            for name in () if dry and dtype is torch.float16 else (FDCONV, BASELINE):
                yield f"{name}, eager, {what}", partial(eager, networks, name, dtype, size), 10


def in_other_runtimes(networks: Networks) -> Iterator[Part]:
    """As `in_pytorch`: what takes long to prepare."""
    for name, seconds in ((FDCONV, 60), (BASELINE, 15)):
        yield f"{name}, ONNX Runtime, batch 1", partial(onnxruntime, networks, name, 1), seconds
    if not networks.dry:
        compiled = partial(eager, networks, FDCONV, torch.float16, 1, compiled=True)
        yield "FDConv, torch.compile", compiled, 150


def measure_networks(record: Any, parts: Iterator[Part]) -> None:
    """Into ``record``."""
    for what, run, seconds in parts:
        record.attempt(what, partial(record.add, "networks", run), seconds)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
