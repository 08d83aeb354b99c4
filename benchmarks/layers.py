"""What FDConv costs layer by layer, before and after folding: ``python -m benchmarks.layers``.

The R50 backbone at 512×512: FDConv as published in eager PyTorch, exported in ONNX Runtime as it
is and with native operators where they are built, and the baseline in ONNX Runtime, taking
turns in one process. Each is told apart by layer and by
part (`fdconv_deploy.profiling`); ``--json`` keeps all of it, ``--svg`` draws the README's
figure from this run, ``--draw FILE`` from an earlier one.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.export_size import TOLERANCE
from benchmarks.options import script
from benchmarks.plot import BARS, TEXT, WIDTH
from benchmarks.records import write_json
from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.export import export_module
from fdconv_deploy.latency import machine
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.profiling import PARTS, WARM_UP
from fdconv_deploy.profiling.profile import ProfiledGraph, ProfiledNetwork

HEIGHT = 3.7  # inches
# Bars of one layer lie over each other, the widest behind: widths and colours.
LOOKS = {
    "eager": (0.88, BARS["eager"][0]),
    "exported": (0.64, BARS["exported"][0]),
    "native": (0.42, "#2da478"),
    "plain": (0.2, BARS["plain"][0]),
}


def measure(
    case: Case,
    folder: Path,
    *,
    threads: int,
    runs: int = 10,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export both networks into ``folder`` and profile all three sides: JSON.

    :returns: ``sides``: for each, ``parts`` (milliseconds by part) and ``layers``.
    """
    torch.set_num_threads(threads)
    x = case.images()
    network = case.make()
    graphs: dict[str, ProfiledGraph] = {}
    library, _ = native_library()
    for side, made in (("exported", network), ("plain", case.make(dynamic=False))):
        progress(f"exporting {side}")
        place = folder / side
        place.mkdir()
        bundle = export_module(made, x, place / "bundle", tolerance=TOLERANCE)
        model = bundle.model_path(case.batch)
        graphs[side] = ProfiledGraph(model, place, threads=threads)
        if side == "exported" and library is not None:
            (folder / "native").mkdir()
            graphs["native"] = ProfiledGraph(
                model, folder / "native", threads=threads, library=library
            )
    eager = ProfiledNetwork(network)
    feeds = {"input": x.numpy()}
    with machine.Bystanders() as others:
        for number in range(runs + WARM_UP):
            progress(f"run {number + 1} of {runs + WARM_UP}")
            eager.run((x,))
            for graph in graphs.values():
                graph.run(feeds)
    found = {"eager": eager.layers()}
    found |= {side: graph.layers() for side, graph in graphs.items()}
    return {
        "title": case.title,
        "case": case.as_dict(),
        "runs": runs,
        "others_cpu": others.share,
        "sides": {
            side: {
                "parts": {
                    part: round(sum(one.ms.get(part, 0.0) for one in layers), 3) for part in PARTS
                },
                "layers": [layer.model_dump() for layer in layers],
            }
            for side, layers in found.items()
        },
    }


def convolutions(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of every dynamic convolution by side, in the network's order.

    A layer's name -> side -> its time with what is folded into it.
    """
    spent = {
        side: {layer["name"]: sum(layer["ms"].values()) for layer in found["layers"]}
        for side, found in result["sides"].items()
    }
    dynamic = [
        layer["name"]
        for layer in result["sides"]["eager"]["layers"]
        if "kernel assembly" in layer["ms"]
    ]
    return {name: {side: one.get(name, 0.0) for side, one in spent.items()} for name in dynamic}


def draw(result: Mapping[str, Any]) -> str:
    """The figure: SVG text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = convolutions(result)
    # Text stays text: smaller, searchable, and in the reader's own font.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fdconv", "font.family": "sans-serif"}
    colours = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT}
    with plt.rc_context({**style, **colours, "ytick.color": TEXT, "font.size": 11}):
        figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT))
        for side in _sides(result):
            width, colour = LOOKS[side]
            values = [one[side] for one in layers.values()]
            label = f"{BARS[side][1]}: {sum(values):.0f} ms"
            axis.bar(range(len(values)), values, width, color=colour, label=label)
        _stages(axis, list(layers))
        axis.set_ylabel("milliseconds")
        axis.set_xlim(-0.8, len(layers) - 0.2)
        axis.set_xticks([])
        axis.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.7)
        axis.set_axisbelow(True)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.tick_params(length=0)
        figure.legend(frameon=False, loc="upper center", ncols=2, fontsize=10, handlelength=1)
        figure.tight_layout(rect=(0, 0, 1, 0.87))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()


def _stages(axis: Any, names: Sequence[str]) -> None:
    """Name the network's stages below their layers, and part them by lines."""
    stages = [next(part for part in name.split(".") if part.startswith("layer")) for name in names]
    for stage in dict.fromkeys(stages):
        places = [place for place, one in enumerate(stages) if one == stage]
        middle = (places[0] + places[-1]) / 2
        said = f"stage {stage.removeprefix('layer')}: {len(places)} layers"
        axis.annotate(
            said, (middle, 0), (0, -8), xycoords="data", textcoords="offset points",
            ha="center", va="top", fontsize=10, annotation_clip=False,
        )  # fmt: skip
        if places[0]:
            axis.axvline(places[0] - 0.5, color=TEXT, linewidth=0.7, alpha=0.6)


def _sides(result: Mapping[str, Any]) -> list[str]:
    return [side for side in LOOKS if side in result["sides"]]


def show(result: Mapping[str, Any]) -> None:
    """Print a result for people."""
    print(f"{result['title']}: milliseconds, medians of {result['runs']} runs")
    sides = _sides(result)
    print(f"{'':28}" + "".join(f"{side:>12}" for side in sides))
    for part in PARTS:
        spent = (result["sides"][side]["parts"][part] for side in sides)
        print(f"{part:28}" + "".join(f"{one:12.1f}" for one in spent))
    layers = convolutions(result)
    for name, spent in sorted(layers.items(), key=lambda item: -item[1]["eager"])[:12]:
        print(f"{name:28}" + "".join(f"{spent[side]:12.2f}" for side in sides))
    sums = (sum(one[side] for one in layers.values()) for side in sides)
    print(f"{f'all {len(layers)} dynamic layers':28}" + "".join(f"{one:12.1f}" for one in sums))
    if shared := machine.shared_machine(result["others_cpu"]):
        print(shared)


def main() -> None:
    parser = script(__doc__)
    add_case_arguments(parser)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--svg", type=Path, help="draw the figure here")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw this result's figure")
    options = parser.parse_args()
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        machine.warn_if_busy()
        where = machine.describe(options.threads)
        with tempfile.TemporaryDirectory(prefix="fdconv-layers-") as folder:
            found = measure(
                named_case(options),
                Path(folder),
                threads=options.threads,
                runs=options.runs,
                progress=lambda step: print(f"  {step}", file=sys.stderr, flush=True),
            )
        result = {"kind": "layers", "machine": where, **found}
        if options.json:
            write_json(options.json, result)
    show(result)
    print(machine.say(result["machine"]))
    if options.svg:
        write_atomically(options.svg, draw(result).encode())


if __name__ == "__main__":
    main()
