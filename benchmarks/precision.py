"""What lower precision costs: ``python -m benchmarks.precision``.

Exports the packaged checkpoint in fp32, fp16 and int8 (unsigned for ONNX Runtime, signed for
TensorRT), segments the packaged held-out scenes and as many more drawn ones as ``--scenes``
says, and puts answers, errors, sizes and times side by side.

ONNX Runtime computes float16 graphs in float32 on a CPU and leaves out the rounding between
operators. The row ``fp16, each result rounded`` runs the same graph with every rounding in
its place, as a GPU would; that row is the one to judge float16's accuracy by. Neither says
anything about a GPU's speed. Int8 is calibrated on scenes that are scored nowhere.

Some scenes the trained network does not hold even in float32: noise of 1e-4 of its largest
value, less than half a step of float16, on the prepared image changes over one in a hundred of
its pixels. What any rounding does to those says nothing of that rounding; they are counted,
and the drawn scenes are scored with them and without.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks.options import script
from benchmarks.records import write_json
from examples.streets.scenes import CLASSES, draw_scene
from fdconv_deploy.demo import HELD_OUT_SEEDS, held_out, packaged_checkpoint
from fdconv_deploy.evaluation.datasets import read_mask
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.export.quantization.fp16 import rounding_model
from fdconv_deploy.runtime import Bundle, Session, open_session
from fdconv_deploy.runtime.bundle import sha256_of
from fdconv_deploy.runtime.images import read_image

CALIBRATION_SEEDS = range(5_000, 5_064)
FORMS = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8", "activations": "unsigned"},
    "int8, signed": {"precision": "int8", "activations": "signed"},
}
ROUNDED = "fp16, each result rounded"
NOISE = 1e-4
HELD = 0.99


@dataclass
class Tally:
    """One form on one set of scenes."""

    confusion: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    )
    same: int = 0
    pixels: int = 0
    max_abs: float = 0.0
    largest: float = 0.0
    milliseconds: list[float] = field(default_factory=list)

    def result(self) -> dict[str, float]:
        return {
            "mean_iou": scores(self.confusion).mean_iou,
            "argmax_agreement": self.same / self.pixels,
            "max_abs": self.max_abs,
            "max_rel": self.max_abs / self.largest,
            "median_ms": float(np.median(self.milliseconds)),
        }


def rounded(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a float16 bundle that rounds every result."""
    folder.mkdir()
    path = folder / bundle.manifest.models[1]
    onnx.save(rounding_model(onnx.load(bundle.model_path(1))), path)
    info = bundle.manifest.files[path.name]
    found = info.model_copy(update={"sha256": sha256_of(path), "bytes": path.stat().st_size})
    manifest = bundle.manifest.model_copy(update={"files": {path.name: found}, "weights": None})
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return Bundle.open(folder)


def packaged() -> Iterator[tuple[NDArray, NDArray]]:
    for image, mask in held_out():
        yield read_image(image), read_mask(mask)


def drawn(count: int) -> Iterator[tuple[NDArray, NDArray]]:
    # After the packaged ones: training never saw seeds from there on.
    for seed in range(HELD_OUT_SEEDS.stop, HELD_OUT_SEEDS.stop + count):
        yield draw_scene(seed)


def is_stable(session: Session, x: NDArray, logits: NDArray, seed: int) -> bool:
    """Whether float32 gives nearly the same classes with a little noise on the input."""
    noise = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    moved = session.run((x + NOISE * np.abs(x).max() * noise)[None])[0]
    return bool((moved.argmax(0) == logits.argmax(0)).mean() >= HELD)


