"""Every family of the paper at full size, file to bundle: ``python -m benchmarks.families``.

Each network, with FDConv and random weights that behave as trained ones, is written as a checkpoint
file and exported from it in a fresh process; then its time in ONNX Runtime, with native operators
and with stock ones, is set against the plain network's in the same process, in turns. NVIDIA's
parser is TensorRT-RTX's, which needs no GPU; RoiAlign is given to it as standard operators.

``error`` is each output's, as a share of its largest value; ``decided_otherwise`` how many of the
network's own decisions (a mask's bits, a choice of proposals) fall another way in the graph;
``worst_part`` the part between layers and decisions nearest to its limit, whose error is no other
layer's. Where an output errs by more than such a part may, ``float32_error`` says how far PyTorch
in float32 is from float64 on the same image.

``python -m benchmarks.families --only segformer_b2 --repeats 0`` leaves times out.
"""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.networks import lively_heads, trained_like
from benchmarks.options import script
from benchmarks.records import write_json
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    DetectorConfig,
    FDConvConfig,
    FPNConfig,
    HeadConfig,
    Mask2FormerHeadConfig,
    MaskDINOHeadConfig,
    MaskHeadConfig,
    MixVisionTransformerConfig,
    Preprocessing,
    ResNetConfig,
    SegformerHeadConfig,
    SegmentorConfig,
    SwinTransformerConfig,
    UPerHeadConfig,
)
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.tolerance import LAYER_TOLERANCE
from fdconv_deploy.latency import machine
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.sample_images import sample_detector_batch

Architecture = SegmentorConfig | DetectorConfig

