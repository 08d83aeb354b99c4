"""The real Triton Inference Server (2.51) of the PyPI package nvidia-pytriton, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.harness import Server, free_port, server

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def prepare(environment: Path) -> None:
    """Install the server in the folder ``environment``, unless a former run did.

    It takes the Python version of this process: of each there is a stub in the package.
    """
    done = environment / "installed"
    if done.is_file() and done.read_text() == REQUIREMENTS.read_text():
        return
    venv.create(environment, with_pip=True, symlinks=True)
    pip = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-r", REQUIREMENTS], check=True)
    # As pytriton itself does it: the backend with the stub of one Python version beside it.
    package = _packages(environment) / "pytriton" / "tritonserver"
    backends = environment / "backends"
    shutil.copytree(package / "backends", backends, dirs_exist_ok=True)
    stub = backends / "python" / "triton_python_backend_stub"
    shutil.copyfile(package / "python_backend_stubs" / VERSION / stub.name, stub)
    stub.chmod(0o755)
    done.write_text(REQUIREMENTS.read_text())


@contextmanager
def tritonserver(
    environment: Path, repository: Path, log: Path, *options: str, python: Path | None = None
) -> Iterator[tuple[Server, str]]:
    """Run the server of an environment that :func:`prepare` made until its models are loaded.

    Args:
        environment: its folder.
        repository: the models.
        log: file of what it says.
        options: of its command line.
        python: the environment whose packages models see, if not this one: that of the first
            python3 on the path. Of PYTHONPATH they see nothing; of the current folder they do.

    Yields:
        The server, and its gRPC address.
    """
    packages, grpc = _packages(environment), free_port()
    command = [
        "env",
        f"LD_LIBRARY_PATH={packages / 'nvidia_pytriton.libs'}",
        f"PATH={(python or environment) / 'bin'}:{os.environ['PATH']}",
        str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={environment / 'backends'}",
        *("--http-address=127.0.0.1", "--http-port={port}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--allow-gpu-metrics=false", "--exit-timeout-secs=5"),
        *options,
    ]
    with server(command, ready="/v2/health/ready", log=log) as running:
        yield running, f"127.0.0.1:{grpc}"


def _packages(environment: Path) -> Path:
    return environment / "lib" / f"python{VERSION}" / "site-packages"
