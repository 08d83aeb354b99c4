"""Clients that nobody here wrote: ``python -m benchmarks.serving.clients --environment FOLDER``.

Makes an environment of pinned clients in FOLDER, where there is none yet, starts the service, lets
each client ask for health, metadata, an inference, the configuration and statistics, and prints the
table. Answers are compared with the labels of the bundle's own session. Needs ``pip install
'.[cpu,serve,grpc]'``, and takes Java, Node and curl where they are installed; perf_analyzer's glibc
2.38 is fetched from Debian trixie with apt-get where this machine's is older.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.clients.python_clients import CLIENTS
from benchmarks.serving.harness import demo_bundle, finish, free_port, machine, ours, server
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.preprocessing import Prepared

HERE = Path(__file__).parent
PERF_ANALYZER, GLIBC = "2.60.0", (2, 38)
COLUMNS = ("health", "metadata", "infer", "config", "statistics")
# What perf_analyzer asks for, by the ends of the paths in the service's log.
ASKED = {
    "metadata": ("/v2/models/{model}", "/ModelMetadata"),
    "infer": ("/infer", "/ModelInfer", "/ModelStreamInfer"),
    "config": ("/config", "/ModelConfig"),
    "statistics": ("/stats", "/ModelStatistics"),
}


@dataclass
class Served:
    """The running service, and what is asked of it."""

    http: str
    grpc: str
    bundle: Path
    folder: Path
    shape: list[int]
    environment: Path

    @property
    def log(self) -> Path:
        return self.folder / "service.log"

    @property
    def files(self) -> list[str]:
        """The JSON of an inference, its tensor, the labels expected: in this order."""
        return [str(self.folder / name) for name in ("head.json", "tensor.f32", "labels.u8")]

    @property
    def model(self) -> str:
        return self.bundle.name


def run(command: list[Any], *, within: float = 300, **options: Any) -> str:
    """The output of a command; a ``RuntimeError`` with the end of it where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=within,
        **options,
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {(done.stdout + done.stderr)[-300:].strip()}")
    return done.stdout


def prepare(environment: Path) -> None:
    """Install the clients in ``environment``, unless a former run did."""
    python, done = environment / "bin" / "python", environment / "installed"
    if done.is_file() and done.read_text() == (HERE / "requirements.txt").read_text():
        return
    venv.create(environment, with_pip=True, symlinks=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "-r", HERE / "requirements.txt"], within=1200)
    # By itself and unpacked: pip takes it for a machine of glibc 2.38 only.
    wheel = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_38_x86_64"]
    run([*pip, "download", *wheel, "-d", environment, f"perf-analyzer=={PERF_ANALYZER}"])
    with zipfile.ZipFile(next(environment.glob("perf_analyzer-*.whl"))) as packed:
        packed.extractall(environment / "perf")
    if tuple(map(int, platform.libc_ver()[1].split("."))) < GLIBC:
        fetch_glibc(environment)
    done.write_text((HERE / "requirements.txt").read_text())


def fetch_glibc(environment: Path) -> None:
    """Unpack Debian trixie's C library in ``environment``; nothing is installed."""
    apt = (environment / "apt").resolve()
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={keys}] http://deb.debian.org/debian trixie main\n"
    (apt / "sources.list").write_text(source)
    options = [
        *("-o", f"Dir::Etc::sourcelist={apt}/sources.list", "-o", "Dir::Etc::sourceparts=-"),
        *("-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"),
    ]
    run(["apt-get", *options, "update"])
    run(["apt-get", *options, "download", "libc6", "libstdc++6", "libgcc-s1"], cwd=apt)
    for package in apt.glob("*.deb"):
        run(["dpkg", "-x", package, environment / "glibc"])


