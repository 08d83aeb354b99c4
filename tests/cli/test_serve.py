"""`fdconv serve --settings FILE`: what is typed wins over the file, whatever its value."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fdconv_deploy import serve
from fdconv_deploy.cli.app import app
from fdconv_deploy.cli.serve import serve as serve_command
from fdconv_deploy.serve import Settings


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run ``fdconv serve`` with a file of settings; the settings the service would start with."""

    def run(file: dict[str, Any] | None, *options: str) -> Settings:
        started: list[Settings] = []
        monkeypatch.setattr(
            serve, "run", lambda bundles, host, port, settings, **_: started.append(settings)
        )
        arguments = ["serve", "bundle", *options]
        if file is not None:
            path = tmp_path / "settings.json"
            path.write_text(json.dumps(file))
            arguments += ["--settings", str(path)]
        answer = CliRunner().invoke(app, arguments)
        assert answer.exit_code == 0, answer.output
        return started[0]

    return run


# An option, its setting, another value for the file, the option's value typed, and the setting
# then. Each is typed with its own default where it has one: that is a choice as well.
TYPED = [
    ("--backend", "backend", "onnxruntime-cpu", "auto", "auto"),
    ("--threads", "threads", 3, "1", 1),
    ("--workers", "workers", 3, "1", 1),
    ("--isolation", "isolation", "process", "thread", "thread"),
    ("--queue", "queue_limit", 3, "16", 16),
    ("--batch-delay-ms", "batch_delay_ms", 3.5, "0", 0.0),
    ("--load", "load", "demand", "start", "start"),
    ("--memory-budget-mb", "memory_budget_bytes", 3, "1", 1 << 20),
    ("--reload-seconds", "reload_seconds", 3.5, "0", 0.0),
    ("--grpc-port", "grpc_port", 3, "0", 0),
    ("--root-path", "root_path", "/other", "/seg", "/seg"),
    ("--log-format", "log_format", "json", "text", "text"),
]


@pytest.mark.parametrize(("option", "setting", "other", "value", "expected"), TYPED)
def test_the_typed_option_wins(ran, option, setting, other, value, expected) -> None:
    assert getattr(ran({setting: other}, option, value), setting) == expected
    assert getattr(ran({setting: other}), setting) == other
    assert getattr(ran(None, option, value), setting) == expected


def test_a_typed_flag_wins(ran) -> None:
    assert ran({"model_control": False}, "--model-control").model_control is True
    assert ran({"model_control": True}).model_control is True


def test_typed_files_win(ran, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("typed\n")
    file = {"api_keys": ["other"], "tls_certificate": "a.pem", "tls_key": "a.key"}
    options = ["--api-keys", str(tmp_path / "keys"), "--tls-certificate", "b.pem"]
    found = ran(file, *options, "--tls-key", "b.key")
    assert [key.get_secret_value() for key in found.api_keys] == ["typed"]
    assert (found.tls_certificate, found.tls_key) == (Path("b.pem"), Path("b.key"))
    found = ran(file)
    assert [key.get_secret_value() for key in found.api_keys] == ["other"]
    assert found.tls_certificate == Path("a.pem")


def test_every_option_that_is_a_setting_is_among_these() -> None:
    options = {option.removeprefix("--").replace("-", "_") for option, *_ in TYPED}
    options = {"queue_limit" if option == "queue" else option for option in options}
    flags_and_files = {"model_control", "api_keys", "tls_certificate", "tls_key"}
    no_settings = {"context", "bundles", "host", "port", "log_level", "settings", "ray"}
    assert set(signature(serve_command).parameters) == options | flags_and_files | no_settings


def test_settings_are_read_as_editors_write_them_or_refused(ran, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"workers": 3}', encoding="utf-8-sig")
    assert ran(None, "--settings", str(file)).workers == 3
    file.write_text("[" * 100_000)
    answer = CliRunner().invoke(app, ["serve", "bundle", "--settings", str(file)])
    assert "are not JSON" in str(answer.exception)


def test_nothing_typed_and_no_file_is_the_default(ran) -> None:
    assert ran(None) == Settings()
