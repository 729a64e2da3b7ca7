"""The page of 5,000 slides in a real Chromium, opened from a disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from featurestore.preview.page_folder import PICTURES, PageFolder
from featurestore.preview.slide_card import EmbeddingCard, SlideCard
from featurestore.preview.thumbnail import jpeg

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
N_SLIDES = 5000
HOSTILE = "<img src=x onerror=document.title='hacked'>"


def _card(number: int) -> SlideCard:
    state = "failed" if number % 1000 == 7 else "partial" if number % 500 == 3 else "done"
    return SlideCard(
        f"slide-{number:04d}",
        state,
        reason=HOSTILE if state == "failed" else "",
        size_px=(40_000, 30_000),
        mpp=0.25 if number % 2 else 0.5,
        grid="mpp0.5000_px224_stride224",
        patches=number,
        tissue_share=number / N_SLIDES,
        flags={"pen": 0.4} if number % 100 == 1 else {},
        embeddings=(EmbeddingCard("mpp0.5000_px224_stride224", "uni", state, 3, 7),),
        picture=f"{PICTURES}/one.jpg",
        picture_of="slide",
        shift=1.0,
        is_outlier=number == 4321,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preview") / "page"
    page = PageFolder.open(out, "store")
    page.write_picture(f"{PICTURES}/one.jpg", jpeg(np.full((30, 40, 3), 200, np.uint8)))
    page.finish(map(_card, range(N_SLIDES)), {"kind": "store"})
    return out


@pytest.fixture(scope="module")
def page(folder: Path, chromium_path: str) -> "Iterator[Page]":
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, headless=True, args=flags)
        opened = browser.new_page(viewport={"width": 1200, "height": 800})
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
        opened.goto((folder / "index.html").as_uri())
        opened.wait_for_selector("body[data-state=ready]")
        yield opened
        browser.close()
        assert said == []


def _shown(page: "Page") -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.slide)")


def _reset(page: "Page") -> None:
    for name in ("state", "flag", "encoder", "mpp"):
        page.select_option(f"#{name}", "")
    page.fill("#search", "")
    page.select_option("#sort", "name")


def test_all_slides_are_counted_and_few_are_laid_out_at_once(page: "Page") -> None:
    _reset(page)
    assert "5,000 slides" in page.inner_text("#counts")
    assert "5 failed" in page.inner_text("#counts")
    assert page.inner_text("#pages") == "page 1 of 84, 5,000 of 5,000 slides"
    assert _shown(page) == [f"slide-{number:04d}" for number in range(60)]
    page.click("#next")
    assert _shown(page)[0] == "slide-0060"
    page.click("#previous")
    assert page.is_disabled("#previous")
    image = page.locator(".card img").first
    image.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.card img').naturalWidth === 40")


def test_what_needs_attention_comes_first(page: "Page") -> None:
    _reset(page)
    page.select_option("#sort", "attention")
    first = _shown(page)
    assert first[:5] == [f"slide-{number:04d}" for number in (7, 1007, 2007, 3007, 4007)]
    assert first[5:15] == [f"slide-{number:04d}" for number in range(3, 5000, 500)]
    assert first[15] == "slide-4321"
    assert first[16] == "slide-0001"


def test_filters_and_orders_work_together(page: "Page") -> None:
    _reset(page)
    page.select_option("#flag", "flag:pen")
    page.select_option("#sort", "patches")
    assert page.inner_text("#pages") == "page 1 of 1, 50 of 5,000 slides"
    assert _shown(page)[:2] == ["slide-4901", "slide-4801"]
    page.select_option("#mpp", "0.5")
    assert page.inner_text("#slides") == "No slide matches these choices."
    page.select_option("#mpp", "0.25")
    page.fill("#search", "slide-31")
    assert _shown(page) == ["slide-3101"]


def test_a_card_opens_with_its_reason_as_text(page: "Page") -> None:
    _reset(page)
    page.select_option("#state", "failed")
    page.click("[data-slide='slide-0007']")
    assert page.inner_text("#detail-title") == "slide-0007"
    assert HOSTILE in page.inner_text("#detail-body")
    assert "3 / 7" in page.inner_text("#detail-body")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")
    assert page.title() == "Slides: store"
