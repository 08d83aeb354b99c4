"""One .onnx file in one runtime: ``python run.py RUNTIME MODEL FOLDER OUTPUT…``.

Run by ``python -m benchmarks.runtimes`` in an environment that holds the runtime and numpy and
nothing of this project. FOLDER holds ``scene*.npz``, inputs by name in the model's order, and gets
``answer*.npz``; OUTPUT… are the model's outputs, in its order.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
# One run: inputs by name to the outputs' answers, in the model's order.
Run = Callable[[Arrays], Sequence[Any]]


def onnxruntime(model: Path, names: list[str], example: Arrays) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(names, feeds)


def openvino(model: Path, names: list[str], example: Arrays) -> Run:
    from openvino import Core

    # In bfloat16 where the processor has it, unless float32 is asked for.
    compiled = Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(feeds: Arrays) -> list[Any]:
        found = compiled(feeds)
        return [found[name] for name in names]

    return run


def tract(model: Path, names: list[str], example: Arrays) -> Run:
    import tract as t

    read = t.onnx().load(str(model))
    inputs = [read.input_name(place) for place in range(read.input_count())]
    for place, name in enumerate(inputs):
        read.set_input_fact(place, f"{','.join(map(str, example[name].shape))},f32")
    ready = read.into_model().into_runnable()
    return lambda feeds: [v.to_numpy() for v in ready.run([feeds[name] for name in inputs])]


def reference(model: Path, names: list[str], example: Arrays) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model))
    return lambda feeds: evaluator.run(names, feeds)


def iree(model: Path, names: list[str], example: Arrays) -> Run:
    import iree.runtime as runtime
    import onnx
    from iree import compiler
    from iree.compiler.extras import onnx_importer as importer
    from iree.compiler.ir import Context

    info = importer.ModelInfo(onnx.load(str(model)))
    with Context() as context:
        module = info.create_module(context=context).operation
        importer.NodeImporter.define_function(info.main_graph, module).import_all()
        text = module.get_asm(assume_verified=True)
    options = ["--iree-llvmcpu-target-cpu=host"]
    code = compiler.compile_str(
        text, target_backends=["llvm-cpu"], input_type="onnx", extra_args=options
    )
    config = runtime.Config("local-task")
    loaded = runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code), config)
    entry = loaded[info.model_proto.graph.name]

    def run(feeds: Arrays) -> list[Any]:
        found = entry(*feeds.values())
        return [value.to_host() for value in (found if len(names) > 1 else [found])]

    return run


def tvm(model: Path, names: list[str], example: Arrays) -> Run:
    import onnx
    import tvm as t
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    built = t.compile(from_onnx(onnx.load(str(model))), target="llvm")
    machine = relax.VirtualMachine(built, t.cpu())

    def run(feeds: Arrays) -> list[Any]:
        found = machine["main"](*[t.runtime.tensor(value) for value in feeds.values()])
        return [value.numpy() for value in (found if len(names) > 1 else [found])]

    return run


def mnn(model: Path, names: list[str], example: Arrays) -> Run:
    from MNN import expr, nn

    converted = model.with_suffix(".mnn")
    # Not the script mnnconvert: it installs aliyun-log-python-sdk by the first pip on the path.
    convert = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    command = [sys.executable, "-c", convert, "-f", "ONNX", "--bizCode", "fdconv"]
    _call([*command, "--modelFile", model, "--MNNModel", converted])
    if not converted.exists():
        sys.exit("mnnconvert wrote nothing")
    manager = nn.create_runtime_manager(({"backend": "CPU", "precision": "high"},))
    # WINOGRAD_MEMORY_LEVEL 0: the larger tiles that it takes otherwise cost 2e-4.
    manager.set_hint(3, 0)
    net = nn.load_module_from_file(str(converted), list(example), names, runtime_manager=manager)

    def run(feeds: Arrays) -> list[Any]:
        inputs = [expr.const(value, list(value.shape), expr.NCHW) for value in feeds.values()]
        return [expr.convert(value, expr.NCHW).read() for value in net.forward(inputs)]

    return run


def ncnn(model: Path, names: list[str], example: Arrays) -> Run:
    import ncnn as n

    # The wheel's script asks for torch; the converter beside it does not.
    converter = next(Path(sys.prefix).rglob("site-packages/pnnx/pnnx"))
    shapes = ",".join(f"[{','.join(map(str, value.shape))}]" for value in example.values())
    _call([converter, model, f"inputshape={shapes}"])
    net = n.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(model.with_name(f"{model.stem}.ncnn.param")))
    net.load_model(str(model.with_name(f"{model.stem}.ncnn.bin")))

    def run(feeds: Arrays) -> list[Any]:
        with net.create_extractor() as extractor:
            for place, value in enumerate(feeds.values()):
                extractor.input(f"in{place}", n.Mat(value[0]))
            return [np.array(extractor.extract(f"out{i}")[1])[None] for i in range(len(names))]

    return run


def opencv(model: Path, names: list[str], example: Arrays) -> Run:
    import cv2

    net = cv2.dnn.readNetFromONNX(str(model))

    def run(feeds: Arrays) -> Sequence[Any]:
        for name, value in feeds.items():
            net.setInput(value, name)
        return net.forward(names)

    return run


def tensorrt_rtx(model: Path, names: list[str], example: Arrays) -> Run:
    """Parse and build, which works without a GPU; to run does not."""
    import ctypes

    import tensorrt_rtx_libs

    for library in sorted(Path(tensorrt_rtx_libs.__path__[0]).glob("*.so*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings as trt

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        sys.exit(parser.get_error(0).desc())
    if builder.build_serialized_network(network, builder.create_builder_config()) is None:
        sys.exit("no engine was built")
    return lambda feeds: []


def ultralytics(model: Path, names: list[str], example: Arrays) -> Run:
    """Its own loader, which a segmentor's ``YOLO(file, task="semantic")`` runs the file by."""
    import torch
    from ultralytics.nn.autobackend import AutoBackend

    loaded = AutoBackend(str(model), device=torch.device("cpu"), fp16=False)

    def run(feeds: Arrays) -> list[Any]:
        found = loaded(torch.from_numpy(feeds["images"]))
        return [v.numpy() for v in (found if isinstance(found, (list, tuple)) else [found])]

    return run


