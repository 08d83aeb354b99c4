"""Where rounding enters a network and how it grows: ``python -m benchmarks.rounding``.

One picture goes through the network in float64, in PyTorch in float32, folded in PyTorch, and
through the exported graph with portable and with native operators. Printed for the input of each
FDConv layer: how far each is from float64, as a share of the largest value. Beside them, what
becomes of float64 itself when every channel of each layer's input is moved by one unit in the
last place of a float32, several times over: where that is as large, rounding explains the rest.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.options import keep, script
from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.export.validation.layer_graphs import CutGraph
from fdconv_deploy.export.validation.reference import UNIT
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.folding.network import fold_network
from fdconv_deploy.latency import machine
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.profiling.divergence import save_exposed
from fdconv_deploy.sample_images import prepared_batch

FLAT = {"black": 0, "gray": 128, "white": 255}
ANSWER = "answer"
See = Callable[[str, NDArray], None]


def picture(kind: str, size: tuple[int, int]) -> Tensor:
    """(1, 3, height, width) float32: a drawn scene, a flat frame, noise, or a file."""
    if kind == "scene":
        return sample_tensor(1, size)
    if kind in FLAT:
        pixels = np.full((*size, 3), FLAT[kind], np.uint8)
    elif kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    else:
        pixels = np.asarray(cv2.imread(kind)[..., ::-1])
    return torch.from_numpy(prepared_batch([pixels], size))


@torch.no_grad()
def watch(network: nn.Module, names: list[str], x: Tensor, see: See, seed: int = 0) -> None:
    """Show what each layer is given, and the answer; move each input a unit if seeded."""

    def hook(name: str, generator: torch.Generator) -> Callable[..., Any]:
        def given(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            (value,) = inputs
            see(name, value.numpy())
            if not seed:
                return None
            sides = torch.randint(0, 2, (*value.shape[:2], 1, 1), generator=generator) * 2 - 1
            return (value * (1 + UNIT * sides),)

        return given

    generator = torch.Generator().manual_seed(seed)
    modules = dict(network.named_modules())
    hooks = [modules[n].register_forward_pre_hook(hook(n, generator)) for n in names]
    try:
        see(ANSWER, network(x).numpy())
    finally:
        for one in hooks:
            one.remove()


class Reference:
    """What the float64 network's layers are given, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest = folder, dict[str, float]()

    def keep(self, name: str, values: NDArray) -> None:
        self.largest[name] = float(np.abs(values).max()) or 1.0
        np.save(self.folder / f"{name}.npy", values)

    def errors(self, run: Callable[[See], None]) -> dict[str, float]:
        """Of a run, by layer."""
        found: dict[str, float] = {}

        def see(name: str, values: NDArray) -> None:
            off = np.abs(values.reshape(-1) - np.load(self.folder / f"{name}.npy").reshape(-1))
            found[name] = float(off.max()) / self.largest[name]

        run(see)
        return found


def run_graph(
    path: Path, names: list[str], x: Tensor, library: Path | None
) -> Callable[[See], None]:
    """An exported graph's run, with each layer's input among its outputs."""
    cut = CutGraph(path, names)
    exposed = path.with_suffix(".exposed.onnx")
    save_exposed(onnx.load(str(path)), cut.cuts, exposed)
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        str(exposed), options, providers=["CPUExecutionProvider"]
    )

    def run(see: See) -> None:
        outputs = [output.name for output in session.get_outputs()]
        answers = dict(zip(outputs, session.run(outputs, {"images": x.numpy()}), strict=True))
        for tensor, use in cut.cuts.items():
            see(use, answers[tensor])
        see(ANSWER, answers["logits"])

    return run


def measure(checkpoint: Path, size: tuple[int, int], kind: str, draws: int) -> dict[str, Any]:
    network, x = load_segmentor(checkpoint), picture(kind, size)
    names = list(dynamic_layers(network))
    double = copy.deepcopy(network).double()
    with tempfile.TemporaryDirectory(prefix="fdconv-rounding-") as name:
        folder = Path(name)
        bundle = export_checkpoint(checkpoint, folder / "bundle", size=size)
        reference = Reference(folder)
        watch(double, names, x.double(), reference.keep)
        moved = [
            reference.errors(lambda see, seed=seed: watch(double, names, x.double(), see, seed))
            for seed in range(1, draws + 1)
        ]
        columns = {
            "PyTorch": reference.errors(lambda see: watch(network, names, x, see)),
            "folded": reference.errors(lambda see: watch(fold_network(network, x), names, x, see)),
            "portable": reference.errors(run_graph(bundle.model_path(1), names, x, None)),
        }
        library, _ = native_library()
        if library is not None:
            native = run_graph(bundle.model_path(1), names, x, library)
            columns["native"] = reference.errors(native)
    rows = {}
    for layer in [*names, ANSWER]:
        units = sorted(one[layer] for one in moved)
        rows[layer] = {
            **{column: found[layer] for column, found in columns.items() if layer in found},
            "a unit, least": units[0],
            "a unit, most": units[-1],
        }
    return {"size": list(size), "picture": kind, "draws": draws, "layers": rows}


def show(found: dict[str, Any]) -> None:
    height, width = found["size"]
    print(f"{found['picture']} at {height}×{width}: error against float64 at each layer's input")
    columns = list(found["layers"][ANSWER])
    print(f"{'':28}" + "".join(f"{column:>15}" for column in columns))
    before: dict[str, float] = {}
    steps = []
    for layer, row in found["layers"].items():
        print(f"{layer:28}" + "".join(f"{row.get(c, float('nan')):15.1e}" for c in columns))
        if before:
            grown = row["a unit, most"] / max(before["a unit, most"], UNIT)
            steps.append((grown, layer))
        before = row
    growth = ", ".join(f"{layer} {factor:.0f}×" for factor, layer in sorted(steps)[:-4:-1])
    print(f"Rounding grows most on the way to {growth}.")
    answer = found["layers"][ANSWER]
    worst = max(answer[c] for c in columns if not c.startswith("a unit"))
    print(
        f"The answer: at most {worst:.1e} from float64; float64 moved by units: "
        f"{answer['a unit, least']:.1e} to {answer['a unit, most']:.1e}.\n"
    )


def main() -> None:
    parser = script(__doc__, threads=False)
    parser.add_argument("--checkpoint", type=Path, default=packaged_checkpoint())
    parser.add_argument("--draws", type=int, default=4, help="times that float64 is moved")
    parser.add_argument(
        "cases", nargs="*", default=["scene@16x16", "gray@192x256"], help="PICTURE@HEIGHTxWIDTH"
    )
    options = parser.parse_args()
    results = []
    for case in options.cases:
        kind, _, size = case.rpartition("@")
        height, width = map(int, size.split("x"))
        results.append(measure(options.checkpoint, (height, width), kind, options.draws))
        show(results[-1])
    where = machine.describe(torch.get_num_threads())
    keep(options, "rounding", where, {"cases": results})


if __name__ == "__main__":
    main()
