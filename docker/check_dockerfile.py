"""Run a Dockerfile's build steps without Docker: ``python docker/check_dockerfile.py FILE``.

What COPY brings is copied into an empty folder, the RUN steps that install run there in a venv,
and the image's own command, with tracing and gRPC besides, health check and user's needs are tried
on a bundle; where a compiler is installed, the native operators must have been built. The base
image, ``useradd`` and the layers themselves are not proved; nothing of the source tree is
reachable.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions(path: Path) -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.M)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def main() -> None:
    """Prove one Dockerfile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo-output" / "bundle")
    arguments = parser.parse_args()
    found = instructions(arguments.dockerfile)
    with tempfile.TemporaryDirectory() as folder:
        source, prefix = Path(folder, "source"), Path(folder, "opt", "fdconv")
        source.mkdir()
        for word, rest in found:
            if word == "COPY" and not rest.startswith("--from"):
                *names, target = rest.split()
                for name in names:
                    _copy(ROOT / name, source, target)
            elif word == "RUN" and "/opt/fdconv" in rest:
                command = rest.replace("/opt/fdconv", str(prefix))
                command = command.replace("python -m venv", f"{sys.executable} -m venv")
                print(f"$ {command}", flush=True)
                subprocess.run(["bash", "-ec", command], cwd=source, check=True, env=_clean())
        shutil.rmtree(source)
        _serve(found, prefix, arguments.bundle, Path(folder))
    print("proved")


def _copy(path: Path, source: Path, target: str) -> None:
    place = source / target
    ignore = shutil.ignore_patterns("__pycache__", "fdconv_native_*.so")  # as .dockerignore
    if path.is_dir():
        shutil.copytree(path, place, ignore=ignore)
    else:
        shutil.copy(path, place / path.name if target.endswith("/") else place)


def _clean() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "PATH", "HOME", "LANG"))}
    return {**kept, "PYTHONNOUSERSITE": "1"}


class _Collector(ThreadingHTTPServer):
    """Takes OpenTelemetry's spans as a collector does; ``spans`` counts the messages."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.spans = 0
        self.environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Export(BaseHTTPRequestHandler):
    server: _Collector

    def do_POST(self) -> None:
        """One message of spans."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.spans += self.path == "/v1/traces"
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(found: list[tuple[str, str]], prefix: Path, bundle: Path, folder: Path) -> None:
    models = folder / "models"
    shutil.copytree(bundle, models / bundle.name)
    words = dict(found)
    port, grpc_port = _free_port(), _free_port()
    settings = folder / "settings.json"
    settings.write_text(json.dumps({"tracing": True, "grpc_port": grpc_port}))
    command = [*json.loads(words["ENTRYPOINT"]), *json.loads(words["CMD"])]
    replaced = {"8000": str(port), "0.0.0.0": "127.0.0.1", "/models": str(models)}
    command = [replaced.get(word, word) for word in command]
    command = [str(prefix / "bin" / command[0]), *command[1:], "--settings", str(settings)]
    print(f"$ {' '.join(command)}", flush=True)
    collector = _Collector()
    process = subprocess.Popen(command, cwd=folder, env={**_clean(), **collector.environment})
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        check = json.loads(re.sub(r"^.*?CMD ", "", words["HEALTHCHECK"]))
        code = check[2].replace(":8000", f":{port}")
        subprocess.run([prefix / "bin" / "python", "-c", code], check=True, env=_clean())
        image = ROOT / "examples" / "assets" / "heldout" / "000.png"
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/segment?output=mask",
            data=image.read_bytes(),
            headers={"Content-Type": "image/png"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.read(4) == b"\x89PNG"
        with socket.create_connection(("127.0.0.1", grpc_port), timeout=5):
            pass
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15, 143), process.returncode
        collector.shutdown()
    assert collector.spans, "no spans were sent"
    if any(word == "RUN" and " gcc " in rest for word, rest in found):
        code = "from fdconv_deploy.ops.native import native_library; native_library(True)"
        subprocess.run([prefix / "bin" / "python", "-c", code], check=True, env=_clean())
    subprocess.run([prefix / "bin" / "pip", "check"], check=True, env=_clean())
    installed = subprocess.run(
        [prefix / "bin" / "pip", "list", "--format", "json"],
        check=True,
        capture_output=True,
        env=_clean(),
    )
    names = {package["name"].lower() for package in json.loads(installed.stdout)}
    assert not names & {"torch", "onnx", "onnxscript", "triton"}, "the image holds torch or onnx"
    size = sum(f.stat().st_size for f in prefix.rglob("*") if f.is_file())
    print(f"{len(names)} packages, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
