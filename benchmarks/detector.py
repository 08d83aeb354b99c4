"""A full-size detector, exported and run: ``python -m benchmarks.detector``.

By default Mask R-CNN over ResNet-50-FPN with FDConv, kernel_num 64, 80 classes, at 800×1344,
with random weights that find objects. From a checkpoint file to a proved bundle, then the
bundle's objects beside the PyTorch network's on pictures the export did not see: memory and
seconds of either in a process of its own, and how far the answers are apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.cases import add_size_argument, add_width_arguments
from benchmarks.networks import backbone, lively_heads, trained_like
from benchmarks.options import script
from benchmarks.records import FOLDER, write_json
from export.detection_parity import compare_detections, perturbed
from export.detector_inputs import made_up_detector_inputs
from fdconv_deploy.benchmark import machine
from fdconv_deploy.checkpoints import load_detector, save_checkpoint
from fdconv_deploy.detector_architecture import DetectorArchitecture, FPNConfig, MaskHeadConfig
from fdconv_deploy.errors import ExportError
from fdconv_deploy.nn.detection import Detector, build_detector
from fdconv_deploy.runtime import open_session

Inputs = tuple[Tensor, Tensor]
Answer = dict[str, NDArray]

# What is asked for: gigabytes, and how far scores and masks may be apart.
LARGEST_GB, SCORES_WITHIN, MASKS_WITHIN = 8.0, 1e-4, 1e-3


def build(width: int, *, masks: bool = True, kernel_num: int = 64) -> Detector:
    """The published detector at ``width`` (64), which finds objects on street scenes."""
    torch.manual_seed(0)
    architecture = DetectorArchitecture(
        backbone=backbone(50, kernel_num, width),
        neck=FPNConfig(in_channels=tuple(4 * width * 2**stage for stage in range(4))),
        mask_head=MaskHeadConfig() if masks else None,
    )
    network = build_detector(architecture)
    trained_like(network.backbone)
    images, _ = made_up_detector_inputs(1, (416, 672), architecture.preprocessing)
    return lively_heads(network, images)


def _pictures(size: tuple[int, int], count: int, preprocessing: Any) -> list[Inputs]:
    return [
        made_up_detector_inputs(1, size, preprocessing, seed=seed) for seed in range(1, count + 1)
    ]


def _export(spec: dict[str, Any], file: Path, bundle: Path) -> dict[str, Any]:
    from export import export_checkpoint

    start = time.perf_counter()
    export_checkpoint(file, bundle, size=tuple(spec["size"]), progress=_say)
    return {"seconds": time.perf_counter() - start}


def _network(spec: dict[str, Any], file: Path, answers: Path) -> dict[str, Any]:
    network = load_detector(file, require_fdconv=False)
    pictures = _pictures(spec["size"], spec["pictures"], network.architecture.preprocessing)

    def run(inputs: Inputs) -> Answer:
        images, sizes = inputs
        return _ask(network, {"images": images.numpy(), "sizes": sizes.numpy()})

    return _timed(run, pictures, spec["repeats"], answers)


def _bundle(spec: dict[str, Any], path: Path, answers: Path) -> dict[str, Any]:
    with open_session(path, backend="onnxruntime-cpu") as session:
        detector = session.bundle.manifest.detector
        assert detector is not None
        pictures = _pictures(spec["size"], spec["pictures"], detector.preprocessing)

        def run(inputs: Inputs) -> Answer:
            return dict(session.run_detector(*(tensor.numpy() for tensor in inputs)))

        return _timed(run, pictures, spec["repeats"], answers)


def _timed(
    run: Callable[[Inputs], Answer], pictures: list[Inputs], repeats: int, answers: Path
) -> dict[str, Any]:
    """Run every picture, keep the answers, and time the first one again and again."""
    _save(answers, map(run, pictures))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(pictures[0])
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds)}


def _rounding(spec: dict[str, Any], file: Path, answers: Path) -> dict[str, Any]:
    """The network's answers to one picture, changed by a millionth."""
    network = load_detector(file, require_fdconv=False)
    pictures = _pictures(spec["size"], spec["pictures"], network.architecture.preprocessing)
    images, sizes = (tensor.numpy() for tensor in pictures[spec["picture"]])
    answered = perturbed(partial(_ask, network), {"images": images, "sizes": sizes})
    _save(answers, islice(answered, spec.get("tries")))
    return {}


def _ask(network: Detector, feed: Mapping[str, NDArray]) -> Answer:
    with torch.inference_mode():
        outputs = network(*map(torch.from_numpy, feed.values()))
    return {n: o.numpy() for n, o in zip(network.output_names, outputs, strict=True)}


def _save(path: Path, answers: Iterable[Mapping[str, NDArray]]) -> None:
    named = {f"{i}.{n}": v for i, answer in enumerate(answers) for n, v in answer.items()}
    np.savez(path, **named)  # type: ignore[arg-type]


def _load(path: Path) -> list[Answer]:
    with np.load(path) as file:
        count = len({name.split(".")[0] for name in file.files})
        answers: list[Answer] = [{} for _ in range(count)]
        for name in file.files:
            index, output = name.split(".")
            answers[int(index)][output] = file[name]
    return answers


STEPS = {"rounding": _rounding, "export": _export, "network": _network, "bundle": _bundle}


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _step(name: str, spec: dict[str, Any], given: Path, made: Path) -> dict[str, Any]:
    """A step in a fresh process: its result, and the most memory it or a child of it held."""
    _say(name)
    command = [sys.executable, "-m", "benchmarks.detector", "--child", name, json.dumps(spec)]
    finished = subprocess.run(
        [*command, str(given), str(made)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=machine.ROOT,
    )  # fmt: skip
    return json.loads(finished.stdout.splitlines()[-1])


def _child(name: str, spec: str, given: str, made: str) -> None:
    result = STEPS[name](json.loads(spec), Path(given), Path(made))
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(one).ru_maxrss for one in who) / 1e6
    print(json.dumps(result | {"peak_gb": round(peak, 2)}))