def mmdeploy(model: Path, names: list[str], example: Arrays) -> Run:
    """A model folder for the SDK, around the file; its logits are of the image's size."""
    from mmdeploy_runtime import Segmentor

    height, width = example["images"].shape[2:]
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    net = {"name": "fdconv", "net": model.name, "weights": "", "backend": "onnxruntime"}
    deploy = {
        "version": "1.3.1", "task": "Segmentor", "customs": [],
        "models": [{**net, "precision": "FP32", "batch_size": 1, "dynamic_shape": False}],
    }  # fmt: skip
    transforms = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "keep_ratio": False, "size": [width, height]},
        {"type": "Normalize", "mean": mean, "std": std, "to_rgb": True},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"], "meta_keys": ["img_shape", "pad_shape", "ori_shape"]},
    ]
    tasks = [
        {"name": "Preprocess", "type": "Task", "module": "Transform", "transforms": transforms,
         "input": ["img"], "output": ["prepared"]},
        {"name": "fdconv", "type": "Task", "module": "Net", "is_batched": False,
         "input": ["prepared"], "output": ["inferred"],
         "input_map": {"img": "images"}, "output_map": {"output": "logits"}},
        {"name": "postprocess", "type": "Task", "module": "mmseg", "component": "ResizeMask",
         "params": {"with_argmax": False, "num_classes": 11},
         "input": ["prepared", "inferred"], "output": ["mask"]},
    ]  # fmt: skip
    pipeline = {"pipeline": {"input": ["img"], "output": ["mask"], "tasks": tasks}}
    (model.parent / "deploy.json").write_text(json.dumps(deploy))
    (model.parent / "pipeline.json").write_text(json.dumps(pipeline))
    segmentor = Segmentor(str(model.parent), device_name="cpu")

    def run(feeds: Arrays) -> list[Any]:
        pixels = feeds["images"][0].transpose(1, 2, 0) * np.float32(std) + np.float32(mean)
        image = np.rint(pixels[:, :, ::-1]).astype(np.uint8)  # BGR, as OpenCV reads it
        return [segmentor(np.ascontiguousarray(image))[None]]

    return run


def netron(model: Path, names: list[str], example: Arrays) -> Run:
    """Drawn in Chromium; its telemetry is stopped from leaving."""
    import netron as viewer
    from playwright.sync_api import sync_playwright

    host, port = viewer.start(str(model), ("127.0.0.1", 0), browse=False)
    address = f"http://{host}:{port}"
    with sync_playwright() as driver:
        program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = opened.new_context()
        context.add_cookies([{"name": "consent", "value": "1", "url": address}])
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("g.graph-node", state="attached", timeout=300_000)
        opened.close()
    viewer.stop()
    return lambda feeds: []


def _call(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-2000:])


RUNTIMES: dict[str, Callable[[Path, list[str], Arrays], Run]] = {
    found.__name__: found
    for found in (onnxruntime, openvino, tract, reference, iree, tvm, mnn, ncnn, opencv,
                  tensorrt_rtx, ultralytics, mmdeploy, netron)
}  # fmt: skip


def main(runtime: str, model: str, folder: str, *names: str) -> None:
    scenes = sorted(Path(folder).glob("scene*.npz"))
    loaded = []
    for scene in scenes:
        with np.load(scene) as stored:
            loaded.append(dict(stored))
    run = RUNTIMES[runtime](Path(model), list(names), loaded[0])
    for scene, feeds in zip(scenes, loaded, strict=True):
        found = run(feeds)
        np.savez(
            scene.with_name(f"answer{scene.stem[5:]}.npz"), **dict(zip(names, found, strict=False))
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
