import base64
import io
import json
import re
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from make_scores import make_scores
from make_sections import make_section
from PIL import Image

from histosge.data.sections import Section
from histosge.evaluation import section_maps
from histosge.evaluation.gene_lookup import lookup_block
from histosge.evaluation.report_files import write_evaluation
from histosge.evaluation.section_maps import MapBudget, SectionMapCollector, SectionPrediction
from histosge.reporting.page import Block, Lookup, render_report
from histosge.reporting.value_maps import PackedMaps, ValueMaps

GENES = ("G0", "G1", "G2")


def unpack(maps: PackedMaps, gene: str) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Read one gene's measured and predicted values as the page's script does, and the ends of its colours."""
    document, at = maps.document, maps.names.index(gene)
    scales = np.frombuffer(base64.b64decode(document["scales"]), "<f4").reshape(-1, 6)
    n_spots = len(base64.b64decode(document["spots"])) // 8
    planes = np.frombuffer(zlib.decompress(base64.b64decode(document["planes"])), np.uint8)
    plane = planes.reshape(len(maps.names), -1)[at].astype(float)
    plane[plane == 255] = np.nan
    a, b, c, d, low, high = scales[at]
    measured, predicted = plane[:n_spots] / 254 * (b - a) + a, plane[n_spots:] / 254 * (d - c) + c
    return measured, predicted, [float(low), float(high)]


def collect(section: Section, cell_limit: int = 20_000) -> tuple[PackedMaps, np.ndarray, np.ndarray]:
    """Collect random predictions of two folds; also return truth and prediction of all patches."""
    rng = np.random.default_rng(len(section.slide_id))
    n_spots, n_patches = len(section.spots), len(section.patches)
    truth, predicted = rng.gamma(2, 1, (n_spots, 3)), rng.normal(size=(n_patches, 3)).astype(np.float32)
    at_spots = truth + rng.normal(size=truth.shape)
    first_spots, first_patches = np.arange(n_spots) % 3 == 0, np.arange(n_patches) % 2 == 0
    collector = SectionMapCollector(section, MapBudget(cell_limit, None, frozenset({section.slide_id})))
    for spots, patches in ((first_spots, first_patches), (~first_spots, ~first_patches)):
        collector.add(
            SectionPrediction(GENES, truth[spots], at_spots[spots], spots, predicted[patches], patches)
        )
    maps = collector.maps()
    assert maps is not None
    rs = [
        np.mean([np.corrcoef(truth[s, i], at_spots[s, i])[0, 1] for s in (first_spots, ~first_spots)])
        for i in range(3)
    ]
    packed = maps.pack()
    assert list(packed.document["notes"]) == [f"held-out r = {r:.3f}" for r in rs]
    return packed, truth, predicted


def test_values_of_all_folds_come_back_to_half_a_step_of_their_range() -> None:
    section = make_section("A", 1)
    packed, truth, predicted = collect(section)
    assert packed.names == GENES
    places = np.frombuffer(base64.b64decode(packed.document["places"]), "<u2").reshape(-1, 2)
    order = np.lexsort((section.patches.cols, section.patches.rows))
    np.testing.assert_array_equal(places[:, 0], section.patches.rows[order])
    np.testing.assert_array_equal(places[:, 1], section.patches.cols[order])
    for i, gene in enumerate(GENES):
        measured, cells, limits = unpack(packed, gene)
        for values, right in ((measured, truth[:, i]), (cells, predicted[order, i])):
            np.testing.assert_allclose(values, right, atol=1.01 * np.ptp(right) / 508)
        np.testing.assert_allclose(limits, np.percentile(truth[:, i], (2, 98)), rtol=1e-6)


def test_a_large_map_is_pooled_and_the_picture_with_it() -> None:
    section = make_section("A", 1)
    n_rows, n_cols = section.thumbnail.shape[:2]
    packed, _, predicted = collect(section, cell_limit=74)
    assert packed.document["pooled"] == 2
    assert packed.document["spotStep"] == 3
    _, cells, _ = unpack(packed, "G1")
    places = np.frombuffer(base64.b64decode(packed.document["places"]), "<u2").reshape(-1, 2)
    whole = np.full((n_rows, n_cols), np.nan)
    whole[section.patches.rows, section.patches.cols] = predicted[:, 1]
    right = [np.nanmean(whole[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]) for row, col in places.tolist()]
    np.testing.assert_allclose(cells, right, atol=np.ptp(right) / 500)
    head, _, encoded = packed.document["picture"].partition(",")
    assert head == "data:image/png;base64"
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert picture.shape[:2] == (-(-n_rows // 2), -(-n_cols // 2)) == tuple(packed.document["size"])
    corner = section.thumbnail[2 * (n_rows // 2) :, :2].reshape(-1, 3).mean(axis=0)
    assert np.abs(picture[n_rows // 2, 0] - corner).max() <= 0.5


def test_a_gene_that_a_fold_lacks_has_no_map() -> None:
    section = make_section("A", 1)
    collector = SectionMapCollector(section, MapBudget(20_000, None, frozenset({"A"})))
    half = np.arange(len(section.spots)) % 2 == 0
    own = np.arange(len(section.patches)) % 2 == 0
    for genes, spots, patches in ((("G0", "G1"), half, own), (("G1", "G2"), ~half, ~own)):
        values = np.ones((spots.sum(), 2))
        collector.add(
            SectionPrediction(genes, values, values, spots, np.ones((patches.sum(), 2), np.float32), patches)
        )
    maps = collector.maps()
    assert maps is not None
    assert maps.names == ("G1",)


def test_maps_become_coarser_before_genes_are_left_out_and_named_genes_stay() -> None:
    sections = [make_section("A", 1), make_section("B", 2)]
    n = len(sections[0].patches) + len(sections[0].spots)
    genes = [f"G{i}" for i in range(100)]
    assert MapBudget.choose(sections, genes, limit=2 * n * 100) == MapBudget(
        20_000, None, frozenset({"A", "B"})
    )
    few = MapBudget.choose(sections, genes, ("G97", "absent"), limit=2 * n * 30)
    assert few.genes == {"G97", *genes[:29]}
    least = MapBudget.choose(sections, genes, limit=n * section_maps.LEAST_GENES)
    assert least.slide_ids == {"A"}
    assert least.genes == set(genes[:20])


def test_of_a_large_section_finer_maps_are_given_up_for_all_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    section = make_section("A", 1)
    n = len(section.patches) + len(section.spots)
    monkeypatch.setattr(section_maps, "CELL_LIMITS", (n, n // 8))
    assert MapBudget.choose([section], ["G0", "G1"], limit=n) == MapBudget(n // 8, None, frozenset({"A"}))


def test_no_name_ends_the_script_that_holds_the_maps() -> None:
    name = "</script><script>alert(1)</script>"
    packed, _, _ = collect(make_section("A", 1))
    maps = ValueMaps((replace(packed, names=(name, "B", "C")),), name, "m", "p", name)
    lookup = Lookup("Find", "gene", ("r",), ((name, 0.5),), {}, maps)
    text = render_report("t", [Block("b", lookup=lookup)])
    assert "alert(1)</script>" not in text
    held = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(held[1])["names"] == [name, "B", "C"]


def test_a_gene_without_maps_is_named_with_the_command_that_shows_it() -> None:
    packed, _, _ = collect(make_section("A", 1))
    scores = replace(make_scores(), section_maps=(replace(packed, names=("GENE1", "G1", "G2")),))
    block = lookup_block(scores, "histosge evaluate a b c-NAME --genes 250+NAME")
    assert block.lookup is not None
    assert block.lookup.maps is not None
    assert block.lookup.maps.missing.endswith("has them: histosge evaluate a b c-NAME --genes 250+NAME")


@pytest.mark.browser
def test_a_reader_sees_any_gene_on_every_section_and_saves_it(tmp_path: Path, chromium_path: str) -> None:
    from playwright.sync_api import sync_playwright

    sections = [make_section("S<1>", 1), make_section("S2", 2)]
    packed = [collect(section) for section in sections]
    names = ("GENE1", "GENE2", "odd, 'name'")
    scores = make_scores()
    more = [scores.genes.with_columns(pl.lit(name).alias("gene")) for name in (names[2], "GENE9")]
    scores = replace(
        scores,
        genes=pl.concat([scores.genes, *more]),
        section_maps=(
            replace(packed[0][0], names=names),
            replace(packed[1][0], names=("GENE1", "GENE3", names[2])),
        ),
    )
    page_file = write_evaluation(scores, tmp_path, gene_command="histosge evaluate x --genes 5+NAME")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=30_000,
        )
        page = browser.new_page(viewport={"width": 1024, "height": 700})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(page_file.as_uri())
        maps = page.locator(".maps")
        figures = maps.locator("figure")

        def wait_until_drawn(times: int, name: str) -> None:
            page.locator(f".maps[data-drawn='{times}']").wait_for()
            assert maps.get_by_role("heading").inner_text() == name

        # Before anything is typed: the first gene, on both sections.
        wait_until_drawn(1, "GENE1")
        assert figures.count() == 2
        assert "S<1> GENE1: held-out r = 0." in figures.first.locator("figcaption").inner_text()
        # By the keyboard alone: a gene is typed, found whole, and its maps are there.
        search = page.get_by_label("Find a gene")
        search.fill("gene2")
        wait_until_drawn(2, "GENE2")
        assert "No map on S2" in maps.locator(".about").inner_text()
        assert figures.count() == 1
        search.fill("odd")
        search.press("Enter")
        wait_until_drawn(3, names[2])
        assert figures.count() == 2
        # A cell has the colour of its value: read back from the canvas of the prediction.
        _, cells, (low, high) = unpack(scores.section_maps[0], names[2])
        places = np.frombuffer(base64.b64decode(packed[0][0].document["places"]), "<u2").reshape(-1, 2)
        canvas = figures.first.locator("canvas").nth(2)
        size = canvas.evaluate("canvas => [canvas.width, canvas.height]")
        step = packed[0][0].document["stepUm"]
        spots = np.frombuffer(base64.b64decode(packed[0][0].document["spots"]), "<f4").reshape(-1, 2)
        spots = spots - packed[0][0].document["cornerUm"]
        radius = packed[0][0].document["spotUm"]
        centres = (places[:, ::-1] + 0.5) * step
        corner = np.minimum(centres.min(axis=0) - step, spots.min(axis=0) - radius)
        end = np.maximum(centres.max(axis=0) + step, spots.max(axis=0) + radius)
        scale = size[0] / (end - corner)[0]
        colours = np.frombuffer(
            base64.b64decode(json.loads(maps.locator("script").text_content() or "")["colours"]), np.uint8
        ).reshape(256, 3)
        for i in (0, len(places) // 2, len(places) - 1):
            x, y = np.rint((centres[i] - corner) * scale).astype(int).tolist()
            drawn = canvas.evaluate(
                "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]", [x, y]
            )
            level = int(np.clip(np.floor((cells[i] - low) / (high - low) * 255 + 0.5), 0, 255))
            assert np.abs(colours[level].astype(int) - drawn[:3]).max() <= 3
        with page.expect_download() as download:
            maps.get_by_role("button", name="Save these values as CSV").click()
        table = pl.read_csv(Path(download.value.path()))
        assert table.columns == ["slide_id", "gene", "what", "x_um", "y_um", "value"]
        assert set(table["gene"]) == {names[2]}
        mine = table.filter((pl.col("slide_id") == "S<1>") & (pl.col("what") == "predicted"))
        np.testing.assert_allclose(mine["value"].to_numpy(), cells, rtol=1e-3, atol=1e-6)
        assert len(table.filter(pl.col("what") == "measured")) == sum(len(s.spots) for s in sections)
        with page.expect_download() as download:
            figures.first.get_by_role("button", name="SVG").click()
        assert download.value.suggested_filename == "S_1__odd_name_.svg"
        root = ET.parse(download.value.path()).getroot()
        texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any(text.startswith("S<1>: odd, 'name', held-out r") for text in texts)
        assert {"log1p(CP10k)", "H&E", "predicted"} <= set(texts)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == len(sections[0].spots)
        with page.expect_download() as download:
            figures.first.get_by_role("button", name="PNG").click()
        with Image.open(download.value.path()) as saved:
            assert saved.width == round(1040 * 300 / 96 - 0.5)
        # One section alone; and one scale for all.
        maps.get_by_role("combobox").select_option(label="S2")
        wait_until_drawn(4, names[2])
        assert figures.count() == 1
        maps.get_by_role("combobox").select_option(label="all 2")
        wait_until_drawn(5, names[2])
        scales = maps.locator(".scale")
        assert len(set(scales.all_inner_texts())) == 2
        page.get_by_label("One scale for all sections").check()
        wait_until_drawn(6, names[2])
        assert len(set(scales.all_inner_texts())) == 1
        search.fill("GENE9")
        page.get_by_text("GENE9 has no maps here").wait_for()
        assert "histosge evaluate x --genes 5+GENE9" in maps.locator(".about").inner_text()
        for width in (1024, 390):
            page.set_viewport_size({"width": width, "height": 700})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not wrong
        browser.close()
