"""Resident memory over time: ``python -m benchmarks.serving.soak [--full] [--leak]`` (10 min).

Clients ask for every kind of answer without pause, with images, forms and tensors, some of them
damaged. After a warm-up of a fifth of the time, memory may grow by 20 MB at most. ``--leak``
plants one in the service, of 4 kB per request (500 kB in the short form, which sees few), and
the same test must catch it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.serving.harness import (
    Connection,
    Memory,
    closed_loop,
    demo_bundle,
    finish,
    machine,
    ours,
    scene,
    server,
    tensor_request,
)

LIMIT_MB = 20.0
LEAK = """
import sys
from fdconv_deploy.serve import segment_request as segmenting
kept, render = [], segmenting.render
def leaking(*arguments):
    kept.append(bytearray(SIZE))
    return render(*arguments)
segmenting.render = leaking
sys.argv = ["fdconv", *sys.argv[1:]]
from fdconv_deploy.cli.app import main
main()
"""
JPEG = {"Content-Type": "image/jpeg"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
# What is asked for, and the status it is answered with.
PATHS = {
    "/v1/segment?output=mask": 200,
    "/v1/segment?mask=polygons": 200,
    "/v1/segment": 200,
    "/v1/segment?output=overlay": 200,
    "/v1/segment?output=logits": 200,
    "/v1/segment?output=svg": 422,
}


class Mixture:
    """A client's requests in turn; ``wrong`` holds statuses that are not the expected ones."""

    def __init__(self, bundle: Path) -> None:
        self._image, self._tensor = scene(), tensor_request(bundle)
        part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        self._form = 2 * (part + self._image + b"\r\n") + b"--b--\r\n"
        self._number = 0
        self.wrong: list[tuple[str, int]] = []

    def __call__(self, plug: Connection) -> int:
        self._number = number = self._number + 1
        path, expected = list(PATHS.items())[number % len(PATHS)]
        if number % 11 == 0:
            damaged = self._image[:500]
            status, expected = plug.post(path, damaged, JPEG)[0], 422
        elif number % 7 == 0:
            path, status, expected = "infer", self._tensor(plug), 200
        elif number % 13 == 0:
            path, expected = "/v1/segment?output=mask", 200
            status = plug.post(path, self._form, FORM)[0]
        else:
            status = plug.post(path, self._image, JPEG)[0]
        if status != expected:
            self.wrong.append((path, status))
        return 200 if status == expected else status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="10 minutes.")
    parser.add_argument("--leak", action="store_true", help="Plant one.")
    arguments = parser.parse_args()
    seconds = 600.0 if arguments.full else 20.0
    bundle = demo_bundle(arguments.bundle)
    command = ours(bundle)
    if arguments.leak:
        size = "4_000" if arguments.full else "500_000"
        command = [sys.executable, "-c", LEAK.replace("SIZE", size), *command[3:]]
    about, ask = machine(), Mixture(bundle)
    with server(command) as found, Memory(found, seconds / 300) as memory:
        load = closed_loop(found.port, ask, connections=4, seconds=seconds)
    early, late = memory.between(0.2, 0.4), memory.between(0.8, 1.0)
    steady = late - early <= LIMIT_MB
    result = {
        "machine": about,
        "seconds": seconds,
        "planted leak": arguments.leak,
        "requests": load.count(),
        "statuses not expected": ask.wrong[:20],
        "resident MB after warm-up, at the end": [round(early, 1), round(late, 1)],
        "grown MB": round(late - early, 1),
        "limit MB": LIMIT_MB,
        "verdict": "steady" if steady else "leaks",
        "seconds, resident MB": memory.series(),
    }
    held = {
        "the leak is caught" if arguments.leak else "memory steady": steady != arguments.leak,
        "every answer as expected": not ask.wrong and set(load.statuses()) == {200},
    }
    finish("soak-leak" if arguments.leak else "soak", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
