"""``fdconv export``."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fdconv_deploy.cli.options import (
    Checkpoint,
    Config,
    Json,
    Quiet,
    Settings,
    Weights,
    parse_counts,
    parse_settings,
    parse_size,
    require_files,
    typed,
)
from fdconv_deploy.cli.verify import findings_table
from fdconv_deploy.errors import ExportError
from fdconv_deploy.ops import OPSET

if TYPE_CHECKING:
    from fdconv_deploy.export.options import ExportOptions
    from fdconv_deploy.export.targets.triton_repository import TritonBackend
    from fdconv_deploy.runtime.bundle import Bundle
    from fdconv_deploy.runtime.manifest import Manifest

    Steps = Generator[Any, Bundle, None]

err = Console(stderr=True)


def export(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="What to write: the bundle's folder, or what --format says."
        ),
    ],
    format_: Annotated[
        Literal["bundle", "onnx", "web", "triton"],
        typer.Option(
            "--format",
            help="onnx: one self-contained file of standard operators, for other runtimes. web: a "
            "folder with a page that segments in the browser. triton: a model in a Triton model "
            "repository. All three also of a bundle's folder in the checkpoint's place.",
        ),
    ] = "bundle",
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="The input's height and width in pixels, e.g. 512x1024. Repeatable: an image "
            "takes that nearest to its proportions, and of equal ones the first.",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N", help="Batch size to export a graph for; repeatable, or several as 1,4."
        ),
    ] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    frequency_order: Annotated[
        Literal["auto", "torch", "stable"],
        typer.Option(help="auto: the order recognised in the weights, else torch. See inspect."),
    ] = "auto",
    mode: Annotated[
        Literal["whole", "slide"] | None,
        typer.Option(help="Inference mode, if other than the checkpoint's test mode."),
    ] = None,
    fit: Annotated[
        Literal["stretch", "pad"],
        typer.Option(help="How images of another aspect ratio are fitted."),
    ] = "stretch",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image to compare on; repeatable. Default: packaged pictures."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="FDConv's kernels are made in fp32 in all of them."),
    ] = "fp32",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest error accepted, relative to the largest value (default 1e-4; fp16: 2e-2, "
            "for each layer too). int8: largest share of pixels of another class (default 0.1)."
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE", help="Module, or pattern of modules, to keep in float32; repeatable."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of calibration images for int8.")
    ] = None,
    activations: Annotated[
        Literal["unsigned", "signed"],
        typer.Option(help="int8 activations: unsigned for ONNX Runtime, signed for TensorRT."),
    ] = "unsigned",
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Version of ONNX's operators in an .onnx file, from 13 (default 18, in which "
            "bundles are). Not every network can be written in every version.",
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Take a network without FDConv layers, to compare speed with."
        ),
    ] = False,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The npm package onnxruntime-web, of which web takes copies. Default: "
            "node_modules/onnxruntime-web here or above.",
        ),
    ] = None,
    triton_backend: Annotated[
        Literal["python", "onnxruntime"],
        typer.Option(
            help="python: images in, masks out. onnxruntime: the graphs, a model per batch size."
        ),
    ] = "python",
    name: Annotated[
        str | None,
        typer.Option(help="The Triton model's name. Default: that of the bundle or checkpoint."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle and prove the bundle equal to the network."""
    # All that can be refused without the network is refused before torch is imported.
    from fdconv_deploy.export.options import ExportOptions, Pictures
    from fdconv_deploy.runtime.bundle import Bundle

    overrides = parse_settings(settings)
    if mode is not None:
        overrides["test.mode"] = mode
    pixels = [parse_size(one) for one in size or ()] or None
    batches = parse_counts(batch, "--batch") or None
    require_files(checkpoint, config)
    with err.status("starting", spinner="dots") as status, ExitStack() as stack:
        options = ExportOptions(
            size=pixels,
            batches=batches,
            fit=fit,
            pictures=Pictures(image or []),
            precision=precision,
            tolerance=tolerance,
            keep_fp32=keep_fp32 or (),
            calibration=() if calibrate is None else Pictures(calibrate),
            activations=activations,
            overwrite=overwrite,
            progress=None if quiet or as_json else status.update,
        )
        exported = format_ != "bundle" and (checkpoint / "manifest.json").is_file()
        own = _own_options(context, format_, checkpoint if exported else None)
        steps = _FORMATS[format_](output, options, checkpoint, exported, **own)
        next(steps)
        if exported:
            bundle = Bundle.open(checkpoint, hold=True)
        else:
            folder = output
            if format_ != "bundle":
                scratch = tempfile.TemporaryDirectory(prefix="fdconv-")
                folder = Path(stack.enter_context(scratch), "it")
            from fdconv_deploy.export.api import export_checkpoint

            bundle = export_checkpoint(
                checkpoint,
                folder,
                options,
                config=config,
                overrides=overrides,
                weights=weights,
                frequency_order=frequency_order,
                require_fdconv=not baseline,
            )
        facts, *said = steps.send(bundle)
    if as_json:
        print(json.dumps(facts, indent=2))
    elif not quiet:
        console = Console()
        for line in (*said[:-1], *_assumed(bundle.manifest), said[-1]):
            # What may be long or copied is not broken into lines.
            whole = not isinstance(line, Table)
            console.print(line, markup=False, highlight=False, soft_wrap=whole)


