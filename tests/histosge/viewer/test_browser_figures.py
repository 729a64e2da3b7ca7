"""Figures, gene sets, links, contrast and pages of one file, in a real Chromium."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
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
from PIL import Image
from viewer_world import GENES, World, serving

from histosge.exporting.domain_labels import domain_colour
from histosge.viewer.collection import Collection
from histosge.viewer.static_page import export_one_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def with_sets(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    sets = tmp_path_factory.mktemp("sets") / "sets.gmt"
    sets.write_text(f"ONE\thttps://example.org\tAAA1\tBBB2\nTWO\t\tBBB2\tNOSUCH\n{HOSTILE}\t\tAAA1\n")
    opened = Collection.open(
        str(world.store), str(world.maps), str(world.sheet), world.domains, gene_sets=sets
    )
    with serving(opened) as found:
        yield found


def _tools(page: "Page", *ids: str) -> None:
    page.evaluate(
        "ids => { for (const d of document.querySelectorAll('#tools details')) d.open = ids.includes(d.id); }",
        list(ids),
    )


def _save(page: "Page", kind: str) -> tuple[str, bytes]:
    with page.expect_download() as found:
        page.get_by_role("button", name=f"Save {kind}").click()
    return found.value.suggested_filename, Path(found.value.path()).read_bytes()


def test_what_is_seen_is_saved_as_png_and_svg_with_words(page: "Page", address: str) -> None:
    open_page(page, address, gene="BBB2")
    page.wait_for_selector("body[data-picture=tiles]")
    page.locator("#opacity").fill("100")
    still(page, PREDICTED)
    _tools(page, "save-tools")
    name, found = _save(page, "SVG")
    assert name == "here_BBB2.svg"
    root = ET.fromstring(found)
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    for wanted in ("here", "BBB2", "log1p of counts per 10,000", "µm", "≤", "≥", "Predicted, every patch"):
        assert wanted in words
    assert len(list(root.iter(f"{SVG}circle"))) == 72, "each measured spot is a shape"
    name, found = _save(page, "PNG")
    assert name == "here_BBB2.png"
    picture = Image.open(io.BytesIO(found)).convert("RGB")
    sides = float(root.get("width", 0)), float(root.get("height", 0))
    assert picture.size == (round(2 * sides[0]), round(2 * sides[1]))
    # The map lies in the second half of the figure as it does on the screen.
    seen = middle(pixels(page, PREDICTED)).reshape(-1, 3).mean(axis=0)
    view = page.locator(PREDICTED).bounding_box()
    assert view is not None
    left, top = sides[0] - 16 - view["width"] + 2, 44.0
    box = (left, top, left + view["width"] - 2, top + view["height"] - 2)
    saved = np.asarray(picture.crop([round(2 * side) for side in box]).resize((420, 500))).astype(int)
    assert np.abs(middle(saved).reshape(-1, 3).mean(axis=0) - seen).max() < 6


def test_a_pasted_set_is_the_mean_of_z_scores_and_says_what_is_missing(page: "Page", with_sets: str) -> None:
    open_page(page, with_sets)
    _tools(page, "set-tools")
    page.locator("#set-genes").fill("AAA1, BBB2\nNOSUCH")
    page.locator("#set-name").fill(HOSTILE)
    page.get_by_role("button", name="Show mean of z-scores").click()
    page.locator("#set-found", has_text="2 of 3 genes are predicted (not: NOSUCH)").wait_for()
    page.wait_for_selector("body[data-state=ready]")
    assert "mean z-score" in page.locator("#predicted-legend").inner_text()
    assert page.locator("figure img, #about img").count() == 0
    # AAA1 grows to the right and BBB2 downwards: along the other diagonal their z-scores cancel out.
    box = page.locator(PREDICTED).bounding_box()
    assert box is not None
    found, seen = [], ""
    for x, y in ((0.35, 0.4), (0.6, 0.65)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_function(
            "seen => { const t = document.querySelector('#readout').innerText; return t !== seen && t.includes('row'); }",
            arg=seen,
        )
        seen = readout(page)
        found.append(float(re.search(r"patch row .*> (-?[\d.]+)", seen)[1]))  # type: ignore[index]
    assert found[1] - found[0] > 1


@pytest.mark.e2e
def test_named_sets_come_from_a_gmt_file(page: "Page", with_sets: str) -> None:
    open_page(page, with_sets)
    _tools(page, "set-tools")
    page.locator("#set-choice").fill("TWO")
    page.locator("#set-choice").press("Enter")
    page.locator("#set-found", has_text="1 of 2 genes are predicted (not: NOSUCH)").wait_for()
    assert page.locator("#set-names option").count() == 3
    assert page.title() != "1"


@pytest.mark.e2e
def test_a_second_gene_is_seen_beside_the_first_and_blended_with_it(page: "Page", address: str) -> None:
    open_page(page, address)
    _tools(page, "set-tools")
    page.locator("#second").fill("BBB2")
    page.locator("#second").press("Enter")
    page.locator("#predicted-title", has_text="Predicted: BBB2").wait_for()
    assert page.locator("#measured-title").inner_text() == "Predicted: AAA1"
    settled(page, "AAA1")
    assert change(middle(pixels(page, MEASURED)), middle(pixels(page, PREDICTED))) > 0.3
    page.locator("#layout").select_option("both")
    page.locator("#show").select_option("blend")
    _tools(page, "colour-tools")
    page.locator("#opacity").fill("100")
    settled(page, "AAA1")
    page.locator("#predicted-legend", has_text="White where both are high").wait_for()
    settled(page, "AAA1")
    ranges = [
        page.locator(f"#{view}-legend figcaption > div").all_inner_texts()
        for view in ("measured", "predicted")
    ]
    assert ranges[0] == ranges[1], "one scale for both views"
    page.locator("#scale").select_option("own")
    settled(page, "AAA1")
    corners = middle(still(page, PREDICTED))
    high, wide = corners.shape[0] // 5, corners.shape[1] // 5
    right_top, left_bottom = corners[:high, -wide:].mean((0, 1)), corners[-high:, :wide].mean((0, 1))
    assert right_top[0] > right_top[1] + 40, "AAA1 alone is magenta"
    assert left_bottom[1] > left_bottom[0] + 40, "BBB2 alone is green"


@pytest.mark.e2e
def test_contrast_is_set_by_numbers_and_kept_over_slides(page: "Page", address: str) -> None:
    open_page(page, address)
    low = float(page.locator("#lowest").input_value())
    before = pixels(page, PREDICTED)
    page.locator("#highest").fill("4.5")
    page.locator("#highest").press("Enter")
    settled(page, "AAA1")
    assert "≥ 4.50" in page.locator("#predicted-legend").inner_text()
    assert change(middle(before), middle(pixels(page, PREDICTED))) > 0.3
    page.locator("#lowest").fill("10")  # above the maximum
    page.locator("#lowest").press("Enter")
    assert float(page.locator("#lowest").input_value()) == pytest.approx(low, abs=0.01)
    page.locator("#everywhere").check()
    settled(page, "AAA1")
    page.locator("#slide").select_option(label="gone")
    page.locator("#notes", has_text="thumbnail").wait_for()
    settled(page, "AAA1")
    assert "≥ 4.50" in page.locator("#predicted-legend").inner_text()
    page.get_by_role("button", name="Auto").click()
    settled(page, "AAA1")
    assert "≥ 4.50" not in page.locator("#predicted-legend").inner_text()


@pytest.mark.e2e
def test_a_link_restores_what_was_seen(page: "Page", address: str) -> None:
    page.goto(
        f"{address}/#slide=here&gene=BBB2&second=CCC3&layout=pair-predicted&limits=1,4&opacity=35&outline=off"
        "&at=400,300,500,600&region=my region|400,400 800,400 800,800&backdrop=grey&map=magma"
    )
    settled(page, "BBB2")
    still(page, PREDICTED)
    for name, value in (
        ("layout", "pair-predicted"),
        ("opacity", "35"),
        ("backdrop", "grey"),
        ("map", "magma"),
    ):
        assert page.locator(f"#{name}").input_value() == value
    assert not page.locator("#outline").is_checked()
    assert page.locator("#predicted-title").inner_text() == "Predicted: CCC3"
    assert "≤ 1.00" in page.locator("#measured-legend").inner_text()
    assert page.locator("#region-list input").input_value() == "my region"
    place = [float(n) for n in re.search(r"at=([^&]*)", page.url)[1].split("%2C")]  # type: ignore[index]
    assert place == [400, 300, 500, 600]
    box = page.locator(MEASURED).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    x, y = (int(n) for n in re.findall(r"[xy] (-?\d+) µm", readout(page)))
    assert abs(x - 650) <= 2
    assert abs(y - 600) <= 2
    page.mouse.move(1, 1)
    # The address that the page then has shows the same again.
    page.wait_for_selector("body[data-picture=tiles]")
    seen = still(page, PREDICTED)
    address_now = page.url
    page.goto("about:blank")
    page.goto(address_now)
    settled(page, "BBB2")
    page.wait_for_selector("body[data-picture=tiles]")
    assert change(seen, still(page, PREDICTED)) < 0.02


def test_what_a_link_names_and_is_not_there_is_said(page: "Page", address: str) -> None:
    named = {
        "second=NOSUCH": "second gene NOSUCH",
        "map=rainbow": "map=rainbow",
        "grid=other": "grid other",
        "at=1,2": "at=1,2",
        "limits=3,1": "limits without a range",
        "region=x|1,2": "a region that is no outline",
        "region=far|90000,1 90009,1 90009,9": "1 region beside the slide",
        "opacity=much": "opacity=much",
        "spot-size=900": "spot-size=900",
        "outline=perhaps": "outline=perhaps",
        "without-domains=0,77": "domains 77",
        f"show={HOSTILE}": f"show={HOSTILE}",
    }
    page.goto(f"{address}/#slide=here&gene=AAA1&{'&'.join(named)}")
    settled(page, "AAA1")
    for said in named.values():
        page.locator("#notes", has_text=f"The link names {said}, which is not known here").wait_for()
    assert page.locator("#notes img").count() == 0
    page.goto("about:blank")
    page.goto(
        f"{address}/#slide=here&gene=AAA1&at=90000,300,500,600&region=r|300,300 900,300 900,900&compare=7,rest,measured"
    )
    settled(page, "AAA1")
    for said in ("a place beside the slide", "compare=7,rest,measured"):
        page.locator("#notes", has_text=f"The link names {said}, which is not known here").wait_for()
    assert "at=" not in page.url, "the whole slide is shown"


def test_a_slide_that_was_held_out_is_no_warning(page: "Page", address: str) -> None:
    page.goto(f"{address}/#slide=gone&gene=AAA1")
    settled(page, "AAA1")
    colour = "e => getComputedStyle(e).color"
    quiet = page.locator("#notes .quiet")
    assert "without spots of this slide" in quiet.inner_text()
    held_out = quiet.evaluate(colour)
    page.locator("#notes", has_text="Its thumbnail is shown instead").wait_for()
    assert held_out != page.locator("#notes").evaluate(colour)
    open_page(page, address)
    assert "trained on" in page.locator("#training").inner_text()
    assert page.locator("#notes .quiet").count() == 0, "training on the slide's spots is a warning"


def test_what_is_known_of_both_genes_is_said_while_both_are_seen(page: "Page", address: str) -> None:
    page.goto(f"{address}/#slide=here&gene=AAA1&second=ZZZ5&layout=pair-predicted&limits=1,4")
    settled(page, "AAA1")
    about = page.locator("#about-gene")
    assert "AAA1: 90 % prediction interval" in about.inner_text()
    assert "ZZZ5: 90 % prediction interval" in about.inner_text()
    assert "the model abstains" in about.inner_text().split("ZZZ5")[1]
    # One scale for both is that of the contrast.
    for legend in ("#measured-legend", "#predicted-legend"):
        assert "≤ 1.00" in page.locator(legend).inner_text()
        assert "≥ 4.00" in page.locator(legend).inner_text()
    page.locator("#layout").select_option("both")
    page.locator("#show").select_option("blend")
    page.locator("#predicted-legend", has_text="The model abstains from ZZZ5").wait_for()
    page.locator("#show").select_option("gene")
    settled(page, "AAA1")
    assert "ZZZ5" not in about.inner_text()
    _tools(page, "set-tools")
    page.locator("#set-genes").fill("AAA1 ZZZ5 CCC3")
    page.get_by_role("button", name="Show mean of z-scores").click()
    page.locator("#about-gene", has_text="the model abstains from 2 of its 3 predicted genes").wait_for()


def test_a_saved_blend_says_which_colour_is_which_gene_and_nothing_is_cut_off(
    page: "Page", address: str
) -> None:
    page.set_viewport_size({"width": 1024, "height": 700})
    page.goto(f"{address}/#slide=here&gene=AAA1&second=BBB2&show=blend&rim=hatched&least-tissue=90")
    settled(page, "AAA1")
    page.wait_for_selector("body[data-picture]")
    _tools(page, "save-tools")
    name, found = _save(page, "SVG")
    assert name == "here_AAA1_BBB2.svg"
    root = ET.fromstring(found)
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert words[0] == "here (trained on) · AAA1 · BBB2"
    whole = " ".join(words)
    for wanted in ("AAA1: ", "BBB2: ", "White where both are high", "less than 90 % tissue are hatched"):
        assert wanted in whole, wanted
    fills = {shape.get("fill") for shape in root.iter(f"{SVG}rect")}
    assert {"#ff00ff", "#00ff00"} <= fills
    page.locator("#show").select_option("clusters")
    page.wait_for_selector("body[data-state=ready]")
    page.locator("#predicted-legend", has_text="k-means").wait_for()
    root = ET.fromstring(_save(page, "SVG")[1])
    # Eight keys and a long caption: of both views' groups, the lowest words.
    lowest = max(sum(float(place.split()[-1]) for place in places) for places in _text_places(root))
    assert lowest + 3 <= float(root.get("height", 0))


def _text_places(root: ET.Element) -> list[list[str]]:
    """Of each text, the vertical shifts of its groups and its own: they add up to its place."""
    found = []

    def walk(node: ET.Element, shifts: list[str]) -> None:
        moved = re.match(r"translate\((.*)\)", node.get("transform", ""))
        here = [*shifts, moved[1]] if moved else shifts
        if node.tag == f"{SVG}text":
            found.append([*here, node.get("y", "0")])
        for child in node:
            walk(child, here)

    walk(root, [])
    return found


def test_domains_are_hidden_one_by_one_and_have_the_colours_of_exports(page: "Page", address: str) -> None:
    open_page(page, address)
    page.locator("#show").select_option("domains")
    page.locator("#opacity").fill("100")
    settled(page, "AAA1")
    swatches = page.locator("#predicted-legend .swatch").evaluate_all(
        "found => found.map(each => getComputedStyle(each).backgroundColor)"
    )
    shown = [[int(n) for n in re.findall(r"\d+", text)] for text in swatches]
    assert shown == [domain_colour(0), domain_colour(1)]
    assert page.locator("#predicted-title").inner_text() == "Spatial domains"
    before = pixels(page, PREDICTED)
    page.get_by_label("domain 1").uncheck()
    assert change(before, still(page, PREDICTED)) > 0.05
    assert "without-domains=1" in page.url
    assert "tables of labels" in page.locator("#predicted-legend").inner_text()


@pytest.mark.e2e
def test_patches_with_little_tissue_are_hatched_or_hidden_and_spots_resized(
    page: "Page", address: str
) -> None:
    open_page(page, address)
    _tools(page, "spot-tools")
    seen = pixels(page, PREDICTED)
    for kind in ("hatched", "hidden"):
        page.locator("#rim").select_option(kind)
        page.locator("#least-tissue").fill("95")
        page.locator("#least-tissue").dispatch_event("change")
        settled(page, "AAA1")
        now = pixels(page, PREDICTED)
        assert change(seen, now) > 0.002, kind
        seen = now
    spots = pixels(page, MEASURED)
    page.locator("#spot-size").fill("200")
    page.locator("#spot-size").dispatch_event("change")
    settled(page, "AAA1")
    larger = pixels(page, MEASURED)
    assert change(spots, larger) > 0.02
    page.locator("#spots-shown").uncheck()
    settled(page, "AAA1")
    assert "hidden" in page.locator("#measured-legend").inner_text()
    assert change(larger, pixels(page, MEASURED)) > 0.05


def test_a_gene_that_the_model_abstains_from_is_grey_and_the_page_says_so(page: "Page", address: str) -> None:
    open_page(page, address, gene="ZZZ5")
    assert "the model abstains" in page.locator("#about-gene").inner_text()
    assert "in grey" in page.locator("#predicted-legend").inner_text()
    page.locator("#gene").fill("ZZZ")
    assert "the model abstains" in page.locator("#genes [role=option]").inner_text()
    page.keyboard.press("Escape")
    open_page(page, address)
    assert page.locator("#training").inner_text() == "trained on"
    page.locator(
        "#about-gene", has_text=re.compile(r"r 0\.\d+ on this slide's own 72 spots \(trained on\)")
    ).wait_for()


def test_a_page_of_one_file_opens_without_a_server(browser: "Browser", world: World, tmp_path: Path) -> None:
    opened = Collection.open(
        str(world.store), str(world.maps), str(world.sheet), world.domains, 2.0, slides=["here"]
    )
    out = tmp_path / "page.html"
    done = export_one_file(opened, out, ["AAA1", "BBB2"])
    assert done.n_bytes == out.stat().st_size
    page = browser.new_page(viewport={"width": 1024, "height": 700})
    page.set_default_timeout(WAIT_MS)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url[:30]))
    page.goto(f"file://{out}")
    settled(page, "AAA1")
    page.wait_for_selector("body[data-picture=tiles]")
    assert page.locator("#slide option").all_inner_texts() == ["here"]
    first = pixels(page, PREDICTED)
    page.get_by_role("button", name="Next gene").click()
    settled(page, "BBB2")
    assert change(middle(first), middle(pixels(page, PREDICTED))) > 0.1
    assert "gene=BBB2" in page.url
    # Regions are computed in the page, from the genes that it holds.
    _tools(page, "region-tools")
    page.get_by_role("button", name="What is in sight").click()
    page.wait_for_selector("body[data-regions]")
    assert page.locator("#region-genes tbody tr").count() == 2
    _tools(page, "save-tools")
    assert _save(page, "PNG")[0] == "here_BBB2.png"
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []
    page.close()


def test_a_region_has_the_same_numbers_on_the_server_and_in_the_page(page: "Page", address: str) -> None:
    open_page(page, address)
    page.wait_for_timeout(500)
    found = page.evaluate(
        """async () => {
          const { compareHere } = await import("./static/statistics.js");
          const read = async (path) => (await fetch(path)).json();
          const layer = { ...(await read("data/2/layers/0/layer.json")), base: "data/2/layers/0" };
          const spots = await read("data/2/spots.json");
          const polygons = [[[[301, 353], [907, 401], [509, 883]]]];
          const other = [[[[601, 501], [1103, 501], [1103, 907], [601, 907]]]];
          const both = [];
          for (const second of [null, other]) {
            const body = JSON.stringify({ layer: 0, region: polygons, other: second });
            const options = { method: "POST", headers: { "content-type": "application/json" }, body };
            both.push(await (await fetch("data/2/regions", options)).json());
            both.push(await compareHere({ layer, spots, base: "data/2" }, { polygons }, second && { polygons: second }));
          }
          return both;
        }"""
    )
    for server, here in (found[:2], found[2:]):
        for kind in ("predicted", "measured"):
            assert server[kind]["n"] == here[kind]["n"]
            for name in ("mean", "rest", "difference", "effect"):
                one, other = (np.array(each[kind][name], dtype=float) for each in (server, here))
                np.testing.assert_allclose(one, other, atol=2e-3, err_msg=f"{kind} {name}")
    assert found[0]["predicted"]["effect"][2:] == [None] * 3
    assert len(GENES) == len(found[0]["predicted"]["mean"])


@pytest.mark.e2e
def test_a_store_without_a_map_shows_components_clusters_and_tissue(page: "Page", world: World) -> None:
    with serving(Collection.open(str(world.store))) as address:
        page.goto(f"{address}/#slide=here")
        page.wait_for_selector("body[data-state=ready][data-picture]")
        page.locator("#predicted-legend", has_text="first three principal components").wait_for()
        page.locator("#opacity").fill("100")
        seen = [middle(still(page, PREDICTED))]
        for what in ("clusters", "tissue"):
            page.locator("#show").select_option(what)
            page.wait_for_selector("body[data-state=ready]")
            seen.append(middle(still(page, PREDICTED)))
            assert change(seen[-2], seen[-1]) > 0.3, what
        for _ in range(3):
            page.get_by_role("button", name="Zoom in").click()
        bare = still(page, PREDICTED)
        page.locator("#lines").check()
        page.wait_for_selector("body[data-state=ready]")
        assert change(bare, still(page, PREDICTED)) > 0.01, "the grid is drawn"
        assert page.locator("#show option:not([hidden])").all_inner_texts() == [
            "components (RGB)",
            "clusters",
            "quality flags",
            "tissue share",
        ]
        assert page.locator("#about-gene").inner_text() == ""
        # What belongs to genes is not there.
        assert not any(page.locator(name).is_visible() for name in ("#gene", "#set-tools", "#scale"))
        assert page.locator("#layout option:checked").inner_text() == "patches only"
    page.goto("about:blank")
