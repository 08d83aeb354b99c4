"""A bundle replaced under load: ``python -m benchmarks.serving.replace_bundle [--full]``.

Eight clients ask without pause while the bundle that is served is copied over in place (slowly, in
pieces), cut off and written again, exchanged by renames, and deleted and made again, with one of
other weights and back. Every answer must be the old bundle's or the new one's, none may be lost,
the new one must be taken each time, and health must answer through all of it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from benchmarks.serving.harness import (
    HEADERS,
    Connection,
    Load,
    Memory,
    Server,
    closed_loop,
    demo_bundle,
    finish,
    machine,
    ours,
    scene,
    server,
)
from fdconv_deploy.runtime import open_session, read_image
from fdconv_deploy.runtime.bundle import sha256_of

HEALTH_MS, RESIDENT_MB = 250.0, 1500.0
# Batches of several sizes round differently, which may turn a pixel of two near classes.
SAME = 0.999
PIECE, PAUSE = 1 << 18, 0.02  # bytes, seconds: a copy over a slow network


def copy_in_place(bundle: Path, other: Path) -> None:
    """As ``cp other/* bundle`` and ``rsync --inplace``: the weights first, the manifest last."""
    for source in sorted(other.iterdir(), key=lambda file: file.suffix == ".json"):
        data = source.read_bytes()
        with (bundle / source.name).open("r+b") as file:
            for at in range(0, len(data), PIECE):
                file.write(data[at : at + PIECE])
                file.flush()
                time.sleep(PAUSE)
            file.truncate()


def cut_off(bundle: Path, other: Path) -> None:
    """The manifest first: it speaks of files that are empty."""
    for source in sorted(other.iterdir(), key=lambda file: file.suffix != ".json"):
        (bundle / source.name).write_bytes(b"")
        time.sleep(PAUSE)
    for source in sorted(other.iterdir(), key=lambda file: file.suffix != ".json"):
        (bundle / source.name).write_bytes(source.read_bytes())
        time.sleep(PAUSE)


def exchange(bundle: Path, other: Path) -> None:
    """Two renames, between which there is no bundle."""
    ready, gone = bundle.with_name("ready"), bundle.with_name("gone")
    shutil.copytree(other, ready)
    bundle.rename(gone)
    time.sleep(PAUSE)
    ready.rename(bundle)
    shutil.rmtree(gone)


def delete(bundle: Path, other: Path) -> None:
    """Nothing for a second, then a copy file by file."""
    shutil.rmtree(bundle)
    time.sleep(1)
    shutil.copytree(other, bundle)


ATTACKS: tuple[Callable[[Path, Path], None], ...] = copy_in_place, cut_off, exchange, delete


def other_weights(source: Path, target: Path) -> None:
    """A copy of a segmentor's bundle whose last convolution has its classes in reverse order."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    weights = np.fromfile(target / manifest["weights"], np.uint8)
    reversed_at = set()
    for name in manifest["models"].values():
        for tensor in onnx.load(str(target / name), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if "conv_seg.weight" not in tensor.name or place["offset"] in reversed_at:
                continue
            reversed_at.add(place["offset"])
            at, size = int(place["offset"]), int(place["length"])
            classes = weights[at : at + size].reshape(tensor.dims[0], -1)
            classes[:] = classes[::-1].copy()
    weights.tofile(target / manifest["weights"])
    listed = manifest["files"][manifest["weights"]]
    listed["sha256"] = sha256_of(target / manifest["weights"])
    (target / "manifest.json").write_text(json.dumps(manifest))


def labels(bundle: Path, body: bytes) -> np.ndarray:
    with open_session(bundle, threads=1) as session:
        return session.segment(read_image(body)).labels


@contextmanager
def health(found: Server) -> Iterator[list[float]]:
    """Milliseconds of health's answers, asked fifty times a second while the block lasts."""
    took: list[float] = []
    end = threading.Event()

    def ask() -> None:
        while not end.wait(0.02):
            start, healthy = time.perf_counter(), False
            with suppress(OSError):
                healthy = found.get("/healthz")[0] == 200
            took.append((time.perf_counter() - start) * 1e3 if healthy else float("inf"))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield took
    finally:
        end.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="A segmentor's.")
    parser.add_argument("--isolation", choices=("thread", "process"), default="thread")
    parser.add_argument("--full", action="store_true", help="Every attack five times.")
    arguments = parser.parse_args()
    rounds, body, about = (5 if arguments.full else 1), scene(), machine()
    mixed: list[tuple[float, float]] = []
    taken: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="fdconv-replace-") as name:
        folder = Path(name)
        first, second, served = folder / "first", folder / "second", folder / "served"
        shutil.copytree(demo_bundle(arguments.bundle), first)
        other_weights(first, second)
        shutil.copytree(first, served)
        known = [labels(first, body), labels(second, body)]
        apart = float((known[0] == known[1]).mean())

        def shares(mask: bytes) -> tuple[float, float]:
            found = np.asarray(Image.open(io.BytesIO(mask)))
            return float((found == known[0]).mean()), float((found == known[1]).mean())

        def ask(plug: Connection) -> int:
            status, _, mask = plug.post("/v1/segment", body, HEADERS)
            if status == 200 and max(found := shares(mask)) < SAME:
                mixed.append(found)
            return status

        options = ["--reload-seconds", "0.2", "--isolation", arguments.isolation]
        with server(ours(served, *options)) as found, Memory(found, 0.1) as memory:
            stop, seen = threading.Event(), []

            def load() -> None:
                while not stop.is_set():
                    seen.append(closed_loop(found.port, ask, connections=8, seconds=1))

            asking = threading.Thread(target=load)
            with health(found) as took:
                asking.start()
                new = 1
                try:
                    for attack in ATTACKS * rounds:
                        attack(served, (first, second)[new])
                        if found.process.poll() is not None:
                            raise SystemExit(f"{attack.__name__} ended the process.")
                        taken.append(_answers(found.port, body, lambda m, new=new: shares(m)[new]))
                        new = 1 - new
                finally:
                    stop.set()
                    asking.join()
            alive = found.process.poll() is None
    total = Load()
    for one in seen:
        for status, times in one.seconds.items():
            total.seconds.setdefault(status, []).extend(times)
    ordered = sorted(took)
    p99 = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    result = {
        "machine": about,
        "isolation": arguments.isolation,
        "attacks": [attack.__name__ for attack in ATTACKS] * rounds,
        "pixels that both bundles give the same class": round(apart, 3),
        "statuses": total.statuses(),
        "answered ms p50, p99, most": [round(total.percentile(p), 1) for p in (0.5, 0.99, 1)],
        "health ms p50, p99, most": [
            round(v, 1) for v in (ordered[len(ordered) // 2], p99, ordered[-1])
        ],
        "resident MB, most": round(memory.most()),
    }
    held = {
        "the process lives": alive,
        "every request is answered": set(total.statuses()) == {200},
        "every answer is the old bundle's or the new one's": not mixed and apart < SAME,
        "the new bundle is taken after each": all(taken),
        f"health's p99 is at most {HEALTH_MS:g} ms": p99 <= HEALTH_MS,
        f"at most {RESIDENT_MB:g} MB are resident": memory.most() <= RESIDENT_MB,
    }
    finish(f"replace-bundle-{arguments.isolation}", result, held, keep=arguments.full)


def _answers(port: int, body: bytes, share: Callable[[bytes], float]) -> bool:
    """Whether within two minutes the service answers by a bundle."""
    plug, end = Connection(port), time.monotonic() + 120
    while time.monotonic() < end:
        status, _, mask = plug.post("/v1/segment", body, HEADERS)
        if status == 200 and share(mask) >= SAME:
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    main()
