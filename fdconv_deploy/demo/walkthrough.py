"""``fdconv demo``: the whole way on the packaged checkpoint, each step measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.demo import held_out, packaged_checkpoint, plain_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.evaluation.class_mapping import LabelRule
from fdconv_deploy.evaluation.compare import evaluate
from fdconv_deploy.evaluation.datasets import Pair, Samples
from fdconv_deploy.evaluation.metrics import SemanticScore
from fdconv_deploy.evaluation.targets import bundle_target, torch_target
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.export.validation.verdict import Verdict, refusal
from fdconv_deploy.export.validation.verify import verify_bundle
from fdconv_deploy.latency import say_ratio
from fdconv_deploy.latency.machine import Bystanders, shared_machine
from fdconv_deploy.runtime import Session, open_session, read_image
from fdconv_deploy.runtime.segmentation import class_palette
from fdconv_deploy.runtime.visualization import encode, overlay

Picture = NDArray[np.uint8]
SHOWN = 3


def walk(folder: Path, console: Console) -> None:
    """Export, verify, score, serve; write the results into ``folder`` and print a table.

    Raises:
        FDConvError: a step failed; what it wrote before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = packaged_checkpoint()
    pictures = [read_image(path) for path, _ in held_out()]
    truths = [np.asarray(Image.open(path)) for _, path in held_out()]
    height, width = pictures[0].shape[:2]
    rows: list[tuple[str, str]] = []

    @contextmanager
    def step(said: str) -> Iterator[None]:
        start = time.perf_counter()
        with console.status(said):
            yield
        console.print(f"[green]✓[/] {said} [dim]{time.perf_counter() - start:.1f} s[/]")

    with step(f"export {checkpoint.name} at {height}x{width}, batches 1 and 4"):
        bundle = export_checkpoint(
            checkpoint,
            folder / "bundle",
            size=(height, width),
            batches=(1, 4),
            overwrite=True,
        )
    with step("load the PyTorch network and the bundle"):
        network = load_segmentor(checkpoint)
        session = open_session(bundle)
        session.warm_up()
    with session:
        with step(f"verify the bundle on {SHOWN} held-out images"):
            named = [(path.name, p) for (path, _), p in zip(held_out(), pictures, strict=True)]
            (verdict,) = verify_bundle(session, network, named[:SHOWN])
            if not verdict.equal:
                raise ExportError(refusal(verdict, "the bundle"))
        rows.append(("largest error, of the largest logit", f"{_worst(verdict):.1e}"))
        with step(f"score and time all on {len(pictures)} held-out images, taking turns"):
            pairs = [Pair(picture, labels) for picture, labels in held_out()]
            sizes = [(height, width)]
            baseline = load_segmentor(plain_checkpoint(), require_fdconv=False)
            targets = [
                torch_target(network, checkpoint, sizes=sizes),
                torch_target(baseline, plain_checkpoint(), sizes=sizes),
                bundle_target(session),
            ]
            with Bystanders() as others:
                samples = Samples(pairs, LabelRule(len(session.classes)))
                found = evaluate(targets, samples, SemanticScore)
        eager, plain, exported = found.results
        sides = {"PyTorch": eager, "bundle": exported, "baseline in PyTorch": plain}
        for side, result in sides.items():
            score = result.score.summary()["mean_iou"]
            rows.append((f"held-out mIoU, {side}", f"{score:.4f}"))
        rows += [
            ("PyTorch, published form", f"{1e3 * np.median(eager.inference):.0f} ms an image"),
            ("bundle", f"{1e3 * np.median(exported.inference):.0f} ms an image"),
            ("bundle vs. PyTorch", say_ratio(exported.inference, eager.inference)),
        ]
        if shared := shared_machine(others.share):
            rows.append(("", shared))
        write_atomically(folder / "picture.png", _sheet(session, pictures[:SHOWN], truths[:SHOWN]))
    image = held_out()[0][0]
    with step("serve the bundle, POST an image to it, stop it"):
        mask, laid_over = _over_http(bundle.path, image)
    write_atomically(folder / "mask.png", mask)
    write_atomically(folder / "overlay.png", laid_over)

    table = Table("", "", title="FDConv Deploy", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    for name in ("bundle", "picture.png", "mask.png", "overlay.png"):
        table.add_row("written", str(folder / name))
    console.print(table)
    console.print("Next, with .venv/bin on your PATH:")
    for line in _next(folder, image):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _next(folder: Path, image: Path) -> list[str]:
    return [
        f"fdconv segment {folder / 'bundle'} YOUR.jpg -o {folder}",
        f"fdconv serve {folder / 'bundle'}        # then, from another terminal:",
        f"curl -F image=@{image} -H 'Accept: image/png' localhost:8000/v1/segment -o mask.png",
        "fdconv inspect YOUR.pth",
        "fdconv export YOUR.pth -o your-bundle --size 512x512",
    ]


def _worst(verdict: Verdict) -> float:
    return max(finding.error for finding in verdict.whole)


def _sheet(
    session: Session, pictures: Sequence[Picture], truths: Sequence[NDArray[np.uint8]]
) -> bytes:
    """A sheet with a row per image: image, truth, the bundle's answer over the image."""
    colours = class_palette(session.bundle.manifest.architecture)  # type: ignore[arg-type]
    gap = 4
    rows = []
    for picture, truth in zip(pictures, truths, strict=True):
        answer = session.segment(picture).labels
        cells = [picture] + [overlay(picture, x, colours, 0.65) for x in (truth, answer)]
        spacer = np.full((picture.shape[0], gap, 3), 255, np.uint8)
        rows.append(np.concatenate([cells[0], spacer, cells[1], spacer, cells[2]], axis=1))
        rows.append(np.full((gap, rows[0].shape[1], 3), 255, np.uint8))
    return encode(np.concatenate(rows[:-1]), "PNG")


def _over_http(bundle: Path, image: Path) -> tuple[bytes, bytes]:
    """Mask and overlay from a service that is started and stopped here."""
    from fdconv_deploy.client import Client
    from fdconv_deploy.serve import running

    content = image.read_bytes()
    with running([bundle]) as address, Client(address) as client:
        return client.mask(content), client.overlay(content)
