"""Small to send, large to work on: ``python -m benchmarks.serving.big_pictures [NAME] [--full]``.

Each attack has a service to itself, with the default limits. Many clients
send the same request at once, again and again; meanwhile health is asked by new connections, and
resident memory is watched. Every request must be answered, by 200 or by a refusal that says why,
and not later than its deadline.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving.attacks import HEALTH_MS, RESIDENT_MB, Probe, worst
from benchmarks.serving.harness import (
    Load,
    Memory,
    demo_bundle,
    finish,
    in_form,
    machine,
    ours,
    server,
)

DEADLINE, LATE = 30.0, 1.0  # seconds: the service's own, and of a client's way to and from it
CLIENTS = 17
# What may come: an answer, or no tensors, no image, too large, too many for now, too late.
EXPECTED = {200, 400, 413, 415, 503, 504}
Request = tuple[str, bytes, dict[str, str]]


def picture(side: int, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """A picture of stripes: some hundred kilobytes, whatever its size."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[::7], pixels[:, ::11, 1] = 90, 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def image(data: bytes, query: str = "") -> Request:
    return f"/v1/segment{query}", data, {"Content-Type": "application/octet-stream"}


def several(data: bytes, count: int, query: str = "") -> Request:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\n'
    body = b"".join(part + data + b"\r\n" for _ in range(count)) + b"--x--\r\n"
    return f"/v1/segment{query}", body, in_form(b"")[1]


def tensor(bundle: Path, body: bytes, **headers: str) -> Request:
    return f"/v2/models/{bundle.name}/infer", body, headers


def attacks(bundle: Path) -> dict[str, Callable[[], Request]]:
    """The request of each attack."""
    lists = b'{"inputs":[{"name":"images","datatype":"FP32","shape":[1],"data":['
    return {
        "png": lambda: image(picture(8000, "PNG")),
        "mask": lambda: image(picture(8000, "PNG"), "?output=mask&classes=0"),
        "overlay": lambda: image(picture(8000, "PNG"), "?output=overlay"),
        "polygons": lambda: image(picture(8000, "PNG"), "?mask=polygons"),
        "palette": lambda: image(picture(8000, "PNG", "P")),
        "progressive": lambda: image(picture(8000, "JPEG", progressive=True)),
        "cmyk": lambda: image(picture(8000, "JPEG", "CMYK", progressive=True)),
        "webp": lambda: image(picture(8000, "WEBP", lossless=True, method=0)),
        "tiff": lambda: image(picture(8000, "TIFF", compression="tiff_lzw")),
        "sixteen": lambda: several(picture(2000, "PNG"), 16),
        "sixteen-overlays": lambda: several(picture(2000, "PNG"), 16, "?output=overlay"),
        "logits": lambda: image(picture(1500, "PNG"), "?output=logits&size=original"),
        "gzip": lambda: tensor(
            bundle, gzip.compress(bytes(60 << 20)), **{"Content-Encoding": "gzip"}
        ),
        "gzip-image": lambda: (
            "/v1/segment",
            gzip.compress(bytes(60 << 20)),
            {"Content-Encoding": "gzip", "Content-Type": "image/png"},
        ),
        "json-numbers": lambda: tensor(bundle, lists + b"1," * (20 << 20) + b"1]}]}"),
        "json-lists": lambda: tensor(bundle, lists + b"[]," * (12 << 20) + b"1]}]}"),
        "json-answers": lambda: json_request(bundle),
    }


def json_request(bundle: Path) -> Request:
    """As many images as a request may hold, by gzip, for logits in JSON."""
    size = json.loads((bundle / "manifest.json").read_text())["input"]
    shape = [16, size["height"], size["width"], 3]
    data = b"0," * (int(np.prod(shape)) - 1) + b"0"
    head = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":%s,"data":[' % (
        json.dumps(shape).encode()
    )
    body = gzip.compress(head + data + b"]}]}")
    return tensor(bundle, body, **{"Content-Encoding": "gzip"})


def run(
    name: str, request: Request, bundle: Path, seconds: float
) -> tuple[dict[str, Any], dict[str, bool]]:
    load, lock, texts = Load(), threading.Lock(), set()
    path, body, headers = request
    with server(ours(bundle)) as found:
        end = time.monotonic() + seconds

        def client() -> None:
            while time.monotonic() < end:
                begin, status = time.perf_counter(), 0
                plug = http.client.HTTPConnection("127.0.0.1", found.port, timeout=4 * DEADLINE)
                try:
                    plug.request("POST", path, body, headers)
                    answer = plug.getresponse()
                    text = answer.read()
                    status = answer.status
                except (OSError, http.client.HTTPException) as error:
                    text = repr(error).encode()
                finally:
                    plug.close()
                with lock:
                    load.add(status, time.perf_counter() - begin)
                    if status != 200:
                        texts.add(text[:300].decode(errors="replace"))
                if status == 503:
                    time.sleep(1)  # as Retry-After says at least

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        with Memory(found, 0.02) as memory, Probe(lambda: found.get("/healthz")[0]) as health:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    slowest = max(max(each, default=0) for each in load.seconds.values())
    result = {
        "bytes sent per request": len(body),
        "answers": load.statuses(),
        "refusals, some": sorted(texts)[:3],
        "slowest answer, seconds": round(slowest, 2),
        "health": health.statuses(),
        "health p99 ms": worst(health),
        "resident MB at most": round(memory.most(), 1),
    }
    held = {
        "no answer lost": set(load.statuses()) <= EXPECTED,
        f"none later than {LATE:g} s past the deadline": slowest <= DEADLINE + LATE,
        "health is always 200": set(health.statuses()) == {200},
        f"health p99 within {HEALTH_MS:g} ms": worst(health) <= HEALTH_MS,
        f"resident within {RESIDENT_MB:g} MB": memory.most() <= RESIDENT_MB,
    }
    return result, {f"{name}: {sentence}": holds for sentence, holds in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="30 seconds each; keep the result.")
    arguments = parser.parse_args()
    bundle, about = demo_bundle(arguments.bundle), machine()
    known = attacks(bundle)
    if unknown := set(arguments.names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results: dict[str, Any] = {"machine": about}
    held: dict[str, bool] = {}
    for name in arguments.names or known:
        request = known[name]()
        results[name], shown = run(name, request, bundle, 30.0 if arguments.full else 5.0)
        print(name, json.dumps(results[name]), flush=True)
        held |= shown
    finish("big-pictures", results, held, keep=arguments.full)


if __name__ == "__main__":
    main()