_R50 = ResNetConfig()
_SWIN_B = SwinTransformerConfig(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_SWIN_L = SwinTransformerConfig(
    embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12
)


def _segmentor(backbone: BackboneConfig, kind: type[HeadConfig], **fields: Any) -> SegmentorConfig:
    head = kind(in_channels=backbone.widths, in_index=(0, 1, 2, 3), **fields)
    queries = not isinstance(head, UPerHeadConfig | SegformerHeadConfig)
    how = Preprocessing(size_divisor=32 if queries else 1)
    return SegmentorConfig(backbone=backbone, decode_head=head, preprocessing=how)  # type: ignore[arg-type]


def _uper(backbone: BackboneConfig) -> SegmentorConfig:
    return _segmentor(backbone, UPerHeadConfig, channels=512, num_classes=150)


def _mask2former(backbone: BackboneConfig, classes: int, queries: int) -> SegmentorConfig:
    return _segmentor(
        backbone, Mask2FormerHeadConfig, channels=256, num_classes=classes, num_queries=queries
    )


def _maskdino(backbone: BackboneConfig) -> SegmentorConfig:
    """As MaskDINO's ADE20K config: one stage, a softmax that ends with no object."""
    return _segmentor(
        backbone,
        MaskDINOHeadConfig,
        channels=256,
        num_classes=150,
        num_queries=100,
        two_stage=False,
        no_object=True,
        class_scores="softmax",
    )


# By name: the plain network, kernel_num of its FDConv layers, height and width.
NETWORKS: dict[str, tuple[Callable[[], Architecture], int, tuple[int, int]]] = {
    "segformer_b2": (
        lambda: _segmentor(
            MixVisionTransformerConfig(embed_dims=64, num_layers=(3, 4, 6, 3)),
            SegformerHeadConfig,
            channels=256,
            num_classes=150,
        ),
        64,
        (512, 512),
    ),
    "upernet_swin_b": (lambda: _uper(_SWIN_B), 64, (512, 512)),
    "upernet_convnext_t": (lambda: _uper(ConvNeXtConfig()), 32, (512, 512)),
    "mask_rcnn_convnext_t": (
        lambda: DetectorConfig(
            backbone=ConvNeXtConfig(),
            neck=FPNConfig(in_channels=ConvNeXtConfig().widths),
            mask_head=MaskHeadConfig(),
        ),
        32,
        (800, 1344),
    ),
    "mask_rcnn_r50": (
        lambda: DetectorConfig(backbone=_R50, mask_head=MaskHeadConfig()),
        64,
        (800, 1344),
    ),
    "mask2former_r50": (lambda: _mask2former(_R50, 19, 100), 64, (512, 1024)),
    "mask2former_swin_l": (lambda: _mask2former(_SWIN_L, 150, 200), 64, (640, 640)),
    "maskdino_r50": (lambda: _maskdino(_R50), 64, (512, 512)),
    "maskdino_swin_l": (lambda: _maskdino(_SWIN_L), 64, (512, 512)),
}


def _architecture(name: str, dynamic: bool) -> Architecture:
    make, kernel_num, _ = NETWORKS[name]
    plain = make()
    conv = FDConvConfig(kernel_num=kernel_num) if dynamic else None
    backbone = plain.backbone.model_copy(update={"conv": conv})
    return plain.model_copy(update={"backbone": backbone})


def _make(name: str, dynamic: bool, path: Path) -> dict[str, Any]:
    """Write the checkpoint file of a network that behaves as a trained one."""
    architecture = _architecture(name, dynamic)
    torch.manual_seed(0)
    network: torch.nn.Module
    if isinstance(architecture, DetectorConfig):
        network = Detector(architecture)
        trained_like(network.backbone)
        images, _ = sample_detector_batch(1, (416, 672), architecture.preprocessing)
        lively_heads(network, torch.from_numpy(images))
    else:
        network = Segmentor(architecture)
        trained_like(network)
    save_checkpoint(path, network, architecture)
    tensors = {id(t): t.numel() * t.element_size() for t in network.parameters()}
    buffers = sum(b.numel() * b.element_size() for b in network.buffers() if b.is_floating_point())
    return {"weights_mb": (sum(tensors.values()) + buffers) / 1e6}


def _export(name: str, dynamic: bool, file: Path, bundle: Path) -> dict[str, Any]:
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.export import export_checkpoint, export_network

    size, start = NETWORKS[name][2], time.perf_counter()
    if dynamic:
        export_checkpoint(file, bundle, size=size)
    else:
        export_network(load_checkpoint(file, require_fdconv=False), bundle, size=size)
    return {"seconds": time.perf_counter() - start}


def _float32(name: str, file: Path) -> dict[str, Any]:
    """How far the network in float32 is from itself in float64, on the image compared on."""
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.export.validation.reference import Observer
    from fdconv_deploy.export.validation.sample_inputs import network_of

    source = network_of(load_checkpoint(file), NETWORKS[name][2])
    observer = Observer(source.module, source.output_names, file.parent)
    observed = observer.answer(source.inputs[0].rows(1))
    exact = observer.in_double(observed)
    if exact is None:
        return {"float32_error": None}
    try:
        found = source.comparison.compare(observed.answers, exact)
    except ExportError as error:  # other objects
        return {"float32_error": str(error)}
    return {"float32_error": {parity.name: parity.max_rel for parity in found}}


def _times(repeats: int, threads: int, bundles: Path) -> dict[str, Any]:
    """Median milliseconds of each side, run in turns in this process, and of its processor."""
    from fdconv_deploy.runtime import open_session

    kinds = {"native": ("fdconv", True), "portable": ("fdconv", False), "plain": ("plain", True)}
    sessions = {
        kind: open_session(bundles / name, "onnxruntime-cpu", threads=threads, native=native)
        for kind, (name, native) in kinds.items()
    }
    manifest = sessions["plain"].bundle.manifest
    height, width = manifest.input.height, manifest.input.width
    images = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
    inputs: dict[str, Any] = {"images": images}
    if manifest.detector is not None:
        inputs["sizes"] = np.array([[height, width]], np.float32)
    clocks = {"ms": time.perf_counter, "processor_ms": time.process_time}
    seconds: dict[str, list[float]] = {f"{k}_{unit}": [] for k in sessions for unit in clocks}
    for turn in range(repeats + 1):
        for kind, session in sessions.items():
            starts = {unit: clock() for unit, clock in clocks.items()}
            session.run_batches(inputs)
            for unit, clock in clocks.items():
                if turn:
                    seconds[f"{kind}_{unit}"].append(clock() - starts[unit])
    for session in sessions.values():
        session.close()
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def _parse(graph: Path) -> dict[str, Any]:
    """What NVIDIA's parser says of a bundle's graph.

    Its plugin for RoiAlign wants a GPU when a graph is parsed: as where `fdconv build` finds no
    plugin, the operator is given as standard ones.
    """
    import onnx

    from fdconv_deploy.export.tensorrt.roi_align import without_roi_align

    libraries = import_module("tensorrt_rtx_libs")
    for library in sorted(Path(libraries.__path__[0]).glob("*.so*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    trt: Any = import_module("tensorrt_rtx_bindings")
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        model = onnx.load(str(graph))
        if any(node.op_type == "RoiAlign" for node in model.graph.node):
            graph = Path(folder) / "graph.onnx"
            onnx.save(
                without_roi_align(model), str(graph), save_as_external_data=True,
                location="graph.bin", size_threshold=1024,
            )  # fmt: skip
        del model
        logger = trt.Logger(trt.Logger.ERROR)
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = trt.Builder(logger).create_network(flag)
        parser = trt.OnnxParser(network, logger)
        taken = parser.parse_from_file(str(graph))
    said = f"taken, {network.num_layers} layers" if taken else parser.get_error(0).desc()
    return {"nvidia_parser": said if taken else f"refused: {said}"}


def _child(step: str, request: str, *paths: str) -> None:
    steps: dict[str, Callable[..., dict[str, Any]]]
    steps = {
        "make": _make, "export": _export, "float32": _float32, "times": _times, "parse": _parse,
    }  # fmt: skip
    result = steps[step](*json.loads(request), *map(Path, paths))
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(one).ru_maxrss for one in who) / 1e6
    print(json.dumps(result | {"peak_gb": peak}))


def _step(step: str, asked: list[Any], *paths: Path) -> dict[str, Any]:
    """A step in a fresh process, its most memory beside what it says."""
    command = [sys.executable, "-m", "benchmarks.families", "--child", step, json.dumps(asked)]
    finished = subprocess.run(
        [*command, *map(str, paths)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=machine.ROOT,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def measure(name: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    made = _step("make", [name, True], folder / "fdconv.pth")
    exported = _step("export", [name, True], folder / "fdconv.pth", folder / "fdconv")
    manifest = json.loads((folder / "fdconv" / "manifest.json").read_text())
    size = sum(file.stat().st_size for file in (folder / "fdconv").iterdir()) / 1e6
    errors = {one["name"]: one["max_rel"] for one in manifest["parity"]["batches"]["1"]}
    judged = manifest["graph"]["exactness"]["1"]
    part = judged["worst_layer"]
    graph = next((folder / "fdconv").glob("*.onnx"))
    row = {
        "name": name,
        "size": NETWORKS[name][2],
        "export_seconds": round(exported["seconds"], 1),
        "export_peak_gb": round(exported["peak_gb"], 2),
        "weights_mb": round(made["weights_mb"], 1),
        "bundle_over_weights": round(size / made["weights_mb"], 4),
        "nodes": next(v for k, v in manifest["graph"].items() if k.startswith("nodes.")),
        "error": errors,
        "decided_otherwise": sum(one.get("decided_otherwise", 0) for one in judged["whole"]),
        "worst_part": {"error": part["error"], "allowed": part["allowed"]},
        "nvidia_parser": _step("parse", [], graph)["nvidia_parser"],
    }
    if max(errors.values()) > LAYER_TOLERANCE:
        row["float32_error"] = _step("float32", [name], folder / "fdconv.pth")["float32_error"]
    (folder / "fdconv.pth").unlink()
    if repeats:
        _step("make", [name, False], folder / "plain.pth")
        _step("export", [name, False], folder / "plain.pth", folder / "plain")
        times = _step("times", [repeats, threads], folder)
        for kind in ("native", "portable"):
            for unit, called in (("ms", ""), ("processor_ms", "_processor")):
                over = times[f"{kind}_{unit}"] / times[f"plain_{unit}"]
                row[f"{kind}_over_plain{called}"] = round(over, 3)
        row |= {kind: round(value, 1) for kind, value in times.items() if kind.endswith("_ms")}
    return row


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each; 0 for none")
    parser.add_argument("--folder", type=Path, help="where to put files of gigabytes for a while")
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return
    machine.warn_if_busy()
    where = machine.describe(options.threads)
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="fdconv-families-") as folder:
            try:
                rows.append(measure(name, Path(folder), options.repeats, options.threads))
            except subprocess.CalledProcessError as error:
                rows.append({"name": name, "failed": f"{error.cmd[4]}: exit {error.returncode}"})
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            write_json(options.json, {"kind": "families", "machine": where, "rows": rows})


if __name__ == "__main__":
    main()