# Each format in two steps: it refuses what cannot be written, before anything is loaded; and it
# takes the bundle, writes it, and gives what --json prints and what is said otherwise. Its keywords
# are the options of the command that are its alone.
def _bundle(output: Path, options: ExportOptions, *_: Any) -> Steps:
    from fdconv_deploy.runtime.bundle import BundleWriter

    with BundleWriter(output, overwrite=options.overwrite):
        pass  # nothing is in the way, and the place can be written to
    bundle = yield
    yield bundle.manifest.model_dump(mode="json"), *_described(bundle)


def _onnx(output: Path, options: ExportOptions, *_: Any, opset: int = OPSET) -> Steps:
    from fdconv_deploy.export.targets.onnx_file import check_output, export_onnx

    graph = _one_graph(options)
    check_output(output, overwrite=options.overwrite)
    file = export_onnx((yield), output, opset=opset, **graph)
    yield (
        {**asdict(file), "path": str(file.path)},
        f"{file.path}: {file.path.stat().st_size / 1e6:.1f} MB, {file.nodes} nodes of standard "
        f"operators, opset {file.opset}. Largest difference from the bundle's graph in ONNX "
        f"Runtime: {file.max_rel:.1e} of the largest value.",
    )


def _web(
    output: Path, options: ExportOptions, *_: Any, onnxruntime_web: Path | None = None
) -> Steps:
    from fdconv_deploy.export.targets import web_page

    graph = _one_graph(options)
    if graph.pop("batch") not in (None, 1):
        raise ExportError("a page runs one image at a time: leave --batch out.")
    web_page.check_web_output(output, overwrite=options.overwrite)
    web_page.find_onnxruntime_web(onnxruntime_web)
    web_page.export_web((yield), output, onnxruntime_web=onnxruntime_web, **graph)
    total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    yield (
        {"path": str(output), "bytes": total},
        f"{output}: a page of {total / 1e6:.1f} MB that fetches nothing from elsewhere.",
        f"Next: python -m http.server -d {shlex.quote(str(output.resolve()))}, then open "
        "http://localhost:8000",
    )


def _triton(
    output: Path,
    options: ExportOptions,
    checkpoint: Path,
    exported: bool,
    *,
    name: str | None = None,
    triton_backend: TritonBackend = "python",
) -> Steps:
    from fdconv_deploy.export.targets.triton_repository import check_repository, export_triton

    name = name or (checkpoint.resolve().name if exported else checkpoint.stem)
    check_repository(output, name)
    # A bundle that is made here has no other graphs than those that were asked for.
    models = export_triton(
        (yield), output, name=name, backend=triton_backend, overwrite=options.overwrite,
        progress=options.say, sizes=options.sizes if exported else (),
        batches=(options.batches or ()) if exported else (),
    )  # fmt: skip
    yield (
        {"models": [str(model) for model in models]},
        f"{output}: {', '.join(model.name for model in models)}.",
        f"Next: tritonserver --model-repository={shlex.quote(str(output.resolve()))}",
    )


_FORMATS: dict[str, Any] = {"bundle": _bundle, "onnx": _onnx, "web": _web, "triton": _triton}
# What a bundle does not settle.
_ANY_TIME = {"checkpoint", "output", "format_", "size", "batch", "overwrite", "quiet", "as_json"}


