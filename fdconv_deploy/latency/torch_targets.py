"""A checkpoint in PyTorch: as published, compiled, folded, or folded and fused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency.images import images
from fdconv_deploy.latency.targets import Side, UnavailableError
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor


def load(side: Side) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The side's network, in eval mode on the CPU, and what it is run on.

    :raises FDConvError: the checkpoint cannot be read, or its input's size is not known.
    """
    torch.set_num_threads(side.threads)
    network = load_checkpoint(
        side.source,
        config=Path(side.config) if side.config else None,
        overrides=side.overrides,
        weights=side.weights,
        require_fdconv=False,
    )
    architecture = network.architecture
    own = (
        network.architecture.published_size
        if isinstance(network, Detector)
        else network.architecture.test.crop_size
    )
    size = side.size or own
    if size is None:
        raise FDConvError(
            f"{Path(side.source).name} was tested on whole images and records no size. Say which: "
            "--size 512x512, or give a bundle beside it."
        )
    x = torch.from_numpy(images(side.batch, size, architecture.preprocessing, side.image))
    if isinstance(network, Detector):
        return network, (x, torch.tensor([size] * side.batch, dtype=torch.float32))
    return network, (x,)


def open_checkpoint(side: Side) -> tuple[Callable[[], Any], str, dict[str, Any]]:
    """What runs the network once, on which device, and facts for the report.

    On a GPU where PyTorch sees one; inputs and answers are in host memory then, too, as a
    bundle's are.
    """
    network, inputs = load(side)
    size = inputs[0].shape[2], inputs[0].shape[3]
    details = {"backend": side.backend, "choice": f"PyTorch {torch.__version__}", "size": size}
    if side.whole:
        return _whole(side, network, size), "cpu", details
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = _variant(side.backend, network, inputs, device)

    def run() -> Any:
        # Outside inference mode PyTorch would keep every layer's input for a backward pass.
        with torch.inference_mode():
            return _on_host(made(*(x.to(device) for x in inputs)))

    return run, device, details


def _variant(
    backend: str, network: nn.Module, inputs: tuple[Tensor, ...], device: str
) -> Callable[..., Any]:
    if backend == "fused":
        from fdconv_deploy.folding.cuda.network import fuse_network, require_cuda

        require_cuda()
        if len(inputs) > 1:
            raise UnavailableError("Backend 'fused' takes networks of one input, not detectors.")
        return fuse_network(network, inputs[0])
    if backend == "folded":
        from fdconv_deploy.folding.network import fold_network

        return fold_network(network, inputs).to(device)
    network = network.to(device)
    return torch.compile(network) if backend == "compile" else network


def _whole(side: Side, network: nn.Module, size: tuple[int, int]) -> Callable[[], Any]:
    from fdconv_deploy.evaluation import torch_detector as detector_side
    from fdconv_deploy.evaluation import torch_segmentor as torch_side
    from fdconv_deploy.latency.images import picture

    if side.backend != "eager":
        raise UnavailableError(
            f"A checkpoint's whole request is timed in backend 'eager' only; this is {side.name}."
        )
    assert isinstance(network, Segmentor | Detector)
    path = Path(side.source)
    image = picture(size, network.architecture.preprocessing, side.image)
    if isinstance(network, Detector):
        detect = detector_side.torch_side(network, path, size=size).answer
        return lambda: detect(image)
    segment = torch_side.torch_side(network, path, size=size).answer
    return lambda: segment(image)


def _on_host(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.cpu()
    return tuple(_on_host(part) for part in answer)