def compare(
    expected: list[Answer],
    actual: list[Answer],
    score_thr: float,
    others: Callable[[int], Iterable[Answer]],
) -> dict[str, Any]:
    """Objects and errors over all pictures.

    Args:
        expected, actual: the network's and the bundle's answers.
        others: for a picture, what the network answers when it changes by rounding.

    Raises:
        ExportError: one side finds an object that the other does not, and that not by rounding.
    """
    errors: dict[str, float] = {}
    objects = classes = shared = 0.0
    for index, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        count = int(theirs["count"][0])
        for output in compare_detections(ours, theirs, score_thr, others(index)):
            errors[output.name] = max(errors.get(output.name, 0), output.max_abs)
            shared += (output.argmax_agreement or 0) * count
        objects += count
        classes += len(set(theirs["labels"][0, :count].tolist()))
    return {
        "pictures": len(expected),
        "objects": int(objects),
        "on_both_sides": round(shared),
        "classes_per_picture": round(classes / len(expected), 1),
        "max_abs_error": {n: e for n, e in errors.items() if n not in ("labels", "count")},
    }


def _own(answer: Answer, changed: Answer, score_thr: float) -> dict[str, float] | None:
    """The network's errors against itself; None if it finds other objects."""
    try:
        found = compare_detections(changed, answer, score_thr)
    except ExportError:
        return None
    return {o.name: o.max_abs for o in found if o.name not in ("labels", "count")}


def main() -> None:
    parser = script(__doc__, threads=False)
    add_size_argument(parser, (800, 1344))
    add_width_arguments(parser)
    parser.add_argument("--faster", action="store_true", help="Faster R-CNN, without masks")
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return
    machine.warn_if_busy()
    spec = {"size": options.size, "pictures": options.pictures, "repeats": options.repeats}
    where = machine.describe(torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="fdconv-detector-") as name:
        folder = Path(name)
        network = build(options.channels, masks=not options.faster, kernel_num=options.kernel_num)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        score_thr = network.architecture.test.rcnn.score_thr
        save_checkpoint(folder / "network.pth", network, network.architecture)
        del network
        export = _step("export", spec, folder / "network.pth", folder / "bundle")
        manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
        theirs = _step("network", spec, folder / "network.pth", folder / "network.npz")
        ours = _step("bundle", spec, folder / "bundle", folder / "bundle.npz")

        def others(picture: int) -> Iterator[Answer]:
            asked = {**spec, "picture": picture}
            _step("rounding", asked, folder / "network.pth", folder / "others.npz")
            yield from _load(folder / "others.npz")

        expected, actual = _load(folder / "network.npz"), _load(folder / "bundle.npz")
        parity = compare(expected, actual, score_thr, others)
        once = {**spec, "picture": 0, "tries": 1}
        _step("rounding", once, folder / "network.pth", folder / "changed.npz")
        own = _own(expected[0], _load(folder / "changed.npz")[0], score_thr)
        size = sum(file.stat().st_size for file in (folder / "bundle").iterdir())
    kind = "Faster R-CNN" if options.faster else "Mask R-CNN"
    title = f"{kind} R50-FPN, {options.size[0]}×{options.size[1]}, batch 1"
    errors = parity["max_abs_error"]
    held = {
        "memory": max(step["peak_gb"] for step in (export, ours)) <= LARGEST_GB,
        "scores": errors["scores"] <= SCORES_WITHIN,
        "masks": errors.get("masks", 0.0) <= MASKS_WITHIN,
    }
    record = {
        "kind": "detector",
        "title": title,
        "machine": where,
        "parameters": parameters,
        "channels": options.channels,
        "kernel_num": options.kernel_num,
        "size": list(options.size),
        "export": export,
        "nodes": manifest["graph"]["nodes.b1"],
        "bundle_mb": round(size / 1e6, 1),
        "pytorch": theirs,
        "onnxruntime": ours,
        "parity": parity,
        "network_with_image_changed_by_a_millionth": own,
        "held": held,
    }
    _print(record)
    write_json(options.json or FOLDER / f"{where['date'][:10]}-detector.json", record)
    if not all(held.values()):
        raise SystemExit("not held: " + ", ".join(name for name, kept in held.items() if not kept))


def _print(record: dict[str, Any]) -> None:
    print(f"{record['title']}, {record['parameters']:,} parameters")
    print(machine.say(record["machine"]))
    print(f"{'':14}{'seconds':>9}{'peak GB':>9}")
    for name in ("export", "pytorch", "onnxruntime"):
        print(f"{name:14}{record[name]['seconds']:9.2f}{record[name]['peak_gb']:9.2f}")
    parity = record["parity"]
    print(f"{record['nodes']} nodes, {record['bundle_mb']} MB")
    print(
        f"{parity['objects']} objects in {parity['pictures']} pictures, of "
        f"{parity['classes_per_picture']} classes per picture, {parity['on_both_sides']} on both "
        "sides (any others the network itself finds or not by rounding)"
    )
    for name, error in parity["max_abs_error"].items():
        own = record["network_with_image_changed_by_a_millionth"]
        said = f"largest error of {name}: {error:.1e}"
        if own:
            said += f"; the network itself, its image changed by a millionth: {own[name]:.1e}"
        print(said)


if __name__ == "__main__":
    main()
