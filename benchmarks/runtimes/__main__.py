"""Which runtimes take an exported network: ``python -m benchmarks.runtimes --environments DIR``.

Exports the packaged segmentor and detector, as a bundle and as an .onnx file, and runs both on
held-out scenes in each runtime, each at a pinned version in an environment of its own below DIR,
which is made once. Prints a Markdown table of the largest difference from ONNX Runtime in this
process, and after a stroke from the network in PyTorch in float64, both of the largest value; a
dash where the runtime refuses, with its last words below; and what the last digit of boxes makes
of masks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.options import script
from benchmarks.records import write_json
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import held_out, packaged_checkpoint, packaged_detector
from fdconv_deploy.export import export_checkpoint, export_onnx
from fdconv_deploy.runtime import open_session, read_image
from fdconv_deploy.runtime.postprocessing import logits_of, view_of
from fdconv_deploy.runtime.preprocessing import Prepared

HERE = Path(__file__).parent
SIZE = (192, 256)
SCENES = 3
LIMIT_S = 900
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Runtime:
    """A runtime in an environment of its own.

    Attributes:
        title: what the table calls it.
        runs: the function of run.py that runs it, or the npm package that run.mjs does.
        packages: what is installed, its version pinned, with pip's options; the last first, and
            the first is the runtime.
        note: how it has to be asked.
        detects: whether a detector is tried.
    """

    title: str
    runs: str
    packages: tuple[str, ...]
    note: str = ""
    detects: bool = True

    @property
    def version(self) -> str:
        return self.packages[0].replace("==", "@").rpartition("@")[2]

    @property
    def node(self) -> bool:
        return self.runs.startswith("onnxruntime-")

    def install(self, folder: Path) -> Path:
        """Make the environment, or find it made; the program to start in it."""
        place = folder / f"rt-{self.runs}-{self.version}"
        program = Path(shutil.which("node") or "node") if self.node else place / "bin/python"
        if (place / "installed").exists():
            return program
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if self.node:
            # onnxruntime-node's script fetches CUDA libraries from elsewhere.
            command: list[Any] = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
            _checked([*command, "--prefix", place, *self.packages])
        else:
            _checked([sys.executable, "-m", "venv", place])
            # One by one: torch first and by itself, or pip picks a build of several gigabytes.
            for package in ("numpy", *self.packages[::-1]):
                _checked([program, "-m", "pip", "install", "--quiet", *package.split()])
        (place / "installed").touch()
        return program

    def run(self, folder: Path, model: Path, scenes: Path, names: Sequence[str]) -> str:
        """Run a file on every scene, whose answers lie beside them; why not, or nothing."""
        program = self.install(folder)
        command = [program, HERE / "run.py", self.runs, model, scenes, *names]
        if self.node:
            command = [program, HERE / "run.mjs", self.runs, model, scenes]
        cwd = folder / f"rt-{self.runs}-{self.version}" if self.node else scenes
        # Tools that install something by themselves find the environment's pip.
        path = f"{program.parent}:{os.environ['PATH']}"
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=cwd, capture_output=True, text=True,
                timeout=LIMIT_S, check=False, env={**os.environ, "PATH": path},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done after {LIMIT_S} s"
        return "" if done.returncode == 0 else _last_words(done.stderr or done.stdout)


def _ort(version: str, note: str = "") -> Runtime:
    return Runtime("ONNX Runtime", "onnxruntime", (f"onnxruntime=={version}",), note)


RUNTIMES = (
    _ort("1.20.1"),
    _ort("1.24.4"),
    _ort("1.25.1"),
    _ort("1.32.0"),
    Runtime("ONNX Runtime, Node.js", "onnxruntime-node", ("onnxruntime-node@1.30.0",),
            "a bundle's `weights.bin` as `externalData`; install with `--ignore-scripts`"),
    Runtime("ONNX Runtime, web (wasm)", "onnxruntime-web", ("onnxruntime-web@1.30.0",),
            "a bundle's `weights.bin` as `externalData`"),
    Runtime("onnx.reference", "reference", ("onnx==1.23.2",), "for checking; slow"),
    Runtime("OpenVINO", "openvino", ("openvino==2026.4.1",), "`INFERENCE_PRECISION_HINT=f32`"),
    Runtime("tract", "tract", ("tract==0.23.9",), "input facts set to the file's shapes"),
    Runtime("IREE", "iree",
            ("iree-base-runtime==3.13.0", "iree-base-compiler==3.13.0", "onnx==1.23.2"),
            "target `llvm-cpu`"),
    Runtime("TVM", "tvm", ("apache-tvm==0.27.0.post1", "onnx==1.23.2"),
            "Relax importer, target `llvm`"),
    Runtime("MNN", "mnn", ("MNN==3.6.1",),
            "`precision: high` and `WINOGRAD_MEMORY_LEVEL` 0 (else 2e-4)"),
    Runtime("TensorRT-RTX, parsed and built", "tensorrt_rtx",
            ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"),
            "no GPU here, so not run"),
    Runtime("ncnn", "ncnn", ("--no-deps ncnn==1.0.20261020", "--no-deps pnnx==20261020"),
            "by pnnx, fp16 off"),
    Runtime("OpenCV DNN", "opencv", ("opencv-python-headless==5.0.0.93",)),
    Runtime("Ultralytics", "ultralytics",
            ("--no-deps ultralytics==8.4.190",
             "ultralytics-thop==2.2.3 matplotlib polars psutil pyyaml requests scipy",
             "opencv-python-headless==5.0.0.93 onnxruntime==1.32.0",
             "torchvision==0.29.1", "torch==2.14.1"),
            "`YOLO(file, task=\"semantic\")`; its predictor divides by 255 and knows no `mean`, so "
            "feed `AutoBackend` normalised images", False),
    Runtime("MMDeploy SDK", "mmdeploy", ("mmdeploy-runtime==1.3.1", "numpy<2"),
            "`deploy.json` and `pipeline.json` as in run.py; its ONNX Runtime is 1.15.1", False),
    Runtime("Netron", "netron", ("netron==9.3.3", "playwright==1.65.2"), "drawn in Chromium"),
)  # fmt: skip


def _checked(command: Sequence[Any]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[-1]}: {done.stderr[-2000:]}")


def _last_words(text: str) -> str:
    """The sentence of a failure: its last line that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [
        line for line in lines if re.match(r"[\w.]*([Ee]rror|Fail|NotImplemented)\w*\b.*:", line)
    ]
    words = (said or lines or ["it gave no reason"])[-1]
    return words if len(words) < 300 else f"{words[:300]}…"


