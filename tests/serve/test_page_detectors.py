"""The page on a detector: masks, boxes, and the score from which they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, running
from tests.serve.test_page import SCREENSHOTS, browser, canvas, done, shot

__all__ = ["browser"]


@pytest.fixture(scope="module")
def url(detectors: list[Path], bundles: list[Path]) -> Iterator[str]:
    with running([*detectors, bundles[0]], settings=Settings(threads=1)) as address:
        yield address


@pytest.fixture
def page(browser, url: str) -> Iterator:
    opened = browser.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(url)
    opened.wait_for_selector("#card dd")
    yield opened
    assert wrong == []
    opened.close()


def painted(page, name: str) -> bool:
    """Whether a canvas has a pixel that is not transparent."""
    return page.evaluate(
        """name => { const c = document.getElementById(name);
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data
            .some((value, at) => at % 4 === 3 && value) }""",
        name,
    )


@pytest.mark.skipif(not SCREENSHOTS, reason="a picture for the guide, when it is asked for")
def test_picture(browser, tmp_path: Path) -> None:
    """FDCONV_SCREENSHOTS=docs/serving: the trained detector's answer is worth looking at."""
    from fdconv_deploy.demo import packaged_detector
    from fdconv_deploy.export import export_checkpoint

    bundle = export_checkpoint(packaged_detector(), tmp_path / "streets", size=(192, 256))
    with running([bundle.path], settings=Settings(threads=1)) as url:
        opened = browser.new_page(viewport={"width": 1000, "height": 800})
        opened.goto(url)
        opened.wait_for_selector("#card dd")
        opened.click(".samples button >> nth=3")
        done(opened)
        shot(opened, "page-detector")
        opened.close()


def upload(page, png: bytes) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png})
    done(page)


def test_masks_and_boxes(page, detectors: list[Path], picture, png: bytes) -> None:
    upload(page, png)
    with open_session(detectors[0], threads=1) as session:
        found = session.detect(picture).kept(0.3)
    numbers = found.instance_map()
    expected = np.zeros((50, 70, 4), np.uint8)
    for number, label in enumerate(found.labels.tolist(), 1):
        expected[numbers == number] = (*found.palette[label], 255)
    assert np.array_equal(canvas(page, "mask"), expected)
    assert painted(page, "boxes")
    counts = page.locator("#legend td:nth-child(2)").all_text_contents()
    assert sum(map(int, counts)) == len(found)
    assert page.text_content("#share-title") == "Objects"
    assert "masks" in page.text_content("#card")


def test_the_least_score(page, png: bytes) -> None:
    upload(page, png)
    few = int((canvas(page, "mask")[..., 3] > 0).sum())
    page.fill("#score", "0")
    assert page.text_content("#least") == "0.00"
    assert int((canvas(page, "mask")[..., 3] > 0).sum()) >= few
    page.fill("#score", "100")
    assert not painted(page, "mask")
    assert not painted(page, "boxes")
    assert "no object" in page.text_content("#mask-words")


def test_hiding_a_class(page, png: bytes) -> None:
    upload(page, png)
    for _ in range(page.locator("#legend input:checked").count()):
        page.uncheck("#legend input:checked >> nth=0")
    assert not painted(page, "mask")
    assert not painted(page, "boxes")


def test_models_of_both_kinds(page, png: bytes) -> None:
    for name, objects in (("street", False), ("boxes", True), ("street", False), ("things", True)):
        page.select_option("#model", name)
        upload(page, png)
        assert page.is_visible("#boxes") == page.is_visible("#score-field") == objects
        assert painted(page, "mask") == (name != "boxes")
        page.evaluate("document.getElementById('status').textContent = ''")
