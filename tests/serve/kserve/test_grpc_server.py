"""What keeps gRPC from being served is said before anything is."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.test_cli import fdconv


@pytest.mark.parametrize(
    ("module", "package"), [("grpc", "grpcio"), ("google.protobuf", "protobuf")]
)
def test_grpc_names_the_package_it_lacks(
    module: str, package: str, bundles: list[Path], monkeypatch, capfd
) -> None:
    monkeypatch.delitem(sys.modules, "fdconv_deploy.serve.kserve.grpc_server", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["serve", bundles[0], "--port", 0, "--grpc-port", 0]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert err.startswith(f"error: The gRPC service needs {package}, which is not installed")
    assert "listening" not in out + err


def test_grpc_refuses_a_taken_port(bundles: list[Path], monkeypatch, capfd) -> None:
    """gRPC itself shares a port with another service, or ends in a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["serve", bundles[0], "--port", 0, "--grpc-port", port]
        code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert err.startswith(f"error: The service cannot listen on 127.0.0.1, port {port}")
    assert "listening" not in out + err


def test_grpc_refuses_the_port_of_http(bundles: list[Path], monkeypatch, capfd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["serve", bundles[0], "--port", port, "--grpc-port", port]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "cannot listen" in err
