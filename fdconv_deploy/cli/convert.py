"""``fdconv convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fdconv_deploy.cli.options import Config, Json, Quiet, Weights, parse_settings, require_files

if TYPE_CHECKING:
    from fdconv_deploy.checkpoints.convert import Conversion

err = Console(stderr=True)


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A plain network's .pth or .safetensors file."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .pth or .safetensors file to write.")
    ],
    equivalent: Annotated[
        bool,
        typer.Option(
            "--equivalent",
            help="Write a whole FDConv network that computes what the plain one does.",
        ),
    ] = False,
    kernel_num: Annotated[
        int | None, typer.Option(help="Frequency groups of a layer. Default: 4, as published.")
    ] = None,
    channels_above: Annotated[
        int | None,
        typer.Option(
            help="Convert layers of more channels than this (use_fdconv_if_c_gt). Default: 31, as "
            "the published converter; with --equivalent 16, as the published layer."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="ARGUMENT=VALUE",
            help="Override an argument of the FDConv layers, e.g. param_ratio=2. Repeatable.",
        ),
    ] = None,
    config: Config = None,
    weights: Weights = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a plain network's checkpoint for an FDConv network to start from."""
    arguments = parse_settings(settings)
    require_files(checkpoint, config)
    for name, value in (("kernel_num", kernel_num), ("use_fdconv_if_c_gt", channels_above)):
        if value is not None:
            arguments[name] = value

    from fdconv_deploy.checkpoints import convert_checkpoint

    with err.status("converting", spinner="dots"):
        report = convert_checkpoint(
            checkpoint,
            output,
            equivalent=equivalent,
            arguments=arguments,
            config=config,
            weights=weights,
            overwrite=overwrite,
        )
    if as_json:
        print(report.model_dump_json(indent=2))
    elif not quiet:
        _print(report, output)


def _print(report: Conversion, output: Path) -> None:
    console = Console()
    equivalent = report.method == "equivalent"
    what = (
        "now FDConv layers; the network computes what it did"
        if equivalent
        else "have their spectrum now; attentions start with training"
    )
    console.print(f"{output}: {len(report.converted)} layers {what}.", markup=False)
    threshold = report.conv.use_fdconv_if_c_gt
    for names, what in (
        (
            report.left_random,
            "are as they were, as the published converter leaves layers of less than 32 channels. "
            f"An FDConv network with use_fdconv_if_c_gt={threshold} makes them dynamic and finds "
            "no spectrum, so it starts them from random weights. "
            f"--channels-above {threshold} converts them too",
        ),
        (
            report.beyond_published,
            "among them are left as they are by the published converter, whose patterns meet none "
            "of this network's",
        ),
        (
            report.left_in_heads,
            "are feed-forward layers outside the backbone, which the published converter converts "
            "as well: they stay plain",
        ),
        (report.grouped, "are grouped convolutions, which no FDConv layer can be: they stay plain"),
        (
            report.unrecognised,
            "were not recognised, though FDConv replaces layers of their size: they are as they "
            "were, since names of a ResNet, ViT, MiT, Swin and ConvNeXt only are known",
        ),
    ):
        if names:
            console.print(f"{len(names)} layers {what}:\n  {', '.join(names)}", markup=False)
    following = (
        f"fdconv inspect {output}, then train it: its attentions are at rest until then."
        if equivalent
        else "train an FDConv network that starts from it. Without attentions it is no whole "
        "network yet, and fdconv export refuses it."
    )
    console.print(f"Next: {following}", markup=False, highlight=False, soft_wrap=True)
