"""Mutated images and bodies: ``python -m benchmarks.serving.fuzz [--full]``.

Images of every accepted format, forms and KServe requests are cut, spliced, flipped and
mis-announced, 50,000 of them with ``--full``, and sent to a real server. Wanted: no 5xx, no
hang, no growth. Seeded, so that a failure comes again; what failed is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.serving.harness import (
    Connection,
    Server,
    demo_bundle,
    finish,
    machine,
    ours,
    server,
)
from fdconv_deploy.runtime import Bundle

HANG_SECONDS = 20.0
GROWTH_MB = 20.0
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def seeds(
    rng: random.Random, model: str, height: int, width: int
) -> list[tuple[str, bytes, dict[str, str]]]:
    """(path, body, headers) of requests that are answered with 200, or nearly."""
    noise = np.random.default_rng(0)
    found = []
    for kind in KINDS:
        for mode in ("RGB", "L", "P", "1"):
            image = Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            try:
                image.convert(mode).save(buffer, kind)
            except OSError:
                continue  # a mode this format does not have
            data = buffer.getvalue()
            output = rng.choice(["json", "mask", "overlay", "logits"])
            plain = {"Content-Type": f"image/{kind.lower()}"}
            found.append((f"/v1/segment?output={output}", data, plain))
            form = (
                b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
                + data
                + b"\r\n--b--\r\n"
            )
            kinds = {"Content-Type": "multipart/form-data; boundary=b"}
            found.append(("/v1/segment", form, kinds))
    path = f"/v2/models/{model}/infer"
    for kind, shape, each in (
        ("UINT8", [1, height, width, 3], 1),
        ("FP32", [1, 3, height, width], 4),
    ):
        size = height * width * 3 * each
        tensor = {"name": "images", "datatype": kind, "shape": shape}
        tensor["parameters"] = {"binary_data_size": size}
        head = json.dumps({"inputs": [tensor]}).encode()
        binary = {"Inference-Header-Content-Length": str(len(head))}
        bodies = [(head + bytes(size), binary), (head, {}), (head + b"x", binary)]
        found += [(path, body, headers) for body, headers in bodies]
    return found


def mutate(rng: random.Random, body: bytes, others: list[bytes]) -> bytes:
    data = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        # Mostly near the start, where headers and sizes are.
        at = at if rng.random() < 0.5 else min(at, rng.randrange(64))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.choice([1, 4, 100, len(data)])]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
            case 3:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at : at + 64] = other[start : start + 64]
            case 4:
                edge = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
                data[at : at + 4] = edge
            case _:
                data = data * 2 if len(data) < 1 << 16 else data[: at + 1]
    return bytes(data)


def headers_of(rng: random.Random, given: dict[str, str]) -> dict[str, str]:
    found = dict(given)
    if rng.random() < 0.1:
        name = rng.choice(["Content-Encoding", "Accept", "X-Timeout-Ms", "X-Request-ID"])
        found[name] = rng.choice(["gzip", "deflate", "*/*;q=2", "0", "9" * 40, "a,b;;", "nan"])
    if rng.random() < 0.05:
        found["Content-Type"] = rng.choice(["", "multipart/form-data", "image/", "\x7f", "a/b"])
    if rng.random() < 0.05:
        found["Inference-Header-Content-Length"] = str(rng.randrange(10**6))
    return found


def fuzz(found: Server, bundle: Bundle, count: int) -> dict:
    rng = random.Random(20261122)
    size = bundle.manifest.input
    assert size is not None
    base = seeds(rng, bundle.path.name, size.height, size.width)
    bodies = [body for _, body, _ in base]
    statuses: Counter[int] = Counter()
    failures: list[dict] = []
    slowest, before = 0.0, 0.0
    series: list[list[float]] = []
    plug = Connection(found.port, HANG_SECONDS)
    for number in range(count):
        if number == count // 5:
            before = found.rss()
        if number % (count // 25) == 0:
            series.append([number, round(found.rss(), 1)])
        path, body, headers = rng.choice(base)
        sent, named = mutate(rng, body, bodies), headers_of(rng, headers)
        begin = time.perf_counter()
        try:
            status = plug.post(path, sent, named)[0]
        except OSError as error:
            status = -1 if isinstance(error, TimeoutError) else 0  # a hang, a broken connection
            plug = Connection(found.port, HANG_SECONDS)
        slowest = max(slowest, time.perf_counter() - begin)
        statuses[status] += 1
        if status >= 500 or status <= 0:
            failures.append({"number": number, "status": status, "path": path, "headers": named})
    return {
        "requests": count,
        "statuses": dict(sorted(statuses.items())),
        "failures": failures[:20],
        "slowest ms": round(slowest * 1e3, 1),
        "resident MB after a fifth, at the end": [round(before, 1), round(found.rss(), 1)],
        "requests, resident MB": series,
        "alive": found.get("/readyz")[0] == 200,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="50,000 requests.")
    arguments = parser.parse_args()
    bundle = demo_bundle(arguments.bundle)
    with server(ours(bundle)) as found:
        result = {
            "machine": machine(),
            **fuzz(found, Bundle.open(bundle), 50_000 if arguments.full else 1500),
        }
    before, after = result["resident MB after a fifth, at the end"]
    held = {
        "no 5xx, no hang, no broken connection": not result["failures"],
        f"memory within {GROWTH_MB:g} MB": after - before <= GROWTH_MB,
        "alive": result["alive"],
    }
    finish("fuzz", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
