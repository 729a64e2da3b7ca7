"""What tests do with the page in Chromium: open it, look at its pixels, read what it says."""

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from viewer_world import GENES

if TYPE_CHECKING:
    from playwright.sync_api import Page

WAIT_MS = 60_000
MEASURED, PREDICTED = "#measured", "#predicted"


def open_page(page: "Page", address: str, slide: str = "here", gene: str = GENES[0]) -> None:
    page.goto(f"{address}/#slide={slide}&gene={gene}")
    settled(page, gene)
    page.wait_for_selector("body[data-picture]")
    page.wait_for_timeout(400)  # tiles fade in


def settled(page: "Page", gene: str) -> None:
    page.wait_for_selector(f"body[data-state=ready][data-gene={gene}]")
    page.wait_for_timeout(120)


def pixels(page: "Page", selector: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def still(page: "Page", selector: str) -> np.ndarray:
    """Return the pixels of a view once they stay the same: its movement is over and its tiles are there."""
    seen = pixels(page, selector)
    same = 0
    for _ in range(60):
        page.wait_for_timeout(250)
        now = pixels(page, selector)
        same = same + 1 if np.array_equal(seen, now) else 0
        seen = now
        if same == 4:
            break
    return seen


def middle(picture: np.ndarray) -> np.ndarray:
    """The part of a view in which the tissue lies when the whole slide is shown."""
    height, width = picture.shape[:2]
    return picture[int(height * 0.4) : int(height * 0.7), int(width * 0.3) : int(width * 0.6)]


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pixels that changed visibly."""
    return float((np.abs(before - after).max(axis=2) > 12).mean())


def readout(page: "Page") -> str:
    return page.locator("#readout").inner_text()
