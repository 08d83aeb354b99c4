"""A YOLO network with FDConv layers as one .onnx file that Ultralytics itself opens.

Nothing of Ultralytics is imported to export a network that is in memory: its networks are known
by what they hold. What is set on the head, what outputs are called and what the file's metadata
says is what Ultralytics' own exporter does and its `AutoBackend` reads (8.4.190).
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.api import export_module
from fdconv_deploy.export.graph import check_one_file
from fdconv_deploy.export.options import ExportOptions, check_size
from fdconv_deploy.export.targets.onnx_file import check_output
from fdconv_deploy.export.validation.reference import answer_of
from fdconv_deploy.export.validation.sample_inputs import Picture
from fdconv_deploy.sample_images import prepared_batch, sample_batch
from fdconv_deploy.version import __version__

INPUT = "images"
# What a network is trained at where its arguments do not say.
_IMGSZ = 640


def export_ultralytics(
    model: Any,
    output: str | os.PathLike[str],
    *,
    imgsz: int | tuple[int, int] | None = None,
    batch: int = 1,
    pictures: Sequence[Picture] = (),
    tolerance: float | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a YOLO network with FDConv layers for Ultralytics: ``YOLO("model.onnx")``.

    The file holds its weights and the FDConv operators' bodies, so that stock ONNX Runtime (1.26
    and newer) runs it, inside Ultralytics or elsewhere. Each BatchNorm is folded into the
    convolution or FDConv layer before it; Ultralytics' ``fuse()`` is not called.

    Args:
        model: ``YOLO("best.pt")``, its network ``YOLO("best.pt").model``, or the file's path,
            which Ultralytics then loads: that runs what the file holds, so only for files you
            trust. FDConv layers may be `FDConv2d` or those of a copy of the published class. It
            is left as it is.
        output: the file to write, ``*.onnx``.
        imgsz: height and width in pixels, or one number for both; what the network was trained
            at if not given. Multiples of the network's stride.
        batch: images at a time.
        pictures: ``(H, W, 3)`` uint8 RGB images of any size to compare the file with the network
            on; packaged pictures if not given.
        tolerance: largest error that is kept, as a share of the largest value; 1e-4 if not given.
        overwrite: replace a file that is there.
        progress: called with a sentence as each step begins.

    Returns:
        The file's path.

    Raises:
        ExportError: it is no network of Ultralytics', the size does not suit it, ``output`` is in
            the way, or the file is not equal to the network.
        UnsupportedLayerError: an FDConv layer is a variant of the published one.
    """
    options = ExportOptions(batches=[batch], tolerance=tolerance, progress=progress)
    path = Path(output)
    check_output(path, overwrite=overwrite)
    source = _network(model)
    network = _in_export_mode(source)
    size = _size(network, imgsz)
    # Ultralytics' own: pixels from 0 to 1, of as many channels as the network takes.
    channels = _channels(network)
    preprocessing = Preprocessing(mean=(0.0,) * channels, std=(255.0,) * channels)
    if len(pictures):
        rows = prepared_batch(pictures, size, preprocessing)[np.arange(batch) % len(pictures)]
    else:
        rows = sample_batch(batch, size, preprocessing)
    example = torch.from_numpy(rows)
    # In the order in which the graph has them.
    expected = [leaf.numpy() for leaf in pytree.tree_leaves(answer_of(network, example))]
    names = [f"output{place}" for place in range(len(expected))]
    with tempfile.TemporaryDirectory(prefix="fdconv-export-") as scratch:
        folder = Path(scratch) / "bundle"
        bundle = export_module(
            network, example, folder, options, input_name=INPUT, output_names=names
        )
        graph = onnx.load(str(bundle.model_path(batch)))
    for key, value in _metadata(network, size, batch).items():
        graph.metadata_props.add(key=key, value=str(value))
    options.say("writing one file, and checking it against the network")
    check_one_file(graph, "Export a bundle by export_module instead.")
    data = graph.SerializeToString()
    end2end = bool(getattr(network, "end2end", False))
    answers = dict(zip(names, expected, strict=True))
    _prove(data, example, answers, options.allowed, 2 if end2end else 1)
    write_atomically(path, data)
    return path


def _network(model: Any) -> nn.Module:
    """The network of a model, or of a file of one."""
    if isinstance(model, str | os.PathLike):
        try:
            from ultralytics import YOLO
        except ImportError as error:
            raise ExportError(
                "a YOLO checkpoint holds pickled modules, which Ultralytics itself has to load: "
                "pip install ultralytics, or give the network."
            ) from error
        model = YOLO(os.fspath(model))
    # Ultralytics' YOLO is a module around a network, whose own `model` is its list of layers.
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module) and isinstance(getattr(inner, "model", None), nn.Module):
        model = inner
    missing = [name for name in ("model", "stride", "names", "task") if not hasattr(model, name)]
    if not isinstance(model, nn.Module) or missing:
        what = f", but has no {', '.join(missing)}" if isinstance(model, nn.Module) else ""
        raise ExportError(
            f"{type(model).__name__} is no network of Ultralytics'{what}. Give YOLO('best.pt') or "
            "its .model; export_module exports any other network."
        )
    return model


