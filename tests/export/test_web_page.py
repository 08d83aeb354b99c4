"""The page that segments in a browser: what is written, and the masks that Chromium computes.

It needs the npm package onnxruntime-web, in ``.venv/node_modules`` or where FDCONV_ONNXRUNTIME_WEB
says. FDCONV_SCREENSHOTS=docs writes its picture there.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import export_checkpoint, export_web
from fdconv_deploy.runtime import open_session, read_image
from fdconv_deploy.runtime.postprocessing import logits_of, view_of
from fdconv_deploy.runtime.preprocessing import Prepared, normalise, place, resize
from tests.runtime import toy, toy_detector
from tests.test_cli import fdconv

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "export/targets/web"
PACKAGE = Path(
    os.environ.get("FDCONV_ONNXRUNTIME_WEB", ROOT / ".venv/node_modules/onnxruntime-web")
)
SCREENSHOTS = os.environ.get("FDCONV_SCREENSHOTS")
SIZE = (192, 256)
needs_package = pytest.mark.skipif(
    not PACKAGE.is_dir(),
    reason=f"no onnxruntime-web at {PACKAGE} (npm install --prefix .venv onnxruntime-web@1.30.0)",
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js is installed")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that looks like the npm package, where no browser will read it."""
    from fdconv_deploy.export.targets.web_page import _FILES

    folder = tmp_path / "node_modules/onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"version": "1.2.3"}')
    for name in _FILES:
        (folder / "dist" / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory):
    return toy.make_bundle(tmp_path_factory.mktemp("web") / "bundle")