def write_scenes(session: Any, folder: Path) -> list[Arrays]:
    """Held-out scenes as the network's inputs, for both kinds of readers, and the answers."""
    folder.mkdir()
    expected = []
    for number, (picture, _) in enumerate(held_out()[:SCENES]):
        prepared = session.images.prepare(read_image(picture)).inputs
        feeds = {name: value[None] for name, value in prepared.items()}
        np.savez(folder / f"scene{number}.npz", **feeds)
        described = {}
        for name, value in feeds.items():
            file = f"scene{number}.{name}.bin"
            (folder / file).write_bytes(np.ascontiguousarray(value).tobytes())
            described[name] = {"file": file, "shape": value.shape}
        (folder / f"scene{number}.json").write_text(json.dumps(described))
        expected.append(session.run_raw(feeds))
    return expected


def read_answers(folder: Path, number: int) -> dict[str, NDArray[Any]]:
    """One scene's answers, as either kind of reader wrote them."""
    described = folder / f"answer{number}.json"
    if not described.exists():
        with np.load(folder / f"answer{number}.npz") as stored:
            return dict(stored)
    return {
        name: np.frombuffer((folder / one["file"]).read_bytes(), one["type"]).reshape(one["shape"])
        for name, one in json.loads(described.read_text()).items()
    }