def score(
    bundles: dict[str, Bundle], scenes: Iterator, threads: int
) -> tuple[dict[str, Tally], dict[str, Tally], int]:
    """Tallies of all scenes and of the stable ones, and how many are stable."""
    sessions = {name: open_session(b, threads=threads) for name, b in bundles.items()}
    for session in sessions.values():
        session.warm_up()
    whole, stable = ({name: Tally() for name in sessions} for _ in range(2))
    held = 0
    for number, (picture, truth) in enumerate(scenes):
        reference = logits = None
        steady = False
        for name, session in sessions.items():  # in turns, so that drift hits all alike
            pipeline = session.segmentation
            prepared = pipeline.prepare(picture)
            tensor = prepared.inputs["images"]
            start = time.perf_counter()
            found = session.run(tensor[None])[0]
            milliseconds = (time.perf_counter() - start) * 1e3
            labels = pipeline.finish(prepared, {"logits": found}).labels
            if reference is None or logits is None:  # fp32 comes first
                reference, logits = labels, found
                steady = is_stable(session, tensor, logits, number)
                held += steady
            for tally in [whole[name], stable[name]] if steady else [whole[name]]:
                tally.milliseconds.append(milliseconds)
                tally.confusion += confusion_matrix(truth, labels, len(CLASSES))
                tally.same += int((labels == reference).sum())
                tally.pixels += labels.size
                tally.max_abs = max(tally.max_abs, float(np.abs(found - logits).max()))
                tally.largest = max(tally.largest, float(np.abs(logits).max()))
    for session in sessions.values():
        session.close()
    return whole, stable, held


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("--scenes", type=int, default=100, help="more held-out scenes to draw")
    options = parser.parse_args()
    calibration = [draw_scene(seed)[0] for seed in CALIBRATION_SEEDS]
    height, width = calibration[0].shape[:2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = {
            form: export_checkpoint(
                packaged_checkpoint(),
                folder / str(place),
                size=(height, width),
                calibration=calibration if arguments["precision"] == "int8" else (),
                **arguments,  # type: ignore[arg-type]
            )
            for place, (form, arguments) in enumerate(FORMS.items())
        }
        sizes = {n: sum(f.bytes for f in b.manifest.files.values()) for n, b in bundles.items()}
        reports = {n: b.manifest.graph.get("precision", {}) for n, b in bundles.items()}
        bundles[ROUNDED] = rounded(bundles["fp16"], folder / "rounded")
        sets: dict[str, dict[str, Tally]] = {}
        counts: dict[str, int] = {}
        for title, scenes, count in (
            ("packaged", packaged(), len(HELD_OUT_SEEDS)),
            ("drawn", drawn(options.scenes), options.scenes),
        ):
            if count:
                whole, stable, held = score(bundles, scenes, options.threads)
                sets[title], counts[title] = whole, count
                if 0 < held < count:
                    steady = f"{title}, stable in fp32"
                    sets[steady], counts[steady] = stable, held
    results = {
        title: {form: tally.result() for form, tally in forms.items()}
        for title, forms in sets.items()
    }
    result: dict[str, Any] = {
        "network": f"the packaged checkpoint, {height}x{width}",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        "calibration_scenes": len(calibration),
        "bundle_mb": {name: round(size / 1e6, 2) for name, size in sizes.items()},
        "scenes": counts,
        "results": results,
        "worst_layers": {
            name: {layer: report["layers"][layer][0] for layer in report["worst"]}
            for name, report in reports.items()
            if report
        },
    }
    print(result["network"] + ", " + result["machine"])
    for title, rows in results.items():
        print(f"\n{counts[title]} held-out scenes, {title}")
        print(f"  {'':26} {'mIoU':>7} {'same class':>11} {'error':>8} {'MB':>6} {'ms':>7}")
        for form, found in rows.items():
            size = f"{sizes[form] / 1e6:6.2f}" if form in sizes else " " * 6
            print(
                f"  {form:26} {found['mean_iou']:7.4f} {found['argmax_agreement']:11.4%} "
                f"{found['max_rel']:8.1e} {size} {found['median_ms']:7.1f}"
            )
    print("\nError: largest, of the largest logit. ms: ONNX Runtime on this CPU, which has no")
    print("float16 arithmetic to gain from: it computes fp16 graphs in float32, with casts.")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