def javascript(expression: str, **values: object) -> object:
    """What an expression of the page's segmentation.js gives in Node.js, by way of JSON."""
    names = "labels, normalise, place, resize"
    program = (
        f"import {{ {names} }} from {json.dumps((PAGE / 'segmentation.js').as_uri())};\n"
        "import { readFileSync } from 'node:fs';\n"
        f"const {{ {', '.join(values)} }} = JSON.parse(readFileSync(0));\n"
        f"process.stdout.write(JSON.stringify({expression}));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "-e", program],
        input=json.dumps(values), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


class TestFolder:
    def test_holds_all_that_the_page_loads(self, toy_bundle, package, tmp_path):
        page = export_web(toy_bundle, tmp_path / "page", onnxruntime_web=package)
        described = json.loads((page / "network.json").read_text())
        assert described["bytes"] == (page / "model.onnx").stat().st_size
        assert described["onnxruntime_web"] == "1.2.3"
        assert described["classes"] == [f"class {n}" for n in range(5)]
        here = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
        texts = {name: (page / name).read_text() for name in here if name.endswith(("js", "html"))}
        for name, text in texts.items():
            assert not re.findall(r"https?://", text), name
            for found in re.findall(r"(?:src|href|from |Worker\()=?\"\.?/?([\w./-]+)\"", text):
                assert found in here, name

    def test_package_is_found_as_node_finds_it(self, toy_bundle, package, tmp_path, monkeypatch):
        below = tmp_path / "a/b"
        below.mkdir(parents=True)
        monkeypatch.chdir(below)
        assert export_web(toy_bundle, "page") == below / "page"
        (package / "package.json").unlink()
        with pytest.raises(ExportError, match=r"onnxruntime-web is not in node_modules of .* npm"):
            export_web(toy_bundle, "other")

    def test_refusals_are_sentences(self, toy_bundle, package, tmp_path):
        page = tmp_path / "page"
        detector = toy_detector.make_bundle(tmp_path / "detector")
        export_web(toy_bundle, page, onnxruntime_web=package)
        (tmp_path / "full").mkdir()
        (tmp_path / "full/mine.txt").write_text("mine")
        for bundle, output, message in (
            (toy_bundle, page, "exists already"),
            (toy_bundle, tmp_path / "full", "is no page's folder .*, so it is left alone"),
            (detector, tmp_path / "new", "the page segments images, and the bundle is of a detec"),
        ):
            with pytest.raises(ExportError, match=message):
                export_web(bundle, output, onnxruntime_web=package)
        export_web(toy_bundle, page, onnxruntime_web=package, overwrite=True)
        (page / "mine.txt").write_text("mine")
        with pytest.raises(ExportError, match=r"it holds mine.txt\), so it is left alone"):
            export_web(toy_bundle, page, onnxruntime_web=package, overwrite=True)
        assert (page / "mine.txt").is_file()
        (package / "dist/ort.wasm.bundle.min.mjs").unlink()
        with pytest.raises(ExportError, match=r"1\.2\.3, without the file dist/ort.wasm.bundle"):
            export_web(toy_bundle, tmp_path / "new", onnxruntime_web=package)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"resample": "pillow"}, "needs Pillow's way to resize"),
            ({"to_float32": True}, "needs pixels resized as float32"),
        ],
    )
    def test_steps_that_the_page_lacks_are_refused(self, package, tmp_path, fields, message):
        network = toy.architecture(preprocessing=Preprocessing(**fields))
        bundle = toy.make_bundle(tmp_path / "bundle", arch=network)
        with pytest.raises(ExportError, match=message):
            export_web(bundle, tmp_path / "page", onnxruntime_web=package)

    def test_command_line(self, toy_bundle, package, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        page = tmp_path / "-page"  # as it is, "-d -page" would be two options
        arguments = ["export", toy_bundle.path, "-o", page.name, "--format", "web"]
        arguments += ["--onnxruntime-web", package]
        code, out, err = fdconv(monkeypatch, capfd, *arguments)
        assert code == 0, err
        assert f"python -m http.server -d {page}" in out
        code, _, err = fdconv(monkeypatch, capfd, *arguments[:-1], tmp_path)
        assert code == 1
        assert "exists already" in err


@needs_node
class TestArithmetic:
    """The page's steps against the session's, on the same numbers."""

    @pytest.mark.parametrize("size", [(48, 64), (37, 91), (150, 40), (5, 7), (96, 128), (32, 48)])
    def test_resize_is_opencvs_to_the_bit(self, size):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        rgba = np.dstack([image, np.full(size, 255, np.uint8)])
        found = javascript(
            "[...resize(Uint8Array.from(pixels), size, [48, 64])]",
            pixels=rgba.reshape(-1).tolist(), size=size,
        )  # fmt: skip
        assert np.array_equal(np.reshape(found, (48, 64, 3)), resize(image, 48, 64))

    @pytest.mark.parametrize("turned", [False, True])
    def test_normalise_gives_the_same_floats(self, turned):
        how = Preprocessing(bgr_to_rgb=not turned, loading="color")
        image = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        network = {"height": 4, "width": 7, "mean": how.mean, "std": how.std}
        found = javascript(
            "[...normalise(rgb, [3, 5], network)]",
            rgb=image.reshape(-1).tolist(), network={**network, "reversed": how.reversed},
        )  # fmt: skip
        expected = normalise(image, how, (4, 7))
        assert np.array_equal(np.float32(found).reshape(expected.shape), expected)

    @pytest.mark.parametrize("fit", ["stretch", "pad"])
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"scale": (64, 32)},
            {"scale": (64, 48), "keep_ratio": False},
            {"scale": (60, 40), "size_divisor": 16},
        ],
    )
    def test_place_is_the_sessions(self, fit, fields):
        how = Preprocessing(**fields)
        sizes = [(48, 64), (30, 45), (100, 400), (400, 90), (47, 64), (1, 1), (41, 61)]
        network = {"height": 48, "width": 64, "fit": fit, "scale": how.scale,
                   "keep_ratio": how.keep_ratio, "size_divisor": how.size_divisor}  # fmt: skip
        found = javascript(
            "sizes.map((size) => place(size, network))", sizes=sizes, network=network
        )
        placed = [place(size, (48, 64), how, fit) for size in sizes]
        assert found == [list(covered) for _, covered in placed]

    @pytest.mark.parametrize("align", [False, True])
    @pytest.mark.parametrize("classes", [1, 5])
    def test_labels_are_the_highest_of_the_resized(self, align, classes):
        logits = np.random.default_rng(2).standard_normal((classes, 12, 16)).astype(np.float32)
        covered, image = (40, 64), (75, 120)
        network = {"height": 48, "width": 64, "align_corners": align, "threshold_logit": 0.25}
        found = javascript(
            "[...labels(logits, [classes, 12, 16], network, covered, image)]",
            logits=logits.reshape(-1).tolist(), classes=classes, network=network,
            covered=covered, image=image,
        )  # fmt: skip
        prepared = Prepared({}, (48, 64), "resized", covered, image)
        _, rows, columns, _ = view_of(logits, prepared, align_corners=align)
        low, high = (taps.matrix(0, taps.size).astype(float) for taps in (rows, columns))
        spans = rows.span(0, rows.size), columns.span(0, columns.size)
        part = logits[:, slice(*spans[0]), slice(*spans[1])].astype(float)
        exact = low @ part @ high.T
        chosen = np.reshape(found, image)
        if classes == 1:
            near = np.abs(exact[0] - 0.25) < 1e-5
            assert (near | (chosen == (exact[0] > 0.25))).all()
        else:
            taken = np.take_along_axis(exact, chosen[None], 0)[0]
            assert (taken >= exact.max(0) - 1e-5).all()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    bundle = tmp_path_factory.mktemp("web") / "bundle"
    export_checkpoint(packaged_checkpoint(), bundle, size=SIZE)
    with open_session(bundle, native=False) as session:
        yield session


@pytest.fixture(scope="module")
def url(session, tmp_path_factory) -> Iterator[str]:
    """As ``python -m http.server`` serves the folder."""
    folder = tmp_path_factory.mktemp("web") / "page"
    export_web(session.bundle, folder, onnxruntime_web=PACKAGE)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(url):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from benchmarks.screenshots import browser, find_browser

    if find_browser() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with browser() as opened:
        tab = opened.new_page(viewport={"width": 1000, "height": 760})
        tab.asked, tab.failed = [], []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.on("pageerror", lambda error: tab.failed.append(str(error)))
        tab.goto(f"{url}?provider=wasm")
        wait(tab, "Ready")
        yield tab


