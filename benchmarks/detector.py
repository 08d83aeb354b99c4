"""A full-size detector, exported and run: ``python -m benchmarks.detector``.

By default Mask R-CNN over ResNet-50-FPN with FDConv, kernel_num 64, 80 classes, at 800×1344,
with random weights that find objects. From a checkpoint file to a proved bundle, then the
bundle's objects beside the PyTorch network's on pictures the export did not see: memory and
seconds of either in a process of its own, and how far the answers are apart.

Where a box is a little elsewhere its mask is another, too, so how far two sides' masks are apart
says little of how well either computes them. The network in float64 tells: how far each side's
whole answer is from its, and how far each side's masks are from those it has for the same boxes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import add_size_argument, add_width_arguments
from benchmarks.detector_steps import Answer, build, load, say
from benchmarks.options import script
from benchmarks.records import FOLDER, write_json
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.comparison import compare_detections
from fdconv_deploy.latency import machine

# What is asked for: gigabytes, how far scores and masks may be apart, and how far masks from
# those that the network has in float64 for the same boxes.
LARGEST_GB, SCORES_WITHIN, MASKS_WITHIN, SAME_BOXES_WITHIN = 8.0, 1e-4, 1e-3, 1e-4


def _step(name: str, spec: dict[str, Any], given: Path, made: Path) -> dict[str, Any]:
    """A step in a fresh process: its result, and the most memory it or a child of it held."""
    say(name)
    command = [sys.executable, "-m", "benchmarks.detector_steps", name, json.dumps(spec)]
    finished = subprocess.run(
        [*command, str(given), str(made)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=machine.ROOT,
    )  # fmt: skip
    return json.loads(finished.stdout.splitlines()[-1])


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


def compare_with_exact(
    sides: dict[str, list[Answer]], spec: dict[str, Any], folder: Path, score_thr: float
) -> dict[str, dict[str, Any]]:
    """How far each side is from the network in float64.

    Returns:
        Of each side ``answer``, the errors of its whole answer by output, None where it finds
        other objects; and of Mask R-CNN ``masks_of_the_same_boxes``, the largest error of its
        masks for its own boxes.
    """
    files = {"pytorch": "network.npz", "onnxruntime": "bundle.npz"}
    asked = {**spec, "answers": {name: str(folder / files[name]) for name in sides}}
    _step("exact", asked, folder / "network.pth", folder / "exact.npz")
    exact = load(folder / "exact.npz")
    result: dict[str, dict[str, Any]] = {}
    for name, answers in sides.items():
        others = [{k: v for k, v in each.items() if " of " not in k} for each in exact]
        result[name] = {"answer": errors_between(others, answers, score_thr)}
        masks = [
            float(np.abs(own["masks"] - each[f"masks of {name}"]).max())
            for own, each in zip(answers, exact, strict=True)
            if "masks" in own
        ]
        if masks:
            result[name]["masks_of_the_same_boxes"] = max(masks)
    return result


def errors_between(
    expected: list[Answer], actual: list[Answer], score_thr: float
) -> dict[str, float] | None:
    """Largest errors by output over all pictures; None if other objects are found."""
    errors: dict[str, float] = {}
    for theirs, ours in zip(expected, actual, strict=True):
        try:
            found = compare_detections(ours, theirs, score_thr)
        except ExportError:
            return None
        for output in found:
            if output.name not in ("labels", "count"):
                errors[output.name] = max(errors.get(output.name, 0), output.max_abs)
    return errors


def main() -> None:
    parser = script(__doc__, threads=False)
    add_size_argument(parser, (800, 1344))
    add_width_arguments(parser)
    parser.add_argument("--faster", action="store_true", help="Faster R-CNN, without masks")
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
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
            yield from load(folder / "others.npz")

        expected, actual = load(folder / "network.npz"), load(folder / "bundle.npz")
        parity = compare(expected, actual, score_thr, others)
        once = {**spec, "picture": 0, "tries": 1}
        _step("rounding", once, folder / "network.pth", folder / "changed.npz")
        own = errors_between(expected[:1], load(folder / "changed.npz"), score_thr)
        exact = compare_with_exact(
            {"pytorch": expected, "onnxruntime": actual}, spec, folder, score_thr
        )
        size = sum(file.stat().st_size for file in (folder / "bundle").iterdir())
    kind = "Faster R-CNN" if options.faster else "Mask R-CNN"
    title = f"{kind} R50-FPN, {options.size[0]}×{options.size[1]}, batch 1"
    errors = parity["max_abs_error"]
    held = {
        "memory": max(step["peak_gb"] for step in (export, ours)) <= LARGEST_GB,
        "scores": errors["scores"] <= SCORES_WITHIN,
        "masks": errors.get("masks", 0.0) <= MASKS_WITHIN,
        "masks of the same boxes": exact["onnxruntime"].get("masks_of_the_same_boxes", 0.0)
        <= SAME_BOXES_WITHIN,
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
        "from_float64": exact,
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
    for side, exact in record["from_float64"].items():
        told = [f"{name} {error:.1e}" for name, error in (exact["answer"] or {}).items()]
        if "masks_of_the_same_boxes" in exact:
            told.append(f"masks of the same boxes {exact['masks_of_the_same_boxes']:.1e}")
        print(f"{side} from float64: {', '.join(told) or 'finds other objects'}")


if __name__ == "__main__":
    main()
