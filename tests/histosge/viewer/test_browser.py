"""The page in a real Chromium: what a person sees, points at and types."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser_page import (
    MEASURED,
    PREDICTED,
    WAIT_MS,
    change,
    middle,
    open_page,
    pixels,
    readout,
    settled,
    still,
)
from viewer_world import GENES, GRID, HALF_WIDTHS, World, serving

from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.collection import Collection

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


def test_a_map_is_drawn_over_the_slide_in_the_right_colours(page: "Page", address: str) -> None:
    open_page(page, address)
    page.locator("#scale").select_option("own")
    page.locator("#opacity").fill("100")
    settled(page, GENES[0])
    picture = pixels(page, PREDICTED)
    tissue = middle(picture)
    # Viridis: low is violet on the left, high is yellow on the right.
    left, right = (
        tissue[:, : tissue.shape[1] // 4].mean((0, 1)),
        tissue[:, -tissue.shape[1] // 4 :].mean((0, 1)),
    )
    assert right[1] > left[1] + 60
    assert right[1] > right[2] + 20
    page.locator("#opacity").fill("0")
    bare = middle(still(page, PREDICTED)).mean((0, 1))
    assert bare[0] > bare[1] + 20, "without the map there is pink tissue"


def test_a_gene_is_searched_by_keyboard_and_only_the_views_change(page: "Page", address: str) -> None:
    open_page(page, address)
    before = {name: pixels(page, name) for name in (MEASURED, PREDICTED)}
    page.locator("#gene").focus()
    page.keyboard.type("b")
    options = page.locator("#genes [role=option]")
    assert [text.split()[0] for text in options.all_inner_texts()] == ["BBB2", "ABC4"]
    page.keyboard.press("ArrowDown")
    assert page.locator("#genes [aria-selected=true]").inner_text().startswith("ABC4")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    settled(page, "BBB2")
    assert page.locator("#genes").is_hidden()
    assert "BBB2 measured" in page.locator("#measured-legend").inner_text()
    assert "BBB2 predicted, log1p of counts per 10,000" in page.locator("#predicted-legend").inner_text()
    assert (
        "90 % prediction interval (donors not considered) ± 0.25; trust 0.50"
        in page.locator("#about-gene").inner_text()
    )
    for name, old in before.items():
        now = pixels(page, name)
        assert change(middle(old), middle(now)) > 0.1
        assert change(old[5:40, 5:60], now[5:40, 5:60]) == 0, "outside the tissue nothing changes"
    assert "gene=BBB2" in page.url


def test_views_zoom_and_move_together_and_tiles_sharpen(page: "Page", address: str) -> None:
    open_page(page, address)
    # Until the slide is ready its thumbnail stands in for it, and what is compared with at the end is the slide itself.
    page.wait_for_selector("body[data-picture=tiles]")
    whole = {name: still(page, name) for name in (MEASURED, PREDICTED)}
    box = page.locator(MEASURED).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    with page.expect_response(re.compile(r"/tiles/\d+/\d+_\d+\.jpg")):
        for _ in range(6):
            page.mouse.wheel(0, -300)
            page.wait_for_timeout(80)
    for name, old in whole.items():
        assert change(old, still(page, name)) > 0.2, name
    # The same place lies under the same pixel of both views.
    said = []
    for name in (MEASURED, PREDICTED):
        box = page.locator(name).bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 100, box["y"] + 100)
        page.wait_for_timeout(50)
        said.append([int(n) for n in re.findall(r"[xy] (-?\d+) µm", readout(page))])
    assert np.abs(np.subtract(*said)).max() <= 2
    page.get_by_role("button", name="Whole slide").click()
    assert change(whole[PREDICTED][5:-40, 5:-5], still(page, PREDICTED)[5:-40, 5:-5]) < 0.02


def test_the_whole_slide_stays_in_sight_when_the_views_change_their_size(page: "Page", address: str) -> None:
    open_page(page, address)
    page.wait_for_selector("body[data-picture=tiles]")

    def fits() -> bool:
        """Tell whether pressing the button for the whole slide changes nothing."""
        before = still(page, PREDICTED)
        page.get_by_role("button", name="Whole slide").click()
        return change(before[5:-40, 5:-5], still(page, PREDICTED)[5:-40, 5:-5]) < 0.02

    page.add_style_tag(content="#notes { min-height: 140px }")
    assert fits()
    page.get_by_role("button", name="Zoom in").click()
    page.add_style_tag(content="#notes { min-height: 20px }")
    assert not fits(), "somebody who looks closer is not moved"


def test_pointing_at_a_patch_reads_its_value_and_the_spots(page: "Page", address: str) -> None:
    open_page(page, address)
    box = page.locator(PREDICTED).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.55)
    page.locator("#readout", has_text="AAA1").wait_for()
    said = readout(page)
    x = int(re.search(r"x (\d+) µm", said)[1])  # type: ignore[index]
    row, column, value = re.search(r"patch row (\d+), column (\d+): AAA1 (\d+\.\d+)", said).groups()  # type: ignore[union-attr]
    assert int(row) > 0
    assert int(column) == (x - 16) // 32
    assert float(value) == pytest.approx(int(column) / 8, abs=0.006)
    page.mouse.move(box["x"] + 8, box["y"] + 8)
    page.locator("#readout", has_text="AAA1").wait_for(state="detached")
    assert "AAA1" not in readout(page)


def test_the_half_width_at_a_patch_is_that_of_its_depth(page: "Page", address: str, world: World) -> None:
    open_page(page, address, "gone")
    box = page.locator(PREDICTED).bounding_box()
    assert box is not None
    assert (
        "80 % prediction interval (donors not considered) ± 0.10 to ± 0.40, by predicted library size"
        in page.locator("#about-gene").inner_text()
    )
    assert "was trained without spots of this slide" in page.locator("#notes").inner_text()
    stored = ExpressionStore.open(str(world.maps)).map("gone", GRID.key)
    strata = stored.read_strata()
    seen = set()
    for share in np.linspace(0.05, 0.95, 19):  # depth grows from top to bottom
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * share)
        found = re.search(
            r"row (\d+), column (\d+): AAA1 [\d.]+ ± ([\d.]+) \(80 % prediction interval \(donors not considered\)\)",
            readout(page),
        )
        if found is not None:  # on tissue
            stratum = strata[int(found[1]), int(found[2])]
            assert float(found[3]) == pytest.approx(HALF_WIDTHS[stratum, 0])
            seen.add(stratum)
    assert len(seen) > 1


def test_a_link_that_names_what_is_not_there_says_so_as_text(page: "Page", address: str) -> None:
    hostile = "<img src=x onerror=document.title=1>"
    page.goto(f"{address}/#slide={hostile}&gene={hostile}")
    page.locator("#notes", has_text=f"The link names slide {hostile}, which is not in this store").wait_for()
    assert page.locator("#notes img").count() == 0


def test_a_link_that_names_an_unknown_gene_says_so_until_one_is_chosen(page: "Page", address: str) -> None:
    page.goto(f"{address}/#slide=here&gene=NOSUCH1")
    settled(page, GENES[0])
    page.locator("#notes", has_text="NOSUCH1 is neither predicted nor measured on this slide").wait_for()
    page.get_by_role("button", name="Next gene").click()
    page.locator("#notes", has_text="NOSUCH1").wait_for(state="detached")
    assert "NOSUCH1" not in page.locator("#notes").inner_text()


def test_everything_is_reached_and_worked_by_keyboard(page: "Page", address: str) -> None:
    open_page(page, address)
    page.locator("body").evaluate("body => { body.tabIndex = -1; body.focus(); }")
    reached: list[str] = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "() => { const e = document.activeElement; return e.id || e.closest('.view')?.id || e.tagName; }"
            )
        )
    wanted = ["slide", "gene", "previous", "next", "show", "layout", "zoom-in", "zoom-out", "home"]
    wanted += ["measured", "predicted", "map", "scale", "opacity"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted
    page.locator(f"{PREDICTED} [role=application]").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    page.locator("#readout", has_text="patch row").wait_for()
    before = readout(page)
    assert page.locator("#readout").get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowRight")
    still(page, PREDICTED)
    moved = readout(page)
    assert moved != before
    page.keyboard.press("r")
    page.keyboard.press("f")
    page.wait_for_timeout(600)
    assert readout(page) == moved, "a view is neither turned nor mirrored"
    page.keyboard.press("0")
    still(page, PREDICTED)
    assert readout(page) == before


def test_every_control_has_a_name_and_text_stands_out(page: "Page", address: str) -> None:
    open_page(page, address)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, [role=application]")]
        .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
        .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    pairs = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, label, button, select, input, figcaption, p, .ends span")]
        .filter((e) => e.offsetParent && (e.textContent.trim() || e.value))
        .map((e) => {
          let ground = e;
          while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
          return [e.outerHTML.slice(0, 60), getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
        })"""
    )
    assert len(pairs) > 20
    for what, ink, ground in pairs:
        assert _contrast(ink, ground) >= 4.5, what