def wait(page, start: str) -> str:
    from playwright.sync_api import expect

    settled = re.compile(f"^{start}|cannot|rror|expected")
    expect(page.locator("#status")).to_have_text(settled, timeout=240_000)
    said = page.inner_text("#status")
    assert said.startswith(start), said
    return said


def labels_on(page, file: Path) -> np.ndarray:
    page.evaluate("() => { document.querySelector('#status').textContent = ''; }")
    page.set_input_files("#file", str(file))
    wait(page, "Done")
    shown = page.evaluate("() => [[...segmented().labels], segmented().size]")
    return np.reshape(shown[0], shown[1])


def near_ties_alone(session, image: np.ndarray, found: np.ndarray) -> int:
    """How many labels differ from the session's; all where two logits are almost equal."""
    right = session.segment(image).labels
    assert found.shape == right.shape
    prepared = session.segmentation.prepare(image)
    logits = session.run(prepared.inputs["images"][None])[0]
    full = logits_of(view_of(logits, prepared, align_corners=False))
    two = np.sort(full, axis=0)[-2:]
    other = found != right
    assert (two[1] - two[0])[other].max(initial=0) <= 1e-4 * np.abs(full).max()
    return int(other.sum())


@needs_package
class TestInChromium:
    def test_masks_of_packaged_scenes_are_the_sessions(self, page, session, proved):
        times, others, pixels = [], 0, 0
        for file, _ in held_out()[:4]:
            image = read_image(file)
            found = labels_on(page, file)
            others += near_ties_alone(session, image, found)
            pixels += found.size
            times.append(page.inner_text("#status"))
        proved(
            f"onnxruntime-web in Chromium: {others} of {pixels:,} pixels differ from the session"
        )
        print(*times, sep="\n")

    def test_mask_of_another_size_is_the_sessions(self, page, session, tmp_path):
        picture = Image.open(held_out()[5][0]).resize((511, 333))
        picture.save(tmp_path / "large.png")
        image = read_image(tmp_path / "large.png")
        near_ties_alone(session, image, labels_on(page, tmp_path / "large.png"))

    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_colours_beneath_transparency_are_the_sessions(self, page, session, tmp_path, suffix):
        """A canvas has none: most of this mask would be a black image's."""
        picture = Image.open(held_out()[0][0]).convert("RGB")
        alpha = np.zeros(picture.size[::-1], np.uint8)
        alpha[:, ::3], alpha[:, 1::3] = 255, 3
        picture.putalpha(Image.fromarray(alpha))
        file = tmp_path / f"holes.{suffix}"
        picture.save(file, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        assert near_ties_alone(session, read_image(file), labels_on(page, file)) == 0

    def test_page_fetches_nothing_from_elsewhere(self, page, url):
        labels_on(page, held_out()[0][0])
        assert page.asked
        assert all(address.startswith((url, "blob:", "data:")) for address in page.asked)
        assert page.failed == []

    def test_file_that_is_no_image_is_a_sentence(self, page, tmp_path):
        (tmp_path / "notes.png").write_text("not a picture")
        page.set_input_files("#file", str(tmp_path / "notes.png"))
        from playwright.sync_api import expect

        said = "notes.png is no image that this browser can decode"
        expect(page.locator("#status")).to_contain_text(said, timeout=60_000)

    def test_answer_of_a_replaced_image_is_not_shown(self, page, tmp_path):
        """Two images in a row: the first one's mask is never laid over the second."""
        pictures = [held_out()[0][0], tmp_path / "small.png"]
        Image.open(held_out()[5][0]).resize((100, 150)).save(pictures[1])
        page.evaluate(
            """async (images) => {
              const files = await Promise.all(images.map(async (bytes) => {
                const data = new DataTransfer();
                data.items.add(new File([Uint8Array.from(bytes)], "a.png", { type: "image/png" }));
                return data.files;
              }));
              globalThis.said = [];
              const status = document.querySelector("#status");
              const canvas = document.querySelector("#mask");
              new MutationObserver(() => {
                if (!status.textContent.startsWith("Done")) return;
                said.push([segmented().size, [canvas.height, canvas.width]]);
              }).observe(status, { childList: true });
              status.textContent = "";
              for (const each of files) {
                document.querySelector("#file").files = each;
                document.querySelector("#file").dispatchEvent(new Event("change"));
                while (status.textContent !== "Segmenting …") {
                  await new Promise((done) => setTimeout(done));
                }
              }
            }""",
            [list(file.read_bytes()) for file in pictures],
        )
        page.wait_for_function("() => said.some(([size]) => size[0] === 150)", timeout=120_000)
        assert page.evaluate("said") == [[[150, 100], [150, 100]]]

    def test_picture_for_the_documentation(self, page):
        labels_on(page, held_out()[0][0])
        assert page.locator("#legend li").count() >= 5
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        if SCREENSHOTS:
            page.screenshot(path=Path(SCREENSHOTS, "web-page.png"), full_page=True)
