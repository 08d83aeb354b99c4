"""Networks side by side on one GPU: as published, compiled, fused, plain; ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import network_seconds
from fdconv_deploy.folding.cuda import CapturedNetwork, FusedNetwork, fuse_network
from fdconv_deploy.nn import FDConv2d, ResNet

SIZE = 512
BATCHES = 1, 8, 32
TYPES = torch.float16, torch.float32


class LastFeature(nn.Module):
    """A backbone that gives its last feature map alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]


def _pair(dry: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """An FDConv network, its baseline, and one image."""
    torch.manual_seed(0)
    if dry:
        dynamic = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), FDConv2d(32, 32, 1, kernel_num=4))
        plain = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 1))
        with torch.no_grad():
            for name, parameter in dynamic.named_parameters():
                if "KSM" in name and parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
        return dynamic.eval(), plain.eval(), torch.randn(1, 3, 12, 10)
    from benchmarks.networks import backbone, trained_like

    dynamic, plain = (
        trained_like(LastFeature(ResNet(backbone(50, groups)))) for groups in (64, None)
    )
    return dynamic, plain, torch.randn(1, 3, SIZE, SIZE)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.double().cpu().abs().max())


class _Networks:
    def __init__(self, record: Any, dry: bool) -> None:
        self.record, self.dry = record, dry
        self.device = "cpu" if dry else "cuda"
        self.dynamic, self.plain, self.image = _pair(dry)
        with torch.no_grad():
            double = copy.deepcopy(self.dynamic).double().to(self.device)
            self.expected = double(self.image.double().to(self.device)).cpu()

    def batch(self, size: int) -> Tensor:
        """Copies of the image: any row of the answer has the same reference."""
        return self.image.repeat(size, 1, 1, 1).to(self.device)

    def add(
        self, backend: str, dtype: torch.dtype, size: int,
        run: Callable[[Tensor], Tensor], x: Tensor, *, dynamic: bool = True,
    ) -> None:  # fmt: skip
        with torch.no_grad():
            y = run(x)
            error = _error(y[-1:], self.expected) if dynamic else None
            seconds = network_seconds(lambda: run(x))
        row = {
            "backend": backend,
            "dtype": str(dtype).split(".")[1],
            "batch": size,
            "ms": seconds * 1e3,
            "error": error,
        }
        self.record.content["networks"].append(row)
        print(f"  {backend}, {row['dtype']}, batch {size}: {row['ms']:.3f} ms", flush=True)

    def fused(self, dtype: torch.dtype, size: int) -> None:
        last = dtype is torch.float16
        network = fuse_network(self.dynamic, self.image, dtype=dtype, channels_last=last)
        x = self.batch(size)
        if self.dry:
            self.add("FDConv, fused kernels", dtype, size, network, x)
            return
        captured = CapturedNetwork(network, x)
        self.add("FDConv, fused kernels, CUDA graph", dtype, size, captured, x)

    def baseline(self, dtype: torch.dtype, size: int) -> None:
        last = dtype is torch.float16
        plain = copy.deepcopy(self.plain).to(self.device, dtype)
        if last:
            plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network, x = FusedNetwork(plain, dtype, last), self.batch(size)
        if self.dry:
            self.add("baseline", dtype, size, network, x, dynamic=False)
            return
        captured = CapturedNetwork(network, x)
        self.add("baseline, CUDA graph", dtype, size, captured, x, dynamic=False)

    def eager(self, dtype: torch.dtype, size: int, compiled: bool = False) -> None:
        network: Any = copy.deepcopy(self.dynamic).to(self.device)
        if compiled:
            network = torch.compile(network)

        def run(x: Tensor) -> Tensor:
            # As published, half precision is autocast: its Fourier transforms have no other.
            with torch.autocast(self.device, torch.float16, enabled=dtype is torch.float16):
                return network(x)

        name = "FDConv, torch.compile" if compiled else "FDConv, as published, eager"
        self.add(name, dtype, size, run, self.batch(size))

    def onnxruntime(self, size: int) -> None:
        import onnxruntime

        provider = "CPUExecutionProvider" if self.dry else "CUDAExecutionProvider"
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise RuntimeError(f"ONNX Runtime has no {provider} here, only {available}")
        from fdconv_deploy.export.api import export_module

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "bundle"
            export_module(self.dynamic, self.image.repeat(size, 1, 1, 1), folder)
            (graph,) = folder.glob("*.onnx")
            options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
            provided = provider if self.dry else (provider, options)
            session = onnxruntime.InferenceSession(graph, providers=[provided])
            assert session.get_providers()[0] == provider
            x = self.batch(size).cpu().numpy().astype(np.float32)
            feed = {session.get_inputs()[0].name: x}

            def run(_x: Tensor) -> Tensor:
                return torch.from_numpy(np.asarray(session.run(None, feed)[0]))

            label = f"FDConv, ONNX Runtime {provider.removesuffix('ExecutionProvider')}"
            self.add(label, torch.float32, size, run, self.batch(size))


def measure_networks(record: Any, dry: bool) -> None:
    """Into ``record``, the most telling first."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    prepared: list[_Networks] = []
    record.attempt("building the networks", lambda: prepared.append(_Networks(record, dry)))
    if not prepared:
        return
    networks = prepared[0]
    batches = BATCHES[:1] if dry else BATCHES
    parts: list[tuple[str, Callable[[], None]]] = []
    for size in batches:
        for dtype in TYPES:
            what = f"{dtype}, batch {size}"
            parts += [
                (f"fused, {what}", lambda d=dtype, s=size: networks.fused(d, s)),
                (f"baseline, {what}", lambda d=dtype, s=size: networks.baseline(d, s)),
            ]
            if not (dry and dtype is torch.float16):
                parts.append(
                    (f"as published, {what}", lambda d=dtype, s=size: networks.eager(d, s))
                )
    parts += [
        (f"ONNX Runtime, batch {s}", lambda s=s: networks.onnxruntime(s)) for s in batches[:2]
    ]
    if not dry:
        # Compiling takes minutes: last.
        parts += [
            (f"torch.compile, {d}", lambda d=d: networks.eager(d, 1, compiled=True)) for d in TYPES
        ]
    for what, run in parts:
        record.attempt(what, run)
        if not dry:
            torch.cuda.empty_cache()