def _one_graph(options: ExportOptions) -> dict[str, Any]:
    """How to write a file of one graph, which is the one at the size and batch size given."""
    sizes, batches = options.sizes, options.batches or ()
    if len(sizes) > 1 or len(batches) > 1:
        raise ExportError(
            "an .onnx file or a page has one graph: give one --size and one --batch. Of several, "
            "export a bundle, then each of its graphs: fdconv export BUNDLE --format onnx --size "
            "HEIGHTxWIDTH --batch N."
        )
    graph = {"size": next(iter(sizes), None), "batch": next(iter(batches), None)}
    return graph | {"overwrite": options.overwrite, "progress": options.say}


def _own_options(context: typer.Context, format_: str, bundle: Path | None) -> dict[str, Any]:
    """The format's own options that were given; others' are refused, and a ``bundle``'s settled."""
    names = {str(option.name): max(option.opts, key=len) for option in context.command.params}
    homes = {name: home for home, form in _FORMATS.items() for name in form.__kwdefaults__ or ()}
    given = typed(context)
    for option in given:
        if (home := homes.get(option, format_)) != format_:
            raise ExportError(
                f"{names[option]} is of --format {home} alone: choose that, or leave it out."
            )
    settled = [
        names[option] for option in names if option in given.keys() - homes.keys() - _ANY_TIME
    ]
    if bundle is not None and settled:
        raise ExportError(
            f"{bundle} is a bundle, in which {', '.join(settled)} was settled when it was "
            "exported. Leave that out, or give the checkpoint."
        )
    return {option: value for option, value in given.items() if option in homes}


def _described(bundle: Bundle) -> Iterator[Table | str]:
    """What is said of a bundle."""
    manifest = bundle.manifest
    several = len(manifest.sizes) > 1
    judged = {str(manifest.input): manifest.graph, **manifest.graph.get("sizes", {})}
    whole, verdicts = [], []
    for size, one in judged.items():
        at = f" at {size}" if several else ""
        for batch, found in one["exactness"].items():
            whole += [{**row, "source": row["source"] + at} for row in found["whole"]]
            of = f"{size}, batch {batch}" if several else f"Batch {batch}"
            verdicts += [f"{of}: {sentence}" for sentence in found["verdict"]]
    yield findings_table(whole, detects=manifest.kind == "detector")
    yield from verdicts
    megabytes = sum(f.bytes for f in manifest.files.values()) / 1e6
    assert manifest.parity is not None
    yield (
        f"{manifest.graph['fdconv_layers']} FDConv layers, {megabytes:.1f} MB, exported in "
        f"{manifest.graph['export_seconds']} s. Compared with {manifest.parity.reference}."
    )
    if manifest.precision != "fp32":
        yield from _reduced(manifest.precision, manifest.graph["precision"])
    sizes = " or ".join(f"{height}x{width}" for height, width in manifest.sizes)
    nearest = ", whichever is nearest to their proportions" if several else ""
    if manifest.kind == "detector":
        yield f"Images keep their aspect ratio and are padded to {sizes}{nearest}."
    else:
        how = "stretched" if manifest.fit == "stretch" else "padded"
        yield f"Images of another aspect ratio than {sizes} are {how} (see --fit){nearest}."
    yield f"Bundle {bundle.digest} (sha256 of its manifest)."
    yield f"Next: fdconv segment {shlex.quote(str(bundle.path))} IMAGE -o results"


def _assumed(manifest: Manifest) -> Iterator[str | Text]:
    """What was not in the checkpoint."""
    if manifest.graph.get("frequency_order") == "stable":
        yield "Frequency order: stable, not the published one (see fdconv inspect)."
    assumed = manifest.graph.get("assumed", {})
    if assumed:
        yield Text.assemble(
            ("Assumed", "yellow"),
            f", because the checkpoint does not contain it ({len(assumed)} in all; check them, and "
            "give --config or --set where they are wrong):",
        )
        yield ", ".join(f"{name}={value}" for name, value in assumed.items())


def _reduced(name: str, report: dict[str, Any]) -> Iterator[str]:
    """What lower precision changed, and where most."""
    if name == "fp16":
        lost = report["flushed"] + report["subnormal"]
        yield (
            f"fp16: {report['half_nodes']} nodes in float16, {report['single_nodes']} in float32; "
            f"{lost} of {report['values']} float16 weights too small for full precision, "
            f"{report['flushed']} of them now 0."
        )
    else:
        yield (
            f"int8: {len(report['quantized'])} plain convolutions in eight bits, ranges from "
            f"{report['calibration_images']} images."
        )
    worst = ", ".join(f"{name} {report['layers'][name][0]:.1e}" for name in report["worst"])
    yield f"Furthest from float32: {worst} (of the layer's largest value)."