def differences(found: Arrays, expected: Arrays) -> dict[str, float] | str:
    """The largest of each output, of its largest value; of a detector's, up to its ``count``."""
    if not found:
        return "built"
    off = {}
    for name, right in expected.items():
        here = found.get(name)
        if name == "logits" and here is not None and here.shape[2:] == SIZE:  # at the image's size
            small = right[0].astype(np.float32)
            whole = Prepared({}, SIZE, "resized", SIZE, SIZE)
            right = logits_of(view_of(small, whole, align_corners=False))[None]
        if here is None or here.shape != right.shape:
            return "other shapes"
        if right.dtype.kind != "f":
            if not np.array_equal(here, right):
                return "other objects"
            continue
        if "count" in expected:
            count = int(expected["count"][0])
            here, right = here[:, :count], right[:, :count]
        largest = float(np.abs(right).max(initial=0.0) or 1.0)
        off[name] = float(np.abs(here.astype(np.float64) - right).max(initial=0.0)) / largest
    return off if np.isfinite([*off.values()]).all() else "not finite"


def largest(found: Sequence[Arrays], expected: Sequence[Arrays]) -> dict[str, float] | str:
    """Over the scenes, by output; or what else they are."""
    off = [differences(*pair) for pair in zip(found, expected, strict=True)]
    said = [one for one in off if isinstance(one, str)]
    scenes = [one for one in off if isinstance(one, dict)]
    return said[0] if said else {name: max(one[name] for one in scenes) for name in scenes[0]}


@dataclass(frozen=True)
class Case:
    """A file to be run, and its right answers.

    Attributes:
        model: the file.
        expected: ONNX Runtime's answers of each scene.
        exact: PyTorch's in float64.
    """

    model: Path
    expected: Sequence[Arrays]
    exact: Sequence[Arrays]

    def errors(self, found: Sequence[Arrays]) -> tuple[Any, Any]:
        """From ONNX Runtime, and from float64."""
        return largest(found, self.expected), largest(found, self.exact)

    def measure(self, runtime: Runtime, folder: Path) -> Any:
        """A runtime's errors over the scenes, or why it refuses."""
        model = self.model
        with tempfile.TemporaryDirectory(dir=model.parent.parent) as name:
            place = Path(name, "file")
            shutil.copytree(model.parent, place)
            scenes = place / "scenes"
            shutil.copytree(model.parent.parent / f"scenes-{model.parent.name[:3]}", scenes)
            refused = runtime.run(folder, place / model.name, scenes, list(self.expected[0]))
            if refused:
                return {"refused": refused.replace(f"{place}/", "")}
            return self.errors([read_answers(scenes, n) for n in range(len(self.expected))])


def answers_of(network: torch.nn.Module, folder: Path, names: Sequence[str]) -> list[Arrays]:
    """PyTorch's answers for the scenes in a folder, in the precision of the network."""
    kind = next(network.parameters()).dtype
    answers = []
    for number in range(SCENES):
        with np.load(folder / f"scene{number}.npz") as feeds, torch.no_grad():
            found = network(*[torch.from_numpy(feeds[name]).to(kind) for name in feeds])
        found = found if isinstance(found, tuple) else (found,)
        answers.append(dict(zip(names, (value.numpy() for value in found), strict=True)))
    return answers


def by_boxes(network: torch.nn.Module, folder: Path, exact: Sequence[Arrays]) -> dict[str, float]:
    """What the last digit of the boxes, which masks are cut out by, makes of masks.

    Returns:
        "moved": the change in float64 when each coordinate moves to a neighbouring float32, half of
        them up. "rounded": float32's error where boxes are float64's, rounded once: what no graph
        that ends in float32 boxes could do better.
    """
    generator = np.random.default_rng(0)
    worst = {"moved": 0.0, "rounded": 0.0}
    for number, answer in enumerate(exact):
        boxes = answer["boxes"].astype(np.float32)
        ends = np.where(generator.random(boxes.shape) < 0.5, np.inf, -np.inf).astype(np.float32)
        objects = torch.from_numpy(answer["labels"]), torch.from_numpy(answer["count"])
        with np.load(folder / f"scene{number}.npz") as feeds:
            images = torch.from_numpy(feeds["images"])

        def masks(at: NDArray[Any], kind: torch.dtype) -> torch.Tensor:
            network.to(kind)
            with torch.no_grad():
                features = network.features(images.to(kind))  # noqa: B023 - called at once
                return network.roi_head.masks(features, torch.from_numpy(at).to(kind), *objects)  # noqa: B023

        right = torch.from_numpy(answer["masks"])
        moved = masks(np.nextafter(boxes, ends), torch.float64) - masks(boxes, torch.float64)
        rounded = masks(boxes, torch.float32) - right
        for name, off in (("moved", moved), ("rounded", rounded)):
            worst[name] = max(worst[name], float(off.abs().max() / right.abs().max()))
    return worst


