"""Arguments and options that several commands take, and how their text is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fdconv_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdconv_deploy.runtime import MultiScale, Session
    from fdconv_deploy.runtime.result_files import Result


def require_files(checkpoint: Path, config: Path | None = None) -> None:
    """Refuse missing files before anything is imported that takes seconds."""
    if not checkpoint.exists():
        raise CheckpointError(
            f"{checkpoint} does not exist. Expected a PyTorch checkpoint (.pth, .pt, .ckpt), a "
            ".pkl or a .safetensors file. Check the path."
        )
    if config is not None and not config.exists():
        raise CheckpointError(
            f"{config} does not exist. Expected a .py, .json or .yaml config. Check the path."
        )


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A .pth, .pkl or .safetensors file.")
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="The network's config (.py, .json or detectron2's .yaml; read, never run), if the "
        "file has none."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a setting that the checkpoint does not contain, e.g. backbone.style=caffe.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which weights of a checkpoint with several, e.g. state_dict_ema or teacher; "
        "inspect lists them.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH", help="The input's height and width in pixels, e.g. 512x1024."
    ),
]
Factors = Annotated[
    str | None,
    typer.Option(
        "--multi-scale",
        metavar="F,F,…",
        help="Scales to run each image at, e.g. 0.5,0.75,1,1.25,1.5,1.75; answers are merged as "
        "mmsegmentation's test-time augmentation merges them.",
    ),
]
Fit = Annotated[
    Literal["stretch", "pad"] | None,
    typer.Option(
        help="How images of another aspect ratio are fitted, if not as the bundle says: "
        "stretched, or letterboxed."
    ),
]
Flip = Annotated[bool, typer.Option("--flip", help="Run each image mirrored as well.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Backend = Annotated[
    str,
    typer.Option(
        help="auto, tensorrt, onnxruntime-cuda, onnxruntime-cpu, openvino or openvino-bf16."
    ),
]


def parse_size(text: str) -> tuple[int, int]:
    """``"512x1024"`` -> (512, 1024), height first; one number stands for a square."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(f"{text!r} is not HEIGHTxWIDTH in pixels, e.g. 512x1024.")
    height, width = (parts * 2)[:2]
    return int(height), int(width)


def parse_counts(texts: Sequence[str] | None, option: str) -> list[int]:
    """``["1,4", "2"]`` -> [1, 4, 2], each once."""
    parts = [part for text in texts or () for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{option} is a number from 1, or several such as 1,4; not {','.join(parts)!r}."
        )
    return list(dict.fromkeys(map(int, parts)))


def parse_scales(factors: str | None, flip: bool) -> MultiScale | None:
    """``"0.5,1"`` and whether to flip; None where neither is asked for."""
    from fdconv_deploy.runtime import MultiScale

    if factors is None and not flip:
        return None
    try:
        found = tuple(dict.fromkeys(map(float, (factors or "1").split(","))))
    except ValueError:
        raise typer.BadParameter(
            f"--multi-scale is factors such as 0.5,0.75,1; not {factors!r}."
        ) from None
    return MultiScale(found, flip)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``["backbone.style=caffe", …]`` -> a dict; values are JSON where they parse as such."""
    result: dict[str, Any] = {}
    for setting in settings or []:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise typer.BadParameter(f"{setting!r} is not FIELD=VALUE, e.g. backbone.style=caffe.")
        try:
            result[field] = json.loads(value)
        except (ValueError, RecursionError):  # ValueError: also a number of too many digits
            result[field] = value
    return result


def how_it_ran(session: Session | Result) -> dict[str, str]:
    """For JSON: the backend, and what ran the ``fdconv`` operators, if that is a question."""
    return {"backend": session.backend, "operators": session.operators}


def ran_by(session: Session | Result) -> str:
    """The same, as a sentence."""
    operators = f" with {session.operators}" if session.operators else ""
    return f"Run by {session.backend}{operators}."


def say(text: str, console: Console | None = None) -> None:
    """Print text as it is, on one line however long: a path may look like markup."""
    (console or Console()).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def typed(context: typer.Context) -> dict[str, Any]:
    """The parameters that were given at all, be it with their default value."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
    return {name: context.params[name] for name in given}
