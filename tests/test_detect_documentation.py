"""docs/detect.md, typed: a checkpoint to a bundle, files, scores and a service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from examples.streets.instances import CLASSES, coco_annotations, draw_instances
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.runtime import open_session
from tests.reference.networks import small_detector
from tests.serve.conftest import typed
from tests.serve.kserve.conftest import free_port
from tests.test_cli import fdconv

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "detect.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\$ (.+)$", TEXT, re.M)
COMMANDS = [line.split()[1:] for line in LINES if line.startswith("fdconv")]
CURLS = [line for line in LINES if line.startswith("curl")]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def save_detector(path: Path, seed: int = 0) -> None:
    network = small_detector(classes=len(CLASSES), seed=seed)
    architecture = network.architecture.model_copy(update={"classes": CLASSES})
    save_checkpoint(path, network, architecture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page starts from: a checkpoint, two images, and data annotated as COCO is."""
    made = tmp_path_factory.mktemp("detect")
    save_detector(made / "mask_rcnn.pth")
    (made / "coco" / "val2017").mkdir(parents=True)
    (made / "coco" / "annotations").mkdir()
    scenes = []
    for number in range(3):
        image, things = draw_instances(number)
        Image.fromarray(image).save(made / "coco" / "val2017" / f"{number}.png")
        scenes.append((f"{number}.png", things))
        for name in ("street.jpg", "other.jpg"):
            Image.fromarray(image).save(made / name)
    told = json.dumps(coco_annotations(scenes))
    (made / "coco" / "annotations" / "instances_val2017.json").write_text(told)
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What each command but ``serve`` prints, in the order of the page."""
    patch = pytest.MonkeyPatch()
    found = {}
    with patch.context() as context, pytest.MonkeyPatch.context() as place:
        place.chdir(folder)
        for words in COMMANDS:
            if words[0] == "serve":
                continue
            # Another size than the page's, which takes minutes and gigabytes.
            typed = ["96x128" if word == "800x1344" else word for word in words]
            found[" ".join(words)] = _run(context, typed)
    return found


def _run(patch: pytest.MonkeyPatch, words: list[str]) -> str:
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    out, err = StringIO(), StringIO()

    class Capture:
        def readouterr(self) -> tuple[str, str]:
            return out.getvalue(), err.getvalue()

    with redirect_stdout(out), redirect_stderr(err):
        code, text, _ = fdconv(patch, Capture(), *words)
    assert code == 0, f"{words}: {err.getvalue()}"
    return text


def of(said: dict[str, str], start: str, containing: str = "") -> str:
    return next(out for line, out in said.items() if line.startswith(start) and containing in line)


def test_there_are_lines() -> None:
    assert len(COMMANDS) >= 9
    assert len(CURLS) >= 6
    assert len(SNIPPETS) == 2


def test_inspect_and_verify(said: dict[str, str]) -> None:
    assert "person" in of(said, "inspect")
    for name in ("boxes", "scores", "labels", "count", "masks", "same objects"):
        assert name in of(said, "export")


def test_verify_sums_up_by_what_is_nearest_to_its_own_limit(
    said: dict[str, str], folder: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(folder)
    words = ["verify", "detector", "mask_rcnn.pth", "street.jpg"]
    _, out, _ = fdconv(monkeypatch, capfd, *words, "--json")
    rows = {row["output"]: row for row in json.loads(out)}
    assert rows["masks"]["allowed"] == pytest.approx(10 * rows["scores"]["allowed"])
    nearest = max(rows.values(), key=lambda row: row["max_rel"] / row["allowed"])
    sums_up = f"street.jpg: {nearest['output']} differs from the network's by"
    assert sums_up in of(said, "verify")
    assert "The graph is the network." in of(said, "verify")
    # So strict that float32 itself is past it.
    code, out, err = fdconv(monkeypatch, capfd, *words, "--tolerance", "1e-12")
    assert code == 1
    assert "can tell whether the bundle is the network" in err


def test_verify_with_another_checkpoint(
    said: dict[str, str], folder: Path, monkeypatch, capfd
) -> None:
    save_detector(folder / "other.pth", seed=1)
    monkeypatch.chdir(folder)
    code, _, err = fdconv(monkeypatch, capfd, "verify", "detector", "other.pth", "street.jpg")
    assert code == 1
    assert "the bundle differs from the network" in err
    assert "exported from another file than this one, mask_rcnn.pth" in err


def test_segment(said: dict[str, str], folder: Path) -> None:
    assert "street.json" in of(said, "segment", "results")
    told = json.loads((folder / "results" / "street.json").read_text())
    assert told["instances"]
    numbers = np.asarray(Image.open(folder / "results" / "street.png"))
    first = coco.decode(told["instances"][0]["mask"]).astype(bool)
    assert np.array_equal(numbers == 1, first)
    assert set(told["instances"][0]) == {"label", "class", "score", "box", "area", "mask"}
    for line in of(said, "segment", "few").splitlines():
        assert all(entry["score"] >= 0.5 for entry in json.loads(line)["instances"])
    with open_session(folder / "detector") as session:
        assert len(session.detect(np.asarray(Image.open(folder / "street.jpg")))) > 0


def test_evaluate(said: dict[str, str]) -> None:
    assert "mask AP75" in of(said, "evaluate", "--data coco")
    told = json.loads(of(said, "evaluate", "--json"))
    assert (told["images"], told["sides"][0]["kind"]) == (3, "bundle")
    beside = of(said, "evaluate", "--against")
    (agreement,) = re.findall(r"same objects as the.*?(\d+\.\d+)%.*?(\d+\.\d+)%", beside, re.S)
    assert float(agreement[0]) == float(agreement[1]) == 100


def test_python(said: dict[str, str], folder: Path) -> None:
    _python(SNIPPETS[0], folder)


def _python(code: str, folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def address(said: dict[str, str], folder: Path) -> Iterator[str]:
    """The page's ``fdconv serve``, at a port that is free here."""
    (words,) = [words for words in COMMANDS if words[0] == "serve"]
    port = free_port()
    command = [sys.executable, "-m", "fdconv_deploy", *words, "--port", str(port), "--threads", "1"]
    served = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        _wait(f"http://127.0.0.1:{port}/readyz", served)
        yield f"127.0.0.1:{port}"
    finally:
        served.terminate()
        served.wait(timeout=60)


def _wait(url: str, served: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert served.poll() is None, "the service ended"
        try:
            urllib.request.urlopen(url, timeout=60).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the service did not become ready")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURLS)
def test_curl(line: str, folder: Path, address: str) -> None:
    file = typed(line, folder, address)
    assert file is not None
    if file.suffix == ".json":
        assert json.loads(file.read_text())
    else:
        assert Image.open(file).size == (256, 192)


def test_python_client(folder: Path, address: str) -> None:
    _python(SNIPPETS[1].replace("localhost:8000", address), folder)