def write_inputs(bundle: Path, folder: Path) -> list[int]:
    """Write an inference's files; the tensor's shape."""
    size = json.loads((bundle / "manifest.json").read_text())["input"]
    shape = [1, 3, size["height"], size["width"]]
    tensor = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with open_session(bundle, threads=1) as session:
        size = session.input_size
        whole = Prepared({}, size, "resized", size, size)
        logits = session.run(tensor)[0]
        labels = session.segmentation.finish(whole, {"logits": logits}).labels
    head = {
        "inputs": [
            {
                "name": "images",
                "datatype": "FP32",
                "shape": shape,
                "parameters": {"binary_data_size": tensor.nbytes},
            }
        ],
        "outputs": [{"name": "labels", "parameters": {"binary_data": True}}],
    }
    (folder / "head.json").write_text(json.dumps(head))
    tensor.tofile(folder / "tensor.f32")
    labels.astype(np.uint8).tofile(folder / "labels.u8")
    return shape


def python_client(served: Served, name: str) -> dict[str, Any]:
    _, tensor, labels = served.files
    told = run(
        [
            *(served.environment / "bin" / "python", HERE / "python_clients.py", name),
            *(served.http, served.grpc, served.model, json.dumps(served.shape), tensor, labels),
            served.folder / "generated",
        ]
    )
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def generated_client(served: Served) -> dict[str, Any]:
    """Generates the package first."""
    document = served.folder / "openapi.json"
    document.write_text(run(["curl", "-fsS", f"http://{served.http}/openapi.json"]))
    binaries = served.environment / "bin"
    # Its hooks format the code; they are not needed, and ruff is not installed.
    (served.folder / "config.yml").write_text("post_hooks: []\n")
    run(
        [
            *(binaries / "openapi-python-client", "generate", "--path", document),
            *("--output-path", served.folder / "generated", "--meta", "none"),
            *("--config", served.folder / "config.yml"),
        ]
    )
    return python_client(served, "openapi-python-client")


def perf_analyzer(served: Served, *options: str, grpc: bool) -> dict[str, Any]:
    """Runs NVIDIA's load generator; what it asked for is read in the service's log."""
    binary = served.environment / "perf" / "perf_analyzer" / "bin" / "perf_analyzer"
    binary.chmod(0o755)
    command = [str(binary)]
    library = served.environment / "glibc" / "usr" / "lib" / "x86_64-linux-gnu"
    if library.is_dir():
        path = f"{library}:/usr/lib/x86_64-linux-gnu"
        command = [f"{library}/ld-linux-x86-64.so.2", "--library-path", path, *command]
    before = len(served.log.read_text().splitlines())
    told = run(
        [
            *(*command, "-m", served.model, "-i", "grpc" if grpc else "http", *options),
            *("-u", served.grpc if grpc else served.http, "--concurrency-range", "2"),
            *("--measurement-mode", "count_windows", "--measurement-request-count", "20"),
            *("--stability-percentage", "999", "--max-trials", "3"),
        ]
    )
    cells = {}
    lines = [json.loads(line) for line in served.log.read_text().splitlines()[before:]]
    for column, ends in ASKED.items():
        ends = tuple(end.format(model=served.model) for end in ends)
        asked = [line for line in lines if str(line.get("path", "")).endswith(ends)]
        # A stream ends as its client leaves.
        failed = {line["status"] for line in asked} - {200, "OK", "CANCELLED"}
        cells[column] = "ok" if asked and not failed else f"asked {len(asked)}: {failed}"
    if not re.search(r"throughput: [1-9]", told):
        cells["infer"] = told[-200:]
    return {"version": PERF_ANALYZER, "cells": cells}


def java(served: Served) -> dict[str, Any]:
    program = [HERE / "JavaClient.java", served.http, served.model]
    found: dict[str, Any] = json.loads(run(["java", *program, *served.files]))
    return found


def node(served: Served) -> dict[str, Any]:
    program = [HERE / "node_client.mjs", served.http, served.model]
    found: dict[str, Any] = json.loads(run(["node", *program, *served.files]))
    return found


