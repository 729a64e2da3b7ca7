import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import polars as pl
import pytest
from make_scores import MAP_GRID as GRID
from make_scores import make_map, make_scores
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from histosge.evaluation.gene_lookup import lookup_block
from histosge.evaluation.map_plots import gene_map
from histosge.evaluation.report import evaluation_blocks
from histosge.evaluation.report_files import write_evaluation
from histosge.evaluation.results import GeneMap, Scores
from histosge.evaluation.score_plots import (
    Defect,
    Difference,
    defect_plot,
    difference_plot,
    score_distributions,
)
from histosge.reporting.page import Block, Lookup, Picture, Table, render_report
from histosge.reporting.plots import shared_scale_maps, slide_maps, to_svg, trust_plot

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "img", "br", "hr", "link"}


class Structure(HTMLParser):
    """Fails on tags that do not close in order; collects cells and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1], data.strip()))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.seen if tag == name]


def svg_of(attrs: dict[str, str | None]) -> str:
    """Return the picture that an img holds; fails unless it is well formed."""
    kind, _, encoded = (attrs["src"] or "").partition(",")
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(encoded).decode()
    assert ET.fromstring(text).tag == f"{SVG}svg"
    return text


def page_of(scores: Scores, *notes: str) -> tuple[str, Structure]:
    text = render_report("Title", evaluation_blocks(scores, notes))
    return text, Structure(text)


@cache
def usual_page() -> tuple[str, Structure]:
    """Return the page of the scores that most tests look at: drawing it takes half a second."""
    return page_of(make_scores())


def without_maps(scores: Scores) -> tuple[str, Structure]:
    """Return the page of scores whose maps are not looked at."""
    return page_of(replace(scores, maps=()))


def test_the_page_is_well_formed_and_its_tables_name_their_rows_and_columns() -> None:
    _, page = usual_page()
    assert page.tags("html")[0]["lang"] == "en"
    assert {attrs["scope"] for attrs in page.tags("th")} == {"row", "col"}
    assert all(attrs["alt"] for attrs in page.tags("img"))


def test_the_page_loads_nothing_from_anywhere() -> None:
    text, page = usual_page()
    assert not page.tags("link")
    assert not [attrs for attrs in page.tags("script") if "src" in attrs]
    assert "http" not in text
    assert "url(" not in text
    figures = [svg_of(attrs) for attrs in page.tags("img")]
    assert len(figures) == 2
    for figure in figures:
        assert re.findall(r'(?:href|src)="(?!#|data:image/png)', figure) == []
        assert re.findall(r"url\((?!#)|@import|<script", figure) == []


def test_the_maps_come_first_and_the_caveats_last() -> None:
    text, page = page_of(make_scores(), "7 spots under 100 counts left out.")
    titles = [words for tag, words in page.words if tag == "h2"]
    assert titles[0].startswith("Maps")
    assert titles[-1] == "Limitations"
    assert text.index("held-out r = 0.437") < text.index("Noise control")
    for caveat in (
        "7 spots under 100 counts left out.",
        "3 sections of 1 donor.",
        "2 genes given by the user",
    ):
        assert caveat in text


def test_scores_are_means_over_folds_with_the_spread_over_seeds() -> None:
    _, page = usual_page()
    cells = [words for tag, words in page.words if tag in {"th", "td"}]
    start = cells.index("dense")
    assert cells[start + 1] == "0.405 ± 0.007"
    assert cells.index("dense") < cells.index("ridge") < cells.index("noise")


def test_one_seed_shows_no_spread() -> None:
    _, page = without_maps(make_scores(seeds=(0,)))
    assert "0.400" in [words for tag, words in page.words if tag == "td"]
    assert not any("±" in words for tag, words in page.words if tag == "td")


def test_a_noise_control_that_scores_raises_a_red_warning_at_the_top() -> None:
    text, page = page_of(make_scores(noise=0.013))
    assert [attrs for attrs in page.tags("p") if attrs.get("role") == "alert"]
    assert text.index("Noise control: 0.0130") < text.index("Maps")
    assert "status bad" in text


def test_a_noise_control_near_zero_raises_no_warning() -> None:
    text, page = without_maps(make_scores(noise=-0.0099))
    assert not [attrs for attrs in page.tags("p") if attrs.get("role") == "alert"]
    assert "Noise control: -0.0099" in text


def test_the_papers_figure_has_its_own_column_in_the_random_split_alone() -> None:
    random, _ = without_maps(make_scores(split="random"))
    section, _ = usual_page()
    assert "0.900" in random
    assert "only to compare with the publication" in random
    assert "paper_all_spots" not in section


def test_the_buffer_and_what_it_dropped_are_named_for_the_block_split() -> None:
    text, _ = without_maps(make_scores(split="block"))
    assert "nearer than 211 µm" in text
    assert "(28 of 436 over all folds)" in text


def test_without_maps_the_page_says_why() -> None:
    text, page = page_of(replace(make_scores(), maps=()))
    assert "so there is no map" in text
    assert len(page.tags("img")) == 1


def test_any_blocks_can_be_laid_out_and_their_text_is_escaped() -> None:
    table = Table(("gene <i>", "r"), (("A&B", "0.1"), ("C", "0.2")), "truth", folded=True)
    text = render_report("<script>", [Block("Dense truth", "a < b", tables=(table,), points=("one",))])
    page = Structure(text)
    assert not page.tags("script")
    assert ("th", "A&B") in page.words
    assert ("summary", "truth") in page.words
    assert ("p", "a < b") in page.words
    assert ("li", "one") in page.words


def test_columns_of_text_are_set_from_the_left_and_of_numbers_from_the_right() -> None:
    rows = (("a", "a reason", "1,024", "12%"), ("b", "", "-", "< 1%"), ("c", "3.11", "nan", "-0.5"))
    table = Table(("name", "why", "patches", "share"), rows, "a table")
    assert table.is_text == (True, True, False, False)
    text = render_report("t", [Block("b", tables=(table,))])
    assert '<td class="text">3.11</td><td>nan</td>' in text
    assert Table(("name", "why"), (), "empty").is_text == (False, False)


def test_a_picture_travels_inside_the_page() -> None:
    svg = to_svg(score_distributions({"dense": np.linspace(-0.1, 0.5, 23), "noise": np.zeros(23)}))
    page = Structure(render_report("t", [Block("b", pictures=(Picture(svg, "alt", "caption", "NAME 2"),))]))
    assert svg_of(page.tags("img")[0]).encode() == svg
    assert ("strong", "NAME 2") in page.words
    assert [attrs["data-name"] for attrs in page.tags("p") if attrs.get("class") == "save"] == ["NAME_2"]


def test_plots_are_shapes_and_text() -> None:
    gaps = [Difference("dense - ridge", 0.1, 0.0, 0.2), Difference("dense - mean", 0.3, 0.2, 0.4)]
    for figure, words in (
        (score_distributions({"dense": np.linspace(-0.1, 0.5, 23)}), ("dense", "held-out Pearson of a gene")),
        (difference_plot(gaps, "difference"), ("dense - ridge", "difference", "+0.100")),
        (defect_plot([Defect("bgr", 0.1, 0.2, 0.3, 0.4)]), ("bgr", "Pearson, mean over genes")),
        (trust_plot(np.linspace(-0.1, 0.5, 23, dtype=np.float32), 0.1), ("genes", "trusted")),
    ):
        text = to_svg(figure).decode()
        assert "<image" not in text
        assert all(any(word in line for line in re.findall(r"<text[^>]*>([^<]*)", text)) for word in words)


def test_a_map_is_a_pixel_a_patch_in_a_frame_of_shapes_and_text() -> None:
    shown = make_map()
    text = to_svg(gene_map(shown)).decode()
    pictures = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]*)", text)]
    sizes = [Image.open(io.BytesIO(found)).size for found in pictures]
    # Three backgrounds and the prediction, without a column that lies outside of the panel; and the colour bar.
    assert sizes.count((12, 17)) == 4
    for word in ("H&amp;E", "predicted, every patch", "log1p(CP10k)", "200 µm"):
        assert f">{word}</text>" in text
    assert text.count("<use") >= len(shown.measured)


@pytest.mark.parametrize("n", [1999, 23_000])
def test_a_figure_of_many_marks_stays_small(n: int) -> None:
    rng = np.random.default_rng(0)
    shown = replace(make_map(), spot_xy_um=rng.uniform(200, 500, (n, 2)), measured=rng.random(n, np.float32))
    for figure in (gene_map(shown), score_distributions({"dense": rng.random(n)})):
        assert len(to_svg(figure)) < 500_000


def test_a_large_map_is_resampled() -> None:
    rng = np.random.default_rng(0)
    shown = replace(make_map(), predicted=rng.random((997, 991), np.float32))
    shown = replace(shown, thumbnail=np.full((997, 991, 3), 181, np.uint8))
    assert len(to_svg(gene_map(shown))) < 1_500_000


def test_the_same_figure_is_the_same_file() -> None:
    assert to_svg(gene_map(make_map())) == to_svg(gene_map(make_map()))


def test_a_figure_is_drawn_once_and_is_what_matplotlib_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "histosge"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        gene_map(make_map()).savefig(saved, format="svg", metadata=metadata)
    drawn: list[Figure] = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: drawn.append(self) or draw(self, renderer))
    figure = gene_map(make_map())
    dpi = figure.dpi
    assert to_svg(figure) == saved.getvalue()
    assert (drawn, figure.dpi) == ([figure], dpi)


def pixels(shown: GeneMap) -> np.ndarray:
    drawn = io.BytesIO()
    gene_map(shown).savefig(drawn, format="png")
    with Image.open(drawn) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_map_shows_measured_spots_and_prediction_on_one_scale() -> None:
    # A prediction at the top of the measured scale has the colour of the highest spots: viridis yellow.
    shown = make_map()
    high = pixels(replace(shown, predicted=np.full(GRID, shown.measured.max(), dtype=np.float32)))
    low = pixels(replace(shown, predicted=np.full(GRID, shown.measured.min(), dtype=np.float32)))
    right = slice(int(high.shape[1] * 0.65), int(high.shape[1] * 0.85))

    def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
        return float((np.abs(image[:, right] - colour).max(axis=2) < 9).mean())

    yellow, purple = (253, 231, 37), (68, 1, 84)
    assert share(high, yellow) > 0.4 > 0.01 > share(high, purple)
    assert share(low, purple) > 0.4 > 0.01 > share(low, yellow)


@pytest.mark.parametrize("value", [0.0, 1.3])
def test_a_gene_measured_constant_is_drawn_at_the_bottom_of_its_scale(value: float) -> None:
    drawn = pixels(replace(make_map(), measured=np.full(31, value, dtype=np.float32)))
    middle = drawn[:, int(drawn.shape[1] * 0.35) : int(drawn.shape[1] * 0.6)]
    purple = (68, 1, 84)
    assert (np.abs(middle - purple).max(axis=2) < 9).sum() > 500


DRAWING = """
import sys
import matplotlib
def settings():
    # Reading the backend alone makes matplotlib choose one.
    return {name: matplotlib.rcParams[name] for name in list(matplotlib.rcParams) if name != "backend"}
