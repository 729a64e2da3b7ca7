"""Regions in a real Chromium: drawn, opened, compared, saved; and the view for the whole slide."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser_page import MEASURED, PREDICTED, change, open_page, pixels, settled, still
from viewer_world import GENES, MPP

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def _open_tools(page: "Page", name: str) -> None:
    page.locator(f"#{name}").evaluate("tools => { tools.open = true; }")


def _drag(page: "Page", view: str, places: list[tuple[float, float]]) -> None:
    """Draw with the mouse through places that are shares of a view's sides."""
    box = page.locator(view).bounding_box()
    assert box is not None
    spots = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*spots[0])
    page.mouse.down()
    for spot in spots[1:]:
        page.mouse.move(*spot, steps=6)
    page.mouse.up()


def _place(url: str) -> list[float]:
    """Left, top, width and height of what is in sight, in microns, as the address has them."""
    return [float(n) for n in url.split("at=")[1].split("&")[0].split("%2C")]


def _compared(page: "Page") -> str:
    page.wait_for_selector("body[data-regions]")
    return page.locator("#region-counts").inner_text()


def test_a_lasso_and_a_rectangle_are_drawn_compared_and_saved(page: "Page", address: str) -> None:
    open_page(page, address)
    _open_tools(page, "region-tools")
    before = pixels(page, MEASURED)
    page.get_by_role("button", name="Lasso").click()
    # AAA1 grows to the right: a region on the right has more of it than the rest.
    _drag(page, PREDICTED, [(0.55, 0.4), (0.75, 0.4), (0.75, 0.6), (0.6, 0.65)])
    said = _compared(page)
    assert "measured spots in region 1" in said
    assert "predicted patches in region 1" in said
    assert change(before, pixels(page, MEASURED)) > 0.001, "the other view shows the outline, too"
    rows = page.locator("#region-genes tbody tr")
    assert rows.first.inner_text().split()[0] == "AAA1"
    assert float(rows.first.inner_text().split()[3]) > 0.1
    heads = page.locator("#region-genes thead th")
    assert [head.split()[0] for head in heads.all_inner_texts()[:3]] == ["Gene", "In", "Rest"]
    assert "not independent" in page.locator("#region-result").inner_text()
    page.get_by_role("button", name="Rectangle").click()
    page.keyboard.press("Escape")
    assert page.locator("#region-list li").count() == 1
    page.get_by_role("button", name="Rectangle").click()
    page.evaluate("delete document.body.dataset.regions")
    _drag(page, MEASURED, [(0.3, 0.4), (0.45, 0.6)])
    page.locator("#region-counts", has_text="in region 2").wait_for()
    page.locator("#region-other").select_option(label="region 1")
    page.locator("#region-counts", has_text="in region 1").wait_for()
    assert heads.all_inner_texts()[1:3] == ["region 2", "region 1"]
    assert float(page.locator("#region-genes tr", has_text="AAA1").inner_text().split()[3]) < -0.5
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Save CSV").click()
    rows_ = list(csv.DictReader(Path(downloaded.value.path()).read_text().splitlines()))
    assert {row["gene"] for row in rows_} == {*GENES, "ONLY9"}
    first = next(row for row in rows_ if row["gene"] == "AAA1")
    assert (first["region"], first["compared_with"]) == ("region 2", "region 1")
    assert float(first["predicted_difference"]) < -0.5
    assert int(first["measured_n"]) > 0
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Save GeoJSON").click()
    saved = json.loads(Path(downloaded.value.path()).read_text())
    assert [feature["properties"]["name"] for feature in saved["features"]] == ["region 1", "region 2"]
    ring = saved["features"][1]["geometry"]["coordinates"][0]
    assert len(ring) == 5
    assert ring[0] == ring[-1]


def test_on_a_phone_a_region_is_drawn_and_its_genes_come_into_sight(page: "Page", address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    open_page(page, address)
    _open_tools(page, "region-tools")
    lasso = page.get_by_role("button", name="Lasso")
    lasso.scroll_into_view_if_needed()
    assert page.evaluate("scrollY") > 100
    # The view comes into sight by itself: what was pressed stands far below it.
    lasso.click()
    page.wait_for_function("document.getElementById('measured').getBoundingClientRect().top >= 0")
    _drag(page, MEASURED, [(0.55, 0.4), (0.75, 0.4), (0.75, 0.6), (0.6, 0.65)])
    assert "in region 1" in _compared(page)
    page.wait_for_function("document.getElementById('region-tools').getBoundingClientRect().top < 300")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_geojson_of_qupath_is_opened_as_text_and_in_the_right_place(
    page: "Page", address: str, tmp_path: Path
) -> None:
    hostile = "<img src=x onerror=document.title=1>"
    square = [[300, 300], [900, 300], [900, 900], [300, 900], [300, 300]]
    outline = {"type": "Polygon", "coordinates": [[[x / MPP, y / MPP] for x, y in square]]}
    features = [
        {"type": "Feature", "geometry": outline, "properties": {"classification": {"name": hostile}}},
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}},
    ]
    file = tmp_path / "annotations.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    open_page(page, address)
    _open_tools(page, "region-tools")
    page.locator("#region-file").set_input_files(file)
    assert hostile in _compared(page)
    assert page.locator("#tools img, #notes img").count() == 0
    assert page.title() != "1"
    assert "1 of its features are no polygons" in page.locator("#notes").inner_text()
    for content, reason in (("{", "no JSON"), ('{"type": "Point"}', "no polygon")):
        file.write_text(content)
        page.locator("#region-file").set_input_files(file)
        page.locator("#notes", has_text=reason).wait_for()
    outline["coordinates"] = [[[x + 90000, y] for x, y in square]]
    file.write_text(json.dumps(outline))
    page.locator("#region-file").set_input_files(file)
    page.locator("#notes", has_text="lie beside this slide").wait_for()
    assert page.locator("#region-list li").count() == 1