def _contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 between two colours such as ``rgb(1, 2, 3)``."""

    def luminance(colour: str) -> float:
        parts = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_colour_maps_and_domains_recolour_the_patches(page: "Page", address: str) -> None:
    open_page(page, address)
    seen = [pixels(page, PREDICTED)]
    for name in ("magma", "cividis"):
        page.locator("#map").select_option(name)
        settled(page, GENES[0])
        seen.append(pixels(page, PREDICTED))
        assert change(middle(seen[-2]), middle(seen[-1])) > 0.5, name
    page.locator("#show").select_option("domains")
    settled(page, GENES[0])
    assert "domain 1" in page.locator("#predicted-legend").inner_text()
    page.locator("#opacity").fill("100")
    domains = still(page, PREDICTED)
    assert change(middle(seen[-1]), middle(domains)) > 0.5
    # What is drawn at a place is what is read out there: find the border between the two domains in the picture.
    box = page.locator(PREDICTED).bounding_box()
    assert box is not None
    y = domains.shape[0] * 55 // 100
    line = domains[y, int(domains.shape[1] * 0.3) : int(domains.shape[1] * 0.6)]
    border = int(domains.shape[1] * 0.3) + int(np.abs(np.diff(line, axis=0)).sum(axis=1).argmax())
    for x, domain in ((border - 1, 0), (border + 3, 1)):
        page.mouse.move(box["x"] + x, box["y"] + y)
        page.locator("#readout", has_text=f"domain {domain}").wait_for()


def test_slides_are_changed_and_what_is_missing_is_said(page: "Page", address: str) -> None:
    open_page(page, address)
    page.locator("#slide").select_option(label="gone")
    page.locator("#notes", has_text="thumbnail").wait_for()
    assert "there is no slide at" in page.locator("#notes").inner_text()
    settled(page, GENES[0])
    assert page.locator("#measured-panel").is_hidden(), "it has no spots"
    assert middle(pixels(page, PREDICTED)).std() > 5
    page.locator("#slide").select_option(label="bare")
    page.locator("#notes", has_text="histosge predict").wait_for()
    page.wait_for_selector("body[data-picture=tiles]")
    assert "thumbnail" not in page.locator("#notes").inner_text()


def test_the_page_of_files_works_on_any_web_server(page: "Page", world: World, tmp_path: Path) -> None:
    import functools
    import http.server
    import threading

    from histosge.viewer.static_page import export_page

    opened = Collection.open(str(world.store), str(world.maps), str(world.sheet), world.domains, 2.0)
    export_page(opened, tmp_path / "below" / "page", ["AAA1", "CCC3"])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        open_page(page, f"http://127.0.0.1:{server.server_address[1]}/below/page", gene="AAA1")
        assert page.locator("body").get_attribute("data-picture") == "tiles"
        first = pixels(page, PREDICTED)
        page.get_by_role("button", name="Next gene").click()
        settled(page, "CCC3")
        assert change(middle(first), middle(pixels(page, PREDICTED))) > 0.1
        server.shutdown()


def test_a_bookmarked_gene_that_only_the_spots_have_is_shown(page: "Page", address: str) -> None:
    open_page(page, address, gene="ONLY9")
    assert "ONLY9 measured" in page.locator("#measured-legend").inner_text()
    assert "ONLY9 is not predicted here" in page.locator("#predicted-legend").inner_text()


def test_a_server_that_went_away_is_said(browser: "Browser", world: World) -> None:
    opened = browser.new_page()
    opened.set_default_timeout(WAIT_MS)
    with serving(Collection.open(str(world.store), str(world.maps))) as address:
        open_page(opened, address)
    opened.get_by_role("button", name="Next gene").click()
    opened.wait_for_selector("body[data-state=failed]")
    assert opened.locator("#notes").inner_text()
    opened.close()
