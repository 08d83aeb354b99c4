"""The ``fdconv`` command.

Each command imports what it needs when it runs, so that ``fdconv --help`` is instant and
segmenting or serving loads no torch. Exit codes: 0 done, 1 a mistake that the message
explains, 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy import __version__
from fdconv_deploy.errors import FDConvError

app = typer.Typer(
    help="Export, verify, run and serve FDConv segmentation networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fdconv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it.")
    ] = False,
) -> None:
    pass


Checkpoint = Annotated[Path, typer.Argument(help="A .pth or .safetensors file.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle's folder.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="The network's config (.py or .json; read, never run), if the file has none."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="What the file does not tell, e.g. backbone.style=caffe.",
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Of the input, in pixels: 512x1024.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Backend = Annotated[str, typer.Option(help="auto, onnxruntime-cpu or onnxruntime-cuda.")]


def parse_size(text: str) -> tuple[int, int]:
    """``"512x1024"`` -> (512, 1024), height first; one number stands for a square."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(f"{text!r} is not HEIGHTxWIDTH in pixels, e.g. 512x1024.")
    height, width = (parts * 2)[:2]
    return int(height), int(width)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``["backbone.style=caffe", …]`` -> a dict; values are JSON where they parse as such."""
    result: dict[str, Any] = {}
    for setting in settings or []:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise typer.BadParameter(f"{setting!r} is not FIELD=VALUE, e.g. backbone.style=caffe.")
        try:
            result[field] = json.loads(value)
        except json.JSONDecodeError:
            result[field] = value
    return result


@app.command()
def inspect(
    checkpoint: Checkpoint,
    config: Config = None,
    settings: Settings = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Say what is in a checkpoint, what was told by it and what was assumed."""
    from fdconv_deploy.checkpoints import inspect_checkpoint, render

    pixels = parse_size(size) if size else (512, 512)
    report = inspect_checkpoint(
        checkpoint, config=config, size=pixels, overrides=parse_settings(settings)
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        render(report, Console())


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to make.")],
    size: Size = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="A batch size to make a graph for; may be repeated.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
    mode: Annotated[
        str | None, typer.Option(help="whole or slide, if not as the network was tested.")
    ] = None,
    fit: Annotated[
        str, typer.Option(help="How images of another shape are fitted: stretch or pad.")
    ] = "stretch",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Compare on this image; may be repeated. Drawn scenes if none."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest error kept, relative to the largest logit.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle and prove the bundle equal to the network."""
    from export.pipeline import TOLERANCE, export_checkpoint
    from fdconv_deploy.runtime import read_image

    if fit not in ("stretch", "pad"):
        raise typer.BadParameter(f"--fit is 'stretch' or 'pad', not {fit!r}.")
    overrides = parse_settings(settings)
    if mode is not None:
        if mode not in ("whole", "slide"):
            raise typer.BadParameter(f"--mode is 'whole' or 'slide', not {mode!r}.")
        overrides["test.mode"] = mode
    pixels = parse_size(size) if size else None
    with err.status("starting", spinner="dots") as status:
        bundle = export_checkpoint(
            checkpoint,
            output,
            size=pixels,
            batches=batch or [1],
            config=config,
            overrides=overrides,
            fit="stretch" if fit == "stretch" else "pad",
            pictures=[read_image(path) for path in image or []],
            tolerance=TOLERANCE if tolerance is None else tolerance,
            overwrite=overwrite,
            progress=None if quiet or as_json else status.update,
        )
    if as_json:
        print(bundle.manifest.model_dump_json(indent=2))
    elif not quiet:
        _print_export(bundle)


def _print_export(bundle: Any) -> None:
    manifest = bundle.manifest
    table = Table("batch", "error", "relative", "same class", title=f"{bundle.path}")
    assert manifest.parity is not None
    for batch, outputs in manifest.parity.batches.items():
        for output in outputs:
            agreement = output.argmax_agreement
            table.add_row(
                str(batch),
                f"{output.max_abs:.1e}",
                f"{output.max_rel:.1e}",
                "" if agreement is None else f"{agreement:.4%}",
            )
    console = Console()
    console.print(table)
    size = sum(f.bytes for f in manifest.files.values())
    console.print(
        f"{manifest.graph['fdconv_layers']} FDConv layers, {size / 1e6:.1f} MB, exported in "
        f"{manifest.graph['export_seconds']} s. Compared with {manifest.parity.reference}."
    )
    height, width = manifest.input.height, manifest.input.width
    how = "stretched" if manifest.fit == "stretch" else "padded"
    console.print(f"Images of other proportions than {height}x{width} are {how} (see --fit).")
    assumed = manifest.graph.get("assumed", {})
    if assumed:
        console.print(
            f"[yellow]Assumed[/], because the file does not tell ({len(assumed)} fields; check "
            "them, and give --config or --set where they are wrong):"
        )
        console.print(", ".join(f"{name}={value}" for name, value in assumed.items()), markup=False)
    console.print(f"Next: fdconv segment {bundle.path} IMAGE -o results")


@app.command()
def verify(
    bundle: BundlePath,
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images; made-up inputs if none.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest error allowed, relative to the largest logit.")
    ] = 1e-4,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch network, image by image."""
    from export.verify import verify_bundle
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.runtime import open_session, read_image

    with open_session(bundle, backend) as session:
        network = load_checkpoint(
            checkpoint, config=config, overrides=parse_settings(settings), require_fdconv=False
        )
        pictures = [(path.name, read_image(path)) for path in images or []]
        results = verify_bundle(session, network, pictures)
    if as_json:
        rows = [
            {"source": r.source, "batch": r.batch, **r.parity.model_dump(exclude={"name"})}
            for r in results
        ]
        print(json.dumps(rows, indent=2))
    else:
        table = Table("input", "error", "relative", "same class")
        for r in results:
            table.add_row(
                r.source,
                f"{r.parity.max_abs:.1e}",
                f"{r.parity.max_rel:.1e}",
                f"{r.parity.argmax_agreement or 0:.4%}",
            )
        Console().print(table)
    worst = max(r.parity.max_rel for r in results)
    if worst > tolerance:
        raise FDConvError(
            f"the bundle differs from the network by {worst:.1e} of the largest logit; "
            f"{tolerance:.0e} is allowed. Export it again."
        )


@app.command()
def segment(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(help="Images to segment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    fit: Annotated[
        str | None, typer.Option(help="stretch or pad, if not as the bundle says.")
    ] = None,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the overlay's colours.")] = 0.5,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Segment images: a mask (indexed PNG) and an overlay for each."""
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.files import segment_files

    with open_session(bundle, backend) as session:
        for result in segment_files(session, images, output, fit=fit, opacity=opacity):
            if as_json:
                print(json.dumps(result.as_dict()))
            elif not quiet:
                print(result.as_line())


@app.command()
def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles to serve.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    backend: Backend = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Inference runs at a time.")] = 1,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 503.")] = 16,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/segment."""
    try:
        import serve as service
        from serve.settings import Settings as ServiceSettings
    except ImportError as error:
        raise FDConvError(
            f"the service needs {error.name}, which is not installed: "
            "pip install 'fdconv-deploy[serve]'."
        ) from error
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"--log-level is debug, info, warning or error, not {log_level!r}."
        )
    settings = ServiceSettings(backend=backend, workers=workers, queue_limit=queue)
    service.run(bundles, host, port, settings, log_level=log_level)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is made.")] = Path(
        "demo-output"
    ),
) -> None:
    """The whole way on the packaged checkpoint: export, verify, measure, serve."""
    from fdconv_deploy.demo.walkthrough import walk

    walk(output, Console())


def _needed(error: ImportError) -> str:
    """What to install when a package of another job is missing."""
    jobs = {"torch": "export", "onnx": "export", "onnxscript": "export", "onnxruntime": "cpu"}
    package = (error.name or "").partition(".")[0]
    if package not in jobs:
        raise error
    return (
        f"this command needs {package}, which is not installed: "
        f"pip install 'fdconv-deploy[{jobs[package]}]'."
    )


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, not in a traceback."""
    # Being stopped unwinds like an error does, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        app()
    except FDConvError as error:
        message = str(error)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        message = f"{place}{error.strerror or error}. Give another path, or free that one."
    except ImportError as error:
        message = _needed(error)
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    err.print("[bold red]error:[/] ", end="")
    # As it is: a path may look like markup.
    err.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)
    sys.exit(1)
