"""``fdconv demo``: the whole way on the packaged checkpoint, each step measured."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.demo import held_out, packaged_checkpoint, plain_checkpoint, training_record
from fdconv_deploy.errors import ExportError
from fdconv_deploy.evaluation.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.export.validation.verdict import Verdict, refusal
from fdconv_deploy.export.validation.verify import verify_bundle
from fdconv_deploy.latency.interleaving import Interleaver, say_ratio
from fdconv_deploy.latency.machine import Bystanders, shared_machine
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime import Session, open_session, read_image
from fdconv_deploy.runtime.segmentation import class_palette
from fdconv_deploy.runtime.visualization import encode, overlay

Picture = NDArray[np.uint8]
SHOWN = 3
TURNS = 10


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
        with step(f"score all on {len(pictures)} held-out images, and the baseline"):
            baseline = load_segmentor(plain_checkpoint(), require_fdconv=False)
            plain = _score(lambda p: _torch_labels(baseline, session, p), pictures, truths)
            eager = _score(lambda p: _torch_labels(network, session, p), pictures, truths)
            exported = _score(lambda p: session.segment(p).labels, pictures, truths)
        rows += [
            ("held-out mIoU, PyTorch", f"{eager.mean_iou:.4f}"),
            ("held-out mIoU, bundle", f"{exported.mean_iou:.4f}"),
            ("held-out mIoU, baseline in PyTorch", f"{plain.mean_iou:.4f}"),
        ]
        with step("time both, one image at a time, taking turns"), Bystanders() as others:
            eager_seconds, exported_seconds = _race(network, session, pictures[0])
        rows += [
            ("PyTorch, published form", f"{1e3 * np.median(eager_seconds):.0f} ms an image"),
            ("bundle", f"{1e3 * np.median(exported_seconds):.0f} ms an image"),
            ("bundle vs. PyTorch", say_ratio(exported_seconds, eager_seconds)),
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


def _torch_labels(network: Segmentor, session: Session, picture: Picture) -> NDArray[np.integer]:
    """The eager network's labels, brought to the image's size just as the bundle's are."""
    prepared = session.segmentation.prepare(picture)
    with torch.no_grad():
        logits = network(torch.from_numpy(prepared.inputs["images"][None]))[0].numpy()
    return session.segmentation.finish(prepared, {"logits": logits}).labels


def _score(
    labels_of: Callable[[Picture], NDArray[np.integer]],
    pictures: Sequence[Picture],
    truths: Sequence[NDArray[np.uint8]],
) -> Scores:
    total = None
    for picture, truth in zip(pictures, truths, strict=True):
        labels = labels_of(picture)
        counts = confusion_matrix(truth, labels, len(training_record()["classes"]))
        total = counts if total is None else total + counts
    assert total is not None
    return scores(total)


def _race(network: Segmentor, session: Session, picture: Picture) -> list[list[float]]:
    """Seconds of the eager network's and of the bundle's runs, in turns."""
    tensor = session.segmentation.prepare(picture).inputs["images"][None]
    turns = Interleaver([lambda: network(torch.from_numpy(tensor)), lambda: session.run(tensor)])
    with torch.no_grad():
        for _ in range(2):
            turns.warm_up()
        for _ in range(TURNS):
            turns.round()
    return turns.seconds


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
    from fdconv_deploy.serve import running

    answers = []
    with running([bundle]) as address:
        for query in ("output=mask", "output=overlay"):
            request = urllib.request.Request(  # noqa: S310 - our own server's http address
                f"{address}/v1/segment?{query}",
                data=image.read_bytes(),
                headers={"Content-Type": "image/png", "Accept": "image/png"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                answers.append(response.read())
    return answers[0], answers[1]
