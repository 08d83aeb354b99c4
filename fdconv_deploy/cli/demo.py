"""``fdconv demo``: the whole way on the packaged checkpoint, each step measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import say

if TYPE_CHECKING:
    from fdconv_deploy.evaluation.datasets import Pair
    from fdconv_deploy.runtime import Session

SHOWN = 3


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the bundle and pictures.")
    ] = Path("demo-output"),
) -> None:
    """Export, verify, score, time and serve the packaged checkpoint."""
    import numpy as np

    from fdconv_deploy.atomic_write import write_atomically
    from fdconv_deploy.checkpoints import load_segmentor
    from fdconv_deploy.client import Client
    from fdconv_deploy.demo import held_out, packaged_checkpoint, plain_checkpoint
    from fdconv_deploy.errors import ExportError
    from fdconv_deploy.evaluation.class_mapping import LabelRule
    from fdconv_deploy.evaluation.compare import evaluate
    from fdconv_deploy.evaluation.datasets import Pair, Samples
    from fdconv_deploy.evaluation.networks import bundle_target, torch_target
    from fdconv_deploy.export.api import export_checkpoint
    from fdconv_deploy.export.validation.verdict import refusal
    from fdconv_deploy.export.validation.verify import verify_bundle
    from fdconv_deploy.latency import say_ratio
    from fdconv_deploy.latency.machine import Bystanders, shared_machine
    from fdconv_deploy.runtime import open_session, read_image
    from fdconv_deploy.serve import running

    output.mkdir(parents=True, exist_ok=True)
    checkpoint, console = packaged_checkpoint(), Console()
    pairs = [Pair(picture, labels) for picture, labels in held_out()]
    height, width = read_image(pairs[0].image).shape[:2]

    @contextmanager
    def step(said: str) -> Iterator[None]:
        start = time.perf_counter()
        with console.status(said):
            yield
        console.print(f"[green]✓[/] {said} [dim]{time.perf_counter() - start:.1f} s[/]")

    with step(f"export {checkpoint.name} at {height}x{width}, batches 1 and 4"):
        bundle = export_checkpoint(
            checkpoint, output / "bundle", size=(height, width), batches=(1, 4), overwrite=True
        )
    with step("load the PyTorch network and the bundle"):
        network = load_segmentor(checkpoint)
        session = open_session(bundle)
        session.warm_up()
    with session:
        with step(f"verify the bundle on {SHOWN} held-out images"):
            named = [(pair.image.name, read_image(pair.image)) for pair in pairs[:SHOWN]]
            (verdict,) = verify_bundle(session, network, named)
            if not verdict.equal:
                raise ExportError(refusal(verdict, "the bundle"))
        with step(f"score and time all on {len(pairs)} held-out images, taking turns"):
            baseline = load_segmentor(plain_checkpoint(), require_fdconv=False)
            targets = [
                torch_target(network, checkpoint, sizes=session.sizes),
                torch_target(baseline, plain_checkpoint(), sizes=session.sizes),
                bundle_target(session),
            ]
            samples = Samples(pairs, LabelRule(len(session.classes)))
            with Bystanders() as others:
                eager, plain, exported = evaluate(targets, samples).results
        write_atomically(output / "picture.png", _sheet(session, pairs[:SHOWN]))
    with step("serve the bundle, POST an image to it, stop it"):
        content = pairs[0].image.read_bytes()
        with running([bundle.path]) as address, Client(address) as client:
            write_atomically(output / "mask.png", client.mask(content))
            write_atomically(output / "overlay.png", client.overlay(content))

    table = Table("", "", title="FDConv Deploy", show_header=False)
    worst = max(finding.error for finding in verdict.whole)
    table.add_row("largest error, of the largest logit", f"{worst:.1e}")
    for name, result in (("PyTorch", eager), ("bundle", exported), ("baseline in PyTorch", plain)):
        table.add_row(f"held-out mIoU, {name}", f"{result.score.summary()['mean_iou']:.4f}")
    for name, result in (("PyTorch, published form", eager), ("bundle", exported)):
        table.add_row(name, f"{1e3 * np.median(result.inference):.0f} ms an image")
    table.add_row("bundle vs. PyTorch", say_ratio(exported.inference, eager.inference))
    if shared := shared_machine(others.share):
        table.add_row("", shared)
    for name in ("bundle", "picture.png", "mask.png", "overlay.png"):
        table.add_row("written", str(output / name))
    console.print(table)
    console.print("Next, with .venv/bin on your PATH:")
    for line in (
        f"fdconv segment {bundle.path} YOUR.jpg -o {output}",
        f"fdconv serve {bundle.path}        # then, from another terminal:",
        f"curl -F image=@{pairs[0].image} -H 'Accept: image/png' localhost:8000/v1/segment "
        "-o mask.png",
        "fdconv inspect YOUR.pth",
        "fdconv export YOUR.pth -o your-bundle --size 512x512",
    ):
        say(f"  {line}", console)


def _sheet(session: Session, pairs: list[Pair]) -> bytes:
    """A PNG with a row for each image: itself, the truth and the bundle's answer over it."""
    import numpy as np

    from fdconv_deploy.evaluation.datasets import read_mask
    from fdconv_deploy.runtime import read_image
    from fdconv_deploy.runtime.visualization import encode, overlay

    rows = []
    for pair in pairs:
        picture = read_image(pair.image)
        labels = read_mask(pair.mask).astype(np.uint8), session.segment(picture).labels
        cells = [picture, *(overlay(picture, one, session.palette, 0.65) for one in labels)]
        framed = [np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255) for cell in cells]
        rows.append(np.concatenate(framed, axis=1))
    return encode(np.concatenate(rows), "PNG")