def curl(served: Served) -> dict[str, Any]:
    """Offers HTTP/2 with each first request, as ``--http2`` does without TLS."""
    base = f"http://{served.http}/v2"
    ask = ["curl", "-sS", "--http2", "--fail-with-body"]
    head, tensor, labels = (Path(name).read_bytes() for name in served.files)
    body, answer = served.folder / "body", served.folder / "answer"
    body.write_bytes(head + tensor)
    infer = [*("-H", f"Inference-Header-Content-Length: {len(head)}"), "--data-binary", f"@{body}"]
    run([*ask, *infer, f"{base}/models/{served.model}/infer", "-o", answer])
    right = answer.read_bytes().endswith(labels)
    model = f"/models/{served.model}"
    paths = {
        "health": "/health/ready",
        "metadata": model,
        "config": f"{model}/config",
        "statistics": f"{model}/stats",
    }
    cells = {name: "ok" if run([*ask, base + path]) else "empty" for name, path in paths.items()}
    cells["infer"] = "ok" if right else "other labels"
    cells["HEAD"] = "ok" if "200" in run([*ask, "-I", f"{base}/health/ready"]) else "not 200"
    return {"version": run(["curl", "--version"]).split()[1], "cells": cells}


PROGRAMS: dict[str, Callable[[Served], dict[str, Any]]] = {
    **{name: lambda served, name=name: python_client(served, name) for name in CLIENTS},  # type: ignore[misc]
    "openapi-python-client": generated_client,
    "perf_analyzer REST": lambda served: perf_analyzer(served, grpc=False),
    "perf_analyzer gRPC": lambda served: perf_analyzer(served, grpc=True),
    "perf_analyzer gRPC stream": lambda served: perf_analyzer(
        served, "--streaming", "--async", grpc=True
    ),
    "Java HttpClient": java,
    "node fetch": node,
    "curl --http2": curl,
}
NEEDED = {"Java HttpClient": "java", "node fetch": "node", "curl --http2": "curl"}


def asked(served: Served, name: str) -> dict[str, Any]:
    """What one client found; where it could not be run, why."""
    program = NEEDED.get(name)
    if program and not shutil.which(program):
        return {"version": "not installed here", "cells": {}}
    try:
        return PROGRAMS[name](served)
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        return {"version": "", "cells": {"run": str(error)}}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per client; "–" where a client has no such call."""
    rows = [["client", "version", *COLUMNS, "also"], ["---"] * (len(COLUMNS) + 3)]
    for name, result in found.items():
        cells = dict(result["cells"])
        values = [cells.pop(column, "–") for column in COLUMNS]
        also = ", ".join(k if v == "ok" else f"**{k}: {v}**" for k, v in cells.items())
        rows.append([name, result["version"], *values, also])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True, help="Folder of the clients.")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--only", help="Clients, separated by commas.")
    parser.add_argument("--full", action="store_true", help="Keep the result.")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(PROGRAMS)
    environment = arguments.environment.resolve()
    prepare(environment)
    bundle, about, grpc_port = demo_bundle(arguments.bundle), machine(), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = write_inputs(bundle, folder)
        options = ["--grpc-port", str(grpc_port), "--model-control", "--log-format", "json"]
        command = [*ours(bundle, *options), "--log-level", "info"]
        with server(command, log=folder / "service.log") as running:
            served = Served(
                f"127.0.0.1:{running.port}",
                f"127.0.0.1:{grpc_port}",
                bundle,
                folder,
                shape,
                environment,
            )
            found = {name: asked(served, name) for name in names}
    print(table(found), file=sys.stderr)
    held = {
        f"{name}: every call it has is answered": set(result["cells"].values()) == {"ok"}
        for name, result in found.items()
        if result["version"] != "not installed here"
    }
    finish("clients", {"machine": about, "clients": found}, held, keep=arguments.full)


if __name__ == "__main__":
    main()