# Title, case, and the outputs that count; all but masks where none are named.
COLUMNS = (
    ("bundle's graph", "seg-bundle", ""),
    (".onnx file", "seg-file", ""),
    ("detector's boxes, scores", "det-file", ""),
    ("its masks", "det-file", "masks"),
)


def cell(found: Any, output: str) -> str:
    """One cell: from ONNX Runtime / from float64."""
    if not isinstance(found, tuple):
        return "–" if found else ""
    if isinstance(found[0], str):
        return str(found[0])
    shown = []
    for errors in found:
        here = [e for name, e in errors.items() if (name == "masks") == (output == "masks")]
        shown.append(f"{max(here):.1e}".replace("0.0e+00", "0"))
    return " / ".join(shown)


def main() -> None:
    parser = script(__doc__, threads=False)
    parser.add_argument("--environments", type=Path, required=True, help="made and kept here")
    parser.add_argument("--only", nargs="*", help="names of run.py's functions, or npm packages")
    parser.add_argument("--opset", type=int, default=18)
    options = parser.parse_args()
    chosen = [r for r in RUNTIMES if not options.only or r.runs in options.only]
    rows, refusals, cases, eager, boxes = [], [], {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, checkpoint in (("seg", packaged_checkpoint()), ("det", packaged_detector())):
            bundle = export_checkpoint(checkpoint, folder / f"{kind}-bundle", size=SIZE)
            file = folder / f"{kind}-file" / "model.onnx"
            export_onnx(bundle, file, opset=options.opset)
            scenes = folder / f"scenes-{kind}"
            with open_session(bundle, "onnxruntime-cpu", native=False) as session:
                expected = write_scenes(session, scenes)
            network = load_checkpoint(checkpoint).eval()
            single = answers_of(network, scenes, list(expected[0]))
            exact = answers_of(network.double(), scenes, list(expected[0]))
            cases[f"{kind}-bundle"] = Case(bundle.model_path(1), expected, exact)
            cases[f"{kind}-file"] = Case(file, expected, exact)
            eager[f"{kind}-file"] = cases[f"{kind}-file"].errors(single)
            if kind == "det":
                boxes = by_boxes(network, scenes, exact)
        rows.append({"title": "PyTorch, not exported", "version": torch.__version__, **eager,
                     "note": "float32"})  # fmt: skip
        for runtime in chosen:
            found = {
                case: cases[case].measure(runtime, options.environments.resolve())
                for case in dict.fromkeys(case for _, case, _ in COLUMNS)
                if runtime.detects or case != "det-file"
            }
            rows.append({"title": runtime.title, "version": runtime.version, **found,
                         "note": runtime.note})  # fmt: skip
            refusals += [
                f"{runtime.title} {runtime.version}, {case}: {value['refused']}"
                for case, value in found.items()
                if isinstance(value, dict)
            ]
            print(f"{runtime.title} {runtime.version}: {found}", file=sys.stderr, flush=True)
    print(f"| Runtime | version | {' | '.join(title for title, _, _ in COLUMNS)} | how |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 1))
    for row in rows:
        cells = [cell(row.get(case), output) for _, case, output in COLUMNS]
        print(f"| {row['title']} | {row['version']} | {' | '.join(cells)} | {row['note']} |")
    print(
        f"\nMasks in float64, boxes moved to neighbouring float32 values: {boxes['moved']:.1e}"
        f"\nMasks in float32, boxes rounded once from float64's: {boxes['rounded']:.1e}\n"
    )
    for line in refusals:
        print(f"- {line}")
    if options.json:
        write_json(options.json, {"opset": options.opset, "boxes": boxes, "rows": rows})


if __name__ == "__main__":
    main()