def test_genes_that_the_model_abstains_from_are_grey_in_the_table_and_named_in_the_csv(
    page: "Page", address: str
) -> None:
    open_page(page, address)
    _open_tools(page, "region-tools")
    page.get_by_role("button", name="What is in sight").click()
    _compared(page)
    rows = page.locator("#region-genes tbody tr")
    grey = page.locator("#region-genes tbody tr.abstained").all_inner_texts()
    assert {text.split()[0] for text in grey} == {"CCC3", "ZZZ5"}
    assert "In grey: 2 genes from which the model abstains" in page.locator("#region-genes").inner_text()
    colours = {
        name: page.locator("#region-genes tr", has_text=name)
        .locator("td:last-child")
        .evaluate("e => getComputedStyle(e).color")
        for name in ("AAA1", "ZZZ5")
    }
    assert colours["AAA1"] != colours["ZZZ5"]
    page.locator("#region-values").select_option("measured")
    assert page.locator("#region-genes tbody tr.abstained").count() == 0, "what is measured needs no trust"
    assert rows.count() == 5
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Save CSV").click()
    found = {
        row["gene"]: row for row in csv.DictReader(Path(downloaded.value.path()).read_text().splitlines())
    }
    assert {name: row["model_abstains"] for name, row in found.items()} == {
        "AAA1": "no",
        "BBB2": "no",
        "CCC3": "yes",
        "ABC4": "no",
        "ZZZ5": "yes",
        "ONLY9": "",
    }
    assert float(found["AAA1"]["predicted_trust"]) == 0.9


def test_a_link_restores_which_regions_are_compared(page: "Page", address: str) -> None:
    regions = "region=one|400,400 700,400 700,800&region=two|700,400 1000,400 1000,800"
    page.goto(f"{address}/#slide=here&gene=AAA1&{regions}&compare=1,0,measured")
    settled(page, "AAA1")
    page.locator("#region-counts", has_text="measured spots in two").wait_for()
    chosen = ["region-one", "region-other", "region-values"]
    assert [page.locator(f"#{name}").input_value() for name in chosen] == ["1", "0", "measured"]
    assert page.locator("#region-genes thead th").all_inner_texts()[1:3] == ["two", "one"]
    page.wait_for_function("() => location.hash.includes('compare=1%2C0%2Cmeasured')")
    page.locator("#region-other").select_option(label="the rest")
    page.wait_for_function("() => location.hash.includes('compare=1%2Crest%2Cmeasured')")


def test_the_file_of_regions_is_chosen_by_keyboard_and_its_button_shows_the_focus(
    page: "Page", address: str
) -> None:
    open_page(page, address)
    _open_tools(page, "region-tools")
    page.locator("#in-sight").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "region-file"
    label = page.locator("label[for=region-file]")
    assert label.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    with page.expect_file_chooser():
        label.click()


@pytest.mark.e2e
def test_the_whole_slide_is_shown_also_while_a_view_is_still_moving(page: "Page", address: str) -> None:
    open_page(page, address)
    page.wait_for_selector("body[data-picture=tiles]")
    whole = still(page, PREDICTED)

    def is_whole() -> bool:
        return change(whole[5:-40, 5:-5], still(page, PREDICTED)[5:-40, 5:-5]) < 0.02

    home = page.get_by_role("button", name="Whole slide")
    # Thrown with the mouse, the view slides on after the button is let go.
    for by in ((0.3, 0.5), (0.7, 0.2)):
        page.get_by_role("button", name="Zoom in").click()
        _drag(page, PREDICTED, [(0.5, 0.5), by])
        home.click()
        assert is_whole()
    # Its key does the same as its button.
    page.locator(f"{PREDICTED} [role=application]").focus()
    for key in ("+", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("0")
    page.mouse.move(1, 1)
    page.locator("#slide").focus()  # nothing is outlined any more
    assert is_whole()


@pytest.mark.e2e
def test_a_view_that_comes_back_has_the_place_of_the_one_that_was_seen(page: "Page", address: str) -> None:
    open_page(page, address)
    page.locator("#layout").select_option("predicted")
    settled(page, GENES[0])
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").click()
    still(page, PREDICTED)
    page.wait_for_timeout(500)  # after a movement the address follows
    x, width = (_place(page.url)[i] for i in (0, 2))
    page.locator("#layout").select_option("both")
    still(page, PREDICTED)
    page.wait_for_timeout(500)
    now = _place(page.url)
    # The view is narrower now, the scale on the screen and the middle are the same.
    assert abs((now[0] + now[2] / 2) - (x + width / 2)) < 0.1 * width
    assert now[2] < width
