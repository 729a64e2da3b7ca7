"""The registry of expression layouts: ours, and those that other packages bring."""

import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from third_party import install
from write_layouts import visium

import histosge.data.expression.find_expression as finding
from featurestore.errors import ExtensionWarning
from featurestore.extensions import Registry
from histosge.data.expression.expression_layout import LAYOUTS, ExpressionLayout
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.errors import ExpressionError

FRAME = SlideFrame("S", "D", 0.5)
THEIRS = """
import numpy as np
from scipy import sparse

from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.loaded_expression import LoadedExpression, make_spots


def recognises(path):
    return path.suffix == {suffix!r}


def read(path, frame):
    rows = [line.split() for line in path.read_text().splitlines()]
    xy_um = np.array([row[1:3] for row in rows], float)
    counts = sparse.csr_matrix(np.array([row[3:] for row in rows], float))
    names = [row[0] for row in rows]
    return LoadedExpression(make_spots(frame, path, names, xy_um, counts, ["G1", "G2"], diameter_um=7.0), "theirs")


RECORD = ExpressionLayout("theirs", "a table of theirs (.{name})", recognises, read, order={order})
"""


def _add(monkeypatch: pytest.MonkeyPatch, site: Path, source: str) -> None:
    install(site, "expression_layouts", "theirs", source)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "their_theirs", raising=False)
    # A registry reads the entry points once; this one reads them now.
    fresh = Registry(LAYOUTS.kind, "histosge.data.expression.layouts", ExpressionLayout, ExpressionError)
    monkeypatch.setattr(finding, "LAYOUTS", fresh)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def test_a_layout_of_another_package_is_read_and_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, site: Path
) -> None:
    _add(monkeypatch, site, THEIRS.format(suffix=".spots", name="spots", order=60))
    (tmp_path / "a.spots").write_text("b1 11 13 2 3\nb2 17 19 5 7\n")
    found = finding.find_expression(tmp_path / "a.spots", FRAME)
    assert found.layout == "theirs"
    np.testing.assert_array_equal(found.spots.xy_um, [[11, 13], [17, 19]])
    np.testing.assert_array_equal(found.spots.counts.toarray(), [[2, 3], [5, 7]])
    with pytest.raises(
        ExpressionError, match=r"an AnnData .*legacy ST tables or a table of theirs \(\.spots\)$"
    ):
        finding.find_expression(tmp_path / "absent", FRAME)


@pytest.mark.parametrize(("order", "layout"), [(5, "theirs"), (60, "AnnData")])
def test_the_order_decides_who_is_tried_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, site: Path, order: int, layout: str
) -> None:
    source = THEIRS.format(suffix=".h5ad", name="h5ad", order=order)
    source = source.replace("path.read_text().splitlines()", "['b1 11 13 2 3']")
    _add(monkeypatch, site, source)
    data = anndata.AnnData(np.array([[2.0, 3.0]]), obsm={"spatial": np.array([[11.0, 13.0]])})
    data.write_h5ad(tmp_path / "a.h5ad")
    assert finding.find_expression(tmp_path / "a.h5ad", FRAME).layout == layout


def test_a_broken_layout_is_one_warning_and_the_others_are_still_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, site: Path
) -> None:
    _add(monkeypatch, site, "raise RuntimeError('no such\\nlibrary')")
    home = visium(tmp_path / "outs", "tissue_positions.csv")
    with pytest.warns(
        ExtensionWarning, match="'theirs'.*is left out: RuntimeError: no such library"
    ) as caught:
        assert finding.find_expression(home, FRAME).layout == "Visium"
    assert len(caught) == 1


def test_every_record_reads_as_part_of_the_message() -> None:
    for layout in LAYOUTS.own.values():
        assert layout.help.split()[0] in {"a", "an", "legacy"}, layout.name
        assert not layout.help.endswith("."), layout.name
    assert list(LAYOUTS.own) == ["anndata", "legacy-st", "space-ranger", "spatialdata", "xenium"]
