"""Figures of maps: panels at their place and scale, a caption that states what the model's card states."""

import re
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from make_maps import make_map
from PIL import Image

from featurestore.errors import EarlierResultError, FeatureStoreError
from histosge.errors import ExportError
from histosge.exporting import figure
from histosge.exporting.figure import FigureSettings, bar_length_um, draw_figure
from histosge.prediction.expression_store import ExpressionStore


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "maps"
    make_map(folder, "A", trust=(0.7, 0.05, 0.3), depth=8.0, trained_on=False)
    make_map(folder, "B")
    return folder


def _svg_text(path: Path) -> str:
    # matplotlib writes each line of a text as an element of its own.
    found = re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(), re.DOTALL)
    return " ".join(" ".join(re.sub("<[^>]*>", " ", text).split()) for text in found)


@pytest.mark.parametrize("name", ["f.pdf", "f.png", "f.svg"])
def test_the_same_figure_again_is_nothing_to_do_and_another_is_not_replaced(
    maps: Path, tmp_path: Path, name: str
) -> None:
    drawn = draw_figure(maps, ["EPCAM", "CD3E", "EPCAM"], tmp_path / name, "A")
    assert (drawn.genes, drawn.was_there) == (("EPCAM", "CD3E"), False)
    first = (tmp_path / name).read_bytes()
    assert draw_figure(maps, ["EPCAM", "CD3E"], tmp_path / name, "A").was_there
    with pytest.raises(EarlierResultError, match="--overwrite"):
        draw_figure(maps, ["COL1A1"], tmp_path / name, "A")
    assert (tmp_path / name).read_bytes() == first
    draw_figure(maps, ["COL1A1"], tmp_path / name, "A", overwrite=True)
    assert (tmp_path / name).read_bytes() != first


def test_the_caption_states_unit_grid_model_depth_trust_and_training(maps: Path, tmp_path: Path) -> None:
    draw_figure(maps, ["EPCAM", "CD3E"], tmp_path / "f.svg", "A")
    text = _svg_text(tmp_path / "f.svg").replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        "Predicted, not measured",
        "slide A",
        "log1p(CP10k)",
        "model dense (known)",
        "patches of 16 µm every 8 µm",
        "The model was trained without spots of this slide.",
        "median 2,981 counts per spot",
        "EPCAM 0.70, CD3E 0.05 (not trusted)",
        "90 % prediction interval",
        "EPCAM ± 0.25",
    ):
        assert part in text
    assert "CD3E (not trusted)" in text
    draw_figure(maps, ["EPCAM"], tmp_path / "b.svg", "B")
    assert "not calibrated" in _svg_text(tmp_path / "b.svg")


def test_a_page_wide_figure_has_300_dots_an_inch(maps: Path, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    draw_figure(maps, ["EPCAM"], tmp_path / "f.png", "A")
    assert dict(mpl.rcParams) == before  # the user's own settings
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.width / 300 * 25.4 == pytest.approx(180, abs=0.5)
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)


def test_one_scale_is_that_of_all_genes_and_own_scales_are_not(maps: Path) -> None:
    values = ExpressionStore.open(str(maps)).map("A", "mpp0.5000_px32_stride16").array.read((0, 99), (0, 99))
    genes = values.astype(np.float64).transpose(2, 0, 1)[:2]
    each = [tuple(np.nanpercentile(gene, (2, 98))) for gene in genes]
    own = figure._limits(genes.astype(np.float32), "own")
    np.testing.assert_allclose(own, each, rtol=1e-6)
    shared = figure._limits(genes.astype(np.float32), "shared")
    assert shared[0] == shared[1]
    np.testing.assert_allclose(
        shared[0], (min(low for low, _ in each), max(high for _, high in each)), rtol=1e-6
    )
    assert figure._limits(genes.astype(np.float32), (0.0, 3.0)) == [(0.0, 3.0)] * 2


