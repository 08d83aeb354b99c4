"""The page at / and the documentation, in a real browser where there is one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.serve import Settings, running

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
# Written where a person asks for it: FDCONV_SCREENSHOTS=docs pytest tests/serve/test_page.py
SCREENSHOTS = os.environ.get("FDCONV_SCREENSHOTS")


class TestWithoutABrowser:
    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_fetches_nothing_from_elsewhere(self, client: TestClient, path: str) -> None:
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        texts = [answer.text]
        for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
            found = client.get(name)
            assert found.status_code == 200
            texts.append(found.text)
        for text in texts:
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)

    def test_samples(self, client: TestClient) -> None:
        names = client.get("/samples").json()["samples"]
        assert len(names) == 6
        for name in names:
            assert client.get(f"/samples/{name}").headers["content-type"] == "image/jpeg"
        assert client.get("/samples/__init__.py").status_code == 404

    def test_nothing_else(self, client: TestClient) -> None:
        for name in ("/static/app.py", "/static/", "/static/index.html/x", "/samples/x"):
            assert client.get(name).status_code == 404


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def url(bundles: list[Path]) -> Iterator[str]:
    bundle = ROOT / "demo-output" / "bundle"
    # The trained network where it has been exported: its masks are worth looking at.
    shown = SCREENSHOTS and bundle.is_dir()
    with running([bundle] if shown else bundles, settings=Settings(threads=1)) as address:
        yield address


@pytest.fixture
def page(browser, url: str) -> Iterator:
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    opened = context.new_page()
    strangers: list[str] = []
    wrong: list[str] = []
    opened.on(
        "request",
        lambda request: (
            strangers.append(request.url)
            if not request.url.startswith((url, "blob:", "data:"))
            else None
        ),
    )
    opened.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(url)
    opened.wait_for_selector("#card dd")
    yield opened
    assert strangers == []
    assert [text for text in wrong if "415" not in text] == []
    context.close()


def done(page) -> None:
    page.wait_for_selector("#status:has-text('Done')")


def shot(page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=str(ROOT / SCREENSHOTS / f"{name}.png"), full_page=True)


def canvas(page, name: str) -> np.ndarray:
    found = page.evaluate(
        """name => { const c = document.getElementById(name);
        const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [c.height, c.width, [...pixels]] }""",
        name,
    )
    return np.array(found[2], np.uint8).reshape(found[0], found[1], 4)


def test_a_sample(page) -> None:
    assert not page.is_visible("#key")
    page.click(".samples button >> nth=1")
    done(page)
    shot(page, "page-light")
    mask = canvas(page, "mask")
    assert mask.shape[:2] == canvas(page, "image").shape[:2]
    assert (mask[..., 3] == 255).all()
    rows = page.locator("#legend tr").count()
    assert rows == len(np.unique(mask.reshape(-1, 4), axis=0))
    assert page.locator("#times tr").count() == 7
    assert page.get_attribute(".samples button >> nth=1", "aria-pressed") == "true"


def test_an_upload_and_its_areas(page, picture, png: bytes) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png})
    done(page)
    assert np.array_equal(canvas(page, "image")[..., :3], picture)
    pixels = [
        int(text.replace(",", ""))
        for text in page.locator("#legend td:nth-child(3)").all_text_contents()
    ]
    assert sum(pixels) == 50 * 70
    assert pixels == sorted(pixels, reverse=True)


def test_a_drop(page, png: bytes) -> None:
    page.evaluate(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));
        document.getElementById('drop').dispatchEvent(
            new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})) }""",
        list(png),
    )
    done(page)


def test_opacity_and_hiding_a_class(page, png: bytes) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png})
    done(page)
    page.fill("#opacity", "20")
    assert page.evaluate("getComputedStyle(document.getElementById('mask')).opacity") == "0.2"
    assert page.text_content("#percent") == "20 %"
    page.uncheck("#legend tr:first-child input")
    area = page.text_content("#legend tr:first-child td:nth-child(3)").replace(",", "")
    assert int((canvas(page, "mask")[..., 3] == 0).sum()) == int(area)


def test_what_is_no_image(page) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"<svg>"})
    page.wait_for_selector("#status.wrong")
    assert "JPEG, PNG, WebP" in page.text_content("#status")


def test_by_keyboard_alone(page) -> None:
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "BUTTON":
            break
    assert seen[0] == "A"  # the link past it all
    assert "model" in seen
    assert "file" in seen
    page.keyboard.press("Enter")
    done(page)
    page.focus("#opacity")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#percent") == "56 %"


def test_to_a_screen_reader(page, png: bytes) -> None:
    """Everything that acts has a name, the status is announced, the mask is put into words."""
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png})
    done(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, a, canvas')].filter(e =>
        !(e.labels?.length || e.textContent.trim() || e.ariaLabel ||
          e.getAttribute('aria-labelledby') || e.querySelector('img[alt]')))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert re.match(r"70 × 50 pixels: .+ \d+(\.\d)? %", page.text_content("#mask-words"))
    assert page.locator("h1").count() == 1
    assert page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.click(".samples button >> nth=2")
    done(page)
    if scheme == "dark":
        shot(page, "page-dark")
    ratios = page.evaluate(
        """() => { const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number)
            .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b };
        const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (c !== 'rgba(0, 0, 0, 0)') return c } };
        return [...document.querySelectorAll('h1, h2, p, td, th, dt, dd, label, a:not(.skip)')]
            .filter(e => e.checkVisibility() && e.textContent.trim()).map(e => {
            const a = lum(getComputedStyle(e).color), b = lum(ground(e));
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }) }"""
    )
    assert min(ratios) >= 4.5


def test_narrow(page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.click(".samples button >> nth=0")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, "page-narrow")


def test_documentation(page, url: str) -> None:
    page.goto(f"{url}/docs")
    page.wait_for_selector("#docs[aria-busy=false]")
    text = page.text_content("#docs")
    for path in ("/v1/segment", "/v2/models/{name}/infer", "/metrics"):
        assert path in text
    page.click("summary:has-text('/v1/segment')")
    assert page.locator("details[open] td").count() > 20


def test_the_key_is_asked_for(browser, bundles: list[Path]) -> None:
    with running(bundles, settings=Settings(threads=1, api_keys=("k",))) as address:
        opened = browser.new_page()
        opened.goto(address)
        opened.wait_for_selector("#key", state="visible")
        opened.fill("#key", "k")
        opened.press("#key", "Tab")
        opened.wait_for_selector("#card dd")
        opened.click(".samples button >> nth=0")
        done(opened)
        opened.close()
