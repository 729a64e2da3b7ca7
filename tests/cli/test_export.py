"""`histosge export` on both kinds of store, as a user types it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.storage.store import Store
from histosge.exporting.export_format import FORMATS
from histosge.prediction.expression_store import ExpressionStore

Histosge = Callable[..., NamedTuple]
GRID = "mpp1.0000_px32_stride16"


@pytest.fixture
def store(histosge: Histosge, tmp_path: Path) -> Path:
    slide = write_pyramid(tmp_path / "A.tif", tissue_like(700, 600, 0.5), 0.5)
    options = ("--mpp", 1.0, "--patch", 32, "--stride", 16, "--encoder", "colour")
    assert histosge("embed", slide, tmp_path / "store", *options).code == 0
    return tmp_path / "store"


@pytest.fixture
def maps(store: Path, tmp_path: Path) -> Path:
    stored = Store.open(str(store)).grid("A", GRID)
    target = ExpressionStore.open_or_create(str(tmp_path / "maps")).add_map(
        stored, ("G1", "G2"), (32, 32), {}
    )
    for block in target.planned():
        target.array.write(block, np.full((*block.shape, 2), (0.5, 1.5), np.float32))
    return tmp_path / "maps"


def test_one_command_serves_maps_and_embeddings(
    histosge: Histosge, store: Path, maps: Path, tmp_path: Path
) -> None:
    ran = histosge("export", maps, tmp_path / "m.h5ad", "--to", "h5ad", "--store", store, "--genes", "G2")
    assert (ran.code, ran.err) == (0, "")
    assert "patches x 1 gene\n" in ran.out
    assert (anndata.read_h5ad(tmp_path / "m.h5ad").X == 1.5).all()
    ran = histosge("export", store, tmp_path / "e.h5ad", "--to", "h5ad")
    assert ran.code == 0
    assert "features" in ran.out
    again = histosge("export", store, tmp_path / "e.h5ad", "--to", "h5ad")
    assert again.out == ran.out.replace(": ", ": nothing to do, ", 1)


def test_a_picture_that_stands_in_is_said_unless_quiet(
    histosge: Histosge, maps: Path, tmp_path: Path
) -> None:
    ran = histosge("export", maps, tmp_path / "m.h5ad", "--to", "h5ad")
    assert "mean colours are used as the picture" in ran.err
    assert histosge("export", maps, tmp_path / "m.h5ad", "--to", "h5ad", "--quiet").err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "imagej"), "unknown name 'imagej' among exports"),
        (("--to", "h5ad", "--genes", "G3"), "no gene 'G3': did you mean"),
        (("--to", "h5ad", "--slide", "Z"), "no map of slide 'Z'"),
        (("--to", "ome-zarr", "--ngff", "0.3"), "known: 0.4, 0.5"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    histosge: Histosge, maps: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = histosge("export", maps, tmp_path / "out", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_nothing_there_is_said(histosge: Histosge, tmp_path: Path) -> None:
    ran = histosge("export", tmp_path / "none", tmp_path / "out", "--to", "h5ad")
    assert ran.code == 2
    assert "there is no store" in ran.err


def test_help_lists_every_registered_format_and_no_other_command_loads_them(histosge: Histosge) -> None:
    ran = histosge("export", "--help")
    assert ran.code == 0
    words = " ".join(ran.out.replace("│", " ").split())
    for record in FORMATS.own.values():
        assert f"{record.name}: {record.help}" in words
    code = (
        "import sys, histosge_cli.main; print([m for m in sys.modules if m.startswith('histosge.exporting')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_figure_draws_genes_and_says_what_it_cannot(
    histosge: Histosge, maps: Path, store: Path, tmp_path: Path
) -> None:
    ran = histosge("figure", maps, "--slide", "A", "--genes", "G1,G2", "--scale", "0,2", tmp_path / "f.png")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'f.png'}: G1, G2 on slide A\n")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ((maps, "--genes", "G3"), "no gene 'G3': did you mean G2 or G1?"),
        ((maps, "--genes", "G1", "--slide", "a1"), "no map of slide 'a1'"),
        ((maps, "--genes", "G1", "--scale", "2,1"), "--scale 2,1 is no scale"),
        ((store, "--genes", "G1"), "figure EXPRESSION OUT"),
    ):
        refused = histosge("figure", *arguments, tmp_path / "g.png")
        assert refused.code == 2
        assert message in refused.err
        assert len(refused.err.strip().splitlines()) == 1
