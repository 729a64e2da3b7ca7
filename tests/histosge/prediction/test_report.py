"""The page of a prediction: genes that are named are shown large, on one scale over all slides."""

import re
from pathlib import Path

import numpy as np
import pytest
from _models import invent_model
from _stores import Made, write_store
from matplotlib.text import Text

from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge.prediction.report import _common_limits, write_prediction_report
from histosge.reporting.plots import robust_limits, shared_scale_maps, slide_maps, to_svg
from histosge.training.saved_model import load_model

MADE = Made((19, 23), 11, (7, 11), frame=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = write_store(folder / "store", 2, MADE)
    invent_model(store, "S00", folder / "model", 17)
    predict(store.location.url, folder / "model", str(folder / "maps"))
    return folder


def test_named_genes_are_shown_large_on_every_slide(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.prediction.report.LARGE_GENES", 2)
    saved, store = load_model(world / "model"), ExpressionStore.open(str(world / "maps"))
    slides = sorted(store.maps())
    names = [saved.card.genes[i] for i in (5, 2)]
    pages = []
    for genes in ([], [*names, names[0], saved.card.genes[1]]):
        write_prediction_report(str(world / "maps"), slides[:1], saved, tmp_path / "page.html", genes=genes)
        pages.append((tmp_path / "page.html").read_text())
    alt = [re.findall(r'alt="Predicted maps of ([^"]*) on slide (\w+)\."', page) for page in pages]
    assert alt[0] == []
    assert alt[1] == [(", ".join(names), slide) for slide, _ in slides[:1]]
    limits = _common_limits(store, slides, names)
    values = [
        np.asarray(store.map(*slide).array.read((0, 99), (0, 99))[..., i], dtype=np.float32)
        for slide in slides
        for i in (5, 2)
    ]
    assert limits == pytest.approx(robust_limits(values))


@pytest.mark.parametrize("shape", [(61, 57), (61, 89), (31, 89), (89, 41), (13, 11)])
def test_no_word_of_a_picture_is_cut_off(shape: tuple[int, int]) -> None:
    values = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    figures = [
        shared_scale_maps({f"GENE{i}": values for i in range(n)}, (0.0, 1.0), 110.0) for n in (1, 2, 3, 5)
    ]
    small = {f"GENE{i}": values for i in range(3)}
    figures.append(slide_maps(np.full((*shape, 3), 200, np.uint8), small, 110.0, (0.0, 0.0)))
    for figure in figures:
        figure.draw_without_rendering()
        for text in figure.findobj(Text):
            if not text.get_text() or not text.get_visible() or (text.axes and not text.axes.get_visible()):
                continue
            box = text.get_window_extent()
            # Ticks beyond an axis' limits are not drawn.
            if text.get_text()[0].isalpha():
                assert box.y1 <= figure.bbox.height, (text.get_text(), shape, len(figure.axes))
                assert box.y0 >= 0, (text.get_text(), shape, len(figure.axes))
                assert 0 <= box.x0 <= box.x1 <= figure.bbox.width


def test_a_common_scale_spans_the_robust_range_of_each_map() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0, 1, (31, 37)).astype(np.float32), rng.normal(5, 2, (31, 37)).astype(np.float32)
    one[0], other[1] = np.nan, np.nan
    low, high = robust_limits([one, other])
    assert low == pytest.approx(np.nanpercentile(one, 2))
    assert high == pytest.approx(np.nanpercentile(other, 98))
    empty = np.full((2, 3), np.nan, np.float32)
    assert robust_limits([empty]) == (0.0, 1.0)
    low, high = robust_limits([np.ones((2, 2), np.float32)])
    assert high > low
    assert b"a$_{</text>" in to_svg(shared_scale_maps({"a$_{": one}, (0, 1), 56.0))