def _in_export_mode(source: nn.Module) -> nn.Module:
    """A copy, of which heads answer with what predictors read and nothing else."""
    network = copy.deepcopy(source).cpu().float().eval()
    for parameter in network.parameters():
        parameter.requires_grad = False
    if isinstance(getattr(type(network), "end2end", None), property):
        network.end2end = False  # type: ignore[assignment]  # the predictor does the suppression
    for module in network.modules():
        if isinstance(getattr(module, "export", None), bool):
            module.export, module.format = True, "onnx"  # type: ignore[assignment]
            for name, value in (("dynamic", False), ("shape", None)):
                if hasattr(module, name):  # anchors are made anew for the export's size
                    setattr(module, name, value)
    return network


def _described(network: Any, kind: str, key: str, default: Any) -> Any:
    """An entry of a network's ``args`` or ``yaml``, if it has such."""
    entries = getattr(network, kind, None)
    return entries.get(key, default) if isinstance(entries, Mapping) else default


def _size(network: Any, imgsz: int | tuple[int, int] | None) -> tuple[int, int]:
    if imgsz is None:
        imgsz = _described(network, "args", "imgsz", _IMGSZ)
    size = (imgsz, imgsz) if isinstance(imgsz, int) else (int(imgsz[0]), int(imgsz[1]))
    check_size(size)
    stride = _stride(network)
    if any(side % stride for side in size):
        near = " and ".join(str(max(stride, round(side / stride) * stride)) for side in set(size))
        raise ExportError(
            f"imgsz must be multiples of the network's stride, {stride}, and is "
            f"{size[0]}x{size[1]} (height x width). Near it: {near}."
        )
    return size


def _stride(network: Any) -> int:
    return int(max(torch.as_tensor(network.stride).reshape(-1).tolist()))


def _channels(network: Any) -> int:
    return int(_described(network, "yaml", "channels", 3))


def _metadata(network: Any, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """What `AutoBackend` reads, and where the file comes from."""
    head: Any = network.model[-1] if isinstance(network.model, nn.Sequential) else network.model
    names = network.names
    kind = str(_described(network, "yaml", "yaml_file", "YOLO"))
    found = {
        "description": f"{Path(kind).stem} model with FDConv layers",
        "author": f"FDConv Deploy {__version__}",
        "date": datetime.now(timezone.utc).isoformat(),
        "stride": _stride(network),
        "task": network.task,
        "head": type(head).__name__,
        "batch": batch,
        "imgsz": list(size),
        "names": dict(names) if isinstance(names, Mapping) else dict(enumerate(names)),
        "args": {"batch": batch, "dynamic": False, "nms": False},
        "channels": _channels(network),
        "end2end": bool(getattr(network, "end2end", False)),
    }
    with contextlib.suppress(PackageNotFoundError):
        found["version"] = version("ultralytics")
    if network.task == "pose":
        found["kpt_shape"] = list(head.kpt_shape)
        if hasattr(network, "kpt_names"):
            found["kpt_names"] = network.kpt_names
    return found


def _prove(
    data: bytes, example: Tensor, expected: Mapping[str, NDArray], tolerance: float, axis: int
) -> None:
    """Run the finished file, and refuse it where any channel differs from the network's.

    Channel by channel, since boxes in pixels and scores below 1 share a tensor: of all of it, an
    error of 0.06 in a score would be 1e-4 of the largest box.

    Args:
        axis: of the channels.
    """
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    answers = session.run(list(expected), {INPUT: example.numpy()})
    for found, (name, tensor) in zip(answers, expected.items(), strict=True):
        others = tuple(a for a in range(tensor.ndim) if a != min(axis, tensor.ndim - 1))
        largest = np.maximum(np.abs(tensor).max(axis=others), 1.0)
        errors = np.abs(found.astype(np.float64) - tensor).max(axis=others) / largest
        channel = int(errors.argmax())
        if not errors[channel] <= tolerance:
            raise ExportError(
                f"the exported file is not equal to the network: channel {channel} of {name!r} "
                f"differs by {errors[channel]:.1e} of its largest value (of 1 where that is less), "
                f"{tolerance:.0e} is allowed. Nothing was kept. Compare on pictures of the kind "
                "the network was trained on (pictures=[...])."
            )