before = settings()
from make_scores import make_map, make_scores
from histosge.evaluation.map_plots import gene_map
from histosge.evaluation.report import evaluation_blocks
from histosge.reporting.plots import to_svg
to_svg(gene_map(make_map()))
evaluation_blocks(make_scores())
assert settings() == before
print("matplotlib.pyplot" in sys.modules)
"""


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    # pyplot keeps every figure that it makes, and chooses a backend for the whole process.
    ran = subprocess.run(
        [sys.executable, "-c", DRAWING],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["$\\frac{", "a$b$c_{", "<script>alert(1)</script>", "遺伝子", "a\x01b"])
def test_any_name_is_text_in_pictures_and_tables(name: str) -> None:
    maps = {name: np.ones((3, 5), np.float32)}
    for figure in (
        difference_plot([Difference(name, 0.1, 0.0, 0.2)], "difference"),
        defect_plot([Defect(name, 0.1, 0.2, 0.3, 0.4)]),
        score_distributions({name: np.arange(5.0)}),
        slide_maps(np.zeros((3, 5, 3), np.uint8), maps, 50.0, (25.0, 31.0)),
        shared_scale_maps(maps, (0.0, 1.0), 50.0),
    ):
        texts = [text.text for text in ET.fromstring(to_svg(figure)).iter(f"{SVG}text")]
        assert name.replace("\x01", "\ufffd") in texts
    text = render_report(
        "Title", [Block(name, name, tables=(Table((name,), ((name,),), name),), points=(name,))]
    )
    assert "<script>" not in text


def test_every_gene_is_found_with_its_scores_beside_the_controls() -> None:
    lookup = lookup_block(make_scores()).lookup
    assert lookup is not None
    assert lookup.columns == ("ridge", "dense", "noise")
    assert lookup.rows == (("GENE1", 0.3, 0.4, 0.002), ("GENE2", 0.3, 0.4, 0.002))
    assert lookup.anchors == {"GENE1": "map0"}


def test_the_page_says_version_date_and_command_and_links_its_tables(tmp_path: Path) -> None:
    page = write_evaluation(make_scores(), tmp_path, command="histosge evaluate a.csv 'my store' out")
    text = page.read_text("utf-8")
    assert f"histosge {version('histosge')}, 20" in text
    assert "histosge evaluate a.csv &#39;my store&#39; out. Recompute" in text
    places = [attrs["href"] or "" for attrs in Structure(text).tags("a")]
    assert places == ["scores.csv", "genes.csv", "differences.csv"]
    assert all((tmp_path / place).is_file() for place in places)


def test_no_name_ends_the_script_that_holds_the_scores() -> None:
    name = "</script><script>alert(1)</script>&\\u2028"
    lookup = Lookup("Find", "gene", (name,), ((name, 0.5), ("B", None)), {})
    text = render_report("t", [Block("b", lookup=lookup)])
    page = Structure(text)
    assert len(page.tags("script")) == 2
    held = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert held is not None
    assert json.loads(held[1]) == {
        "columns": ["gene", name],
        "rows": [[name, 0.5], ["B", None]],
        "anchors": {},
    }


@pytest.mark.browser
def test_a_reader_types_a_gene_sees_its_scores_and_gets_them_as_csv(
    tmp_path: Path, chromium_path: str
) -> None:
    from playwright.sync_api import sync_playwright

    scores = make_scores()
    more = [scores.genes.with_columns(pl.lit(f"GENE{i}").alias("gene")) for i in (10, 11)]
    scores = replace(scores, genes=pl.concat([scores.genes, *more]), maps=(make_map("GENE11"),))
    page_file = write_evaluation(scores, tmp_path)
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
        names = page.locator(".lookup tbody th")
        assert names.count() == 4
        page.get_by_label("Find a gene").fill("gene11")
        assert [name.split()[0] for name in names.all_inner_texts()] == ["GENE11"]
        assert page.locator(".lookup tbody td").all_inner_texts() == ["0.300", "0.400", "0.002"]
        page.get_by_role("link", name="map").click()
        assert page.url.endswith("#map0")
        page.get_by_label("Find a gene").fill("GENE2, gene1")
        assert page.locator(".found").inner_text() == "4 found."
        assert names.all_inner_texts()[:2] == ["GENE1", "GENE2"]
        with page.expect_download() as download:
            page.get_by_role("button", name="Save these as CSV").click()
        table = pl.read_csv(Path(download.value.path()))
        assert table.columns == ["gene", "ridge", "dense", "noise"]
        assert table["gene"].to_list()[:2] == ["GENE1", "GENE2"]
        page.get_by_label("Find a gene").fill("<b>")
        assert "No gene here has" in page.locator(".found").inner_text()
        figure = page.locator("#map0")
        with page.expect_download() as download:
            figure.get_by_role("button", name="SVG").click()
        assert download.value.suggested_filename == "GENE11.svg"
        assert b">GENE11" not in Path(download.value.path()).read_bytes()  # its name stands in the caption
        assert ET.parse(download.value.path()).getroot().tag == f"{SVG}svg"
        with page.expect_download() as download:
            figure.get_by_role("button", name="PNG").click()
        with Image.open(download.value.path()) as drawn:
            assert drawn.width == 3300  # 11 inches at 300 dpi
        assert page.evaluate("document.documentElement.scrollWidth") <= 1024
        assert not wrong
        browser.close()