def test_panels_hold_each_gene_at_its_place(maps: Path) -> None:
    stored = ExpressionStore.open(str(maps)).map("A", "mpp0.5000_px32_stride16")
    panels = figure._read_panels(stored, ["CD3E", "EPCAM"])
    _, rows, cols = panels.values.shape
    x = panels.corner_um[0] + (np.arange(cols) + 0.5) * panels.step_um
    y = panels.corner_um[1] + (np.arange(rows) + 0.5) * panels.step_um
    known = np.isfinite(panels.values[0])
    assert (known == panels.tissue).all()
    assert known.sum() == stored.is_tissue.sum()
    np.testing.assert_allclose(
        panels.values[0][known], np.broadcast_to(y[:, None] / 89, known.shape)[known], atol=0.01
    )
    np.testing.assert_allclose(
        panels.values[1][known], np.broadcast_to(x / 97, known.shape)[known], atol=0.01
    )


def test_cells_of_a_large_map_are_means_of_its_patches(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ExpressionStore.open(str(maps)).map("A", "mpp0.5000_px32_stride16")
    monkeypatch.setattr(figure, "MAX_SIDE", 13)
    panels = figure._read_panels(stored, ["EPCAM"])
    assert panels.merged == 3
    assert max(panels.tissue.shape) <= 13
    whole = figure._cell_means(np.where(panels.tissue[..., None], panels.values[0][..., None], np.nan), 1)[0]
    x = panels.corner_um[0] + (np.arange(panels.tissue.shape[1]) + 0.5) * panels.step_um
    inner = np.isfinite(whole)
    # A cell at the rim is the mean of the patches that it has.
    assert np.median(np.abs(whole * 97 - x)[inner]) < 0.2


@pytest.mark.parametrize(
    ("width", "length"), [(4000.0, 1000.0), (3999.0, 500.0), (90.0, 20.0), (21000.0, 5000.0)]
)
def test_a_scale_bar_is_a_round_length_of_at_most_a_quarter(width: float, length: float) -> None:
    assert bar_length_um(width) == length


def test_names_that_are_formulas_or_foreign_letters_are_drawn(tmp_path: Path) -> None:
    make_map(tmp_path / "maps", "A", genes=("a$_{", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "x"))
    # As text in the file: a formula would be drawn as other characters, or be refused.
    draw_figure(tmp_path / "maps", ["a$_{", "\N{CJK UNIFIED IDEOGRAPH-4E2D}"], tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text()
    assert "a$_{" in drawn
    assert "\N{CJK UNIFIED IDEOGRAPH-4E2D}" in drawn


@pytest.mark.parametrize(
    ("genes", "name", "slide", "message"),
    [
        (["EPCM"], "f.png", "A", "no gene 'EPCM': did you mean EPCAM"),
        (["EPCAM"], "f.png", "a", "no map of slide 'a'"),
        (["EPCAM"], "f.png", "AB", "did you mean"),
        (["EPCAM"], "f.png", None, "2 slides; name one with --slide: A, B"),
        (["EPCAM"], "f.jpg", "A", r"none of .pdf, .png, .svg"),
        ([], "f.png", "A", "not 0"),
        ([f"g{i}" for i in range(25)], "f.png", "A", "1 to 24 genes, not 25"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    maps: Path, tmp_path: Path, genes: list[str], name: str, slide: str | None, message: str
) -> None:
    with pytest.raises(ExportError, match=message) as refused:
        draw_figure(maps, genes, tmp_path / name, slide)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["all", (2.0, 1.0), (0.0, float("nan"))])
def test_a_scale_that_is_none_is_refused(scale: str | tuple[float, float]) -> None:
    with pytest.raises(ExportError, match="is no scale"):
        FigureSettings(scale)


def test_a_map_with_a_missing_block_is_refused(maps: Path, tmp_path: Path) -> None:
    shutil.copytree(maps, tmp_path / "maps")
    next((tmp_path / "maps" / "A").glob("*/expression/c/1/*/0")).unlink()
    with pytest.raises(FeatureStoreError, match="predict"):
        draw_figure(tmp_path / "maps", ["EPCAM"], tmp_path / "f.png", "A")
