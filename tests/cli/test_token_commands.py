"""A grid of tokens from the command line: embedded, trained on, predicted and exported as any other grid is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from featurestore.grid import TokenGridSpec
from featurestore.storage.store import Store
from histosge import Loader, LoadSettings
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.prediction.expression_store import ExpressionStore
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

Histosge = Callable[..., NamedTuple]
SPEC = SyntheticSpec(
    size_px=(808, 760), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41.0, spot_pitch_um=59.0
)
NETWORK = ("--encoder", "timm:test_efficientnet", "--random-weights", "--device", "cpu")
GRID = ("--mpp", 0.5, "--patch", 160)
TOKENS = TokenGridSpec.from_patches(0.5, 160, 5, cls_token=True)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"), SPEC, 2).sheet


@pytest.mark.e2e
def test_a_token_grid_goes_the_whole_way(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    store, model, maps = (tmp_path / name for name in ("store", "model", "maps"))
    run = histosge("embed", sheet, store, *NETWORK, *GRID, "--tokens", "5+cls")
    assert run.code == 0, run.err
    assert TOKENS.key == "mpp0.5000_px160_stride160_tokens5_cls"
    assert TOKENS.key in histosge("ls", store, "--json").out
    assert histosge("validate", store).code == 0
    assert "nothing to do" in histosge("embed", sheet, store, *NETWORK, *GRID, "--tokens", "5+cls").out
    assert histosge("train", sheet, store, model, "--genes", 4).code == 0
    card = json.loads((model / "config.json").read_text())["card"]
    assert card["grid"]["tokens"] == 5
    run = histosge("predict", store, model, maps, "--report", tmp_path / "maps.html")
    assert run.code == 0, run.err
    (slide_id, *_) = Store.open(store).slide_ids()
    grid = Store.open(store).grid(slide_id, TOKENS.key)
    predicted = ExpressionStore.open(str(maps)).map(slide_id, TOKENS.key).grid
    assert predicted == grid.grid
    assert predicted.shape == (4 * 5, 5 * 5)
    assert histosge("validate", maps).code == 0
    for kind, name in (("geojson", "maps.geojson"), ("ome-zarr", "maps.zarr")):
        run = histosge("export", maps, tmp_path / name, "--to", kind, "--slide", slide_id)
        assert run.code == 0, run.err
    run = histosge("evaluate", sheet, store, tmp_path / "report", "--split", "section", "--presets", "ridge")
    assert run.code == 0, run.err
    assert (
        "16 µm groups of tokens, 5 x 5 of each 80 µm patch" in (tmp_path / "report/report.html").read_text()
    )
    # Another grid of the same encoder: the options that make the model's own are named.
    assert histosge("embed", sheet, tmp_path / "other", *NETWORK, *GRID).code == 0
    run = histosge("predict", tmp_path / "other", model, tmp_path / "more")
    assert run.code == 2
    assert "embed with --mpp 0.5 --patch 160 --tokens 5+cls or train again" in " ".join(run.err.split())
    run = histosge("embed", sheet, store, *NETWORK, *GRID)
    assert run.code == 0
    # Of two embeddings in the store, the one that the model was trained on.
    assert "nothing to do" in (run := histosge("predict", store, model, maps)).out + run.err


def test_spots_lie_on_the_positions_under_their_discs(
    sheet: Path, histosge: Histosge, tmp_path: Path
) -> None:
    """Held-out spots are kept apart by what a token sees, which is its whole patch, not by the side of a position."""
    store = tmp_path / "store"
    assert histosge("embed", sheet, store, *NETWORK, *GRID, "--tokens", 5, "--tissue", "none").code == 0
    opened = Store.open(store)
    (slide_id, *_) = opened.slide_ids()
    (key,) = opened.grid_keys(slide_id)
    patches = load_patches(open_embedded(opened, slide_id, key, None))
    assert (patches.patch_um, patches.stride_um, patches.receptive_um) == (16.0, 16.0, 80.0)
    assert np.allclose(patches.xy_um[:, 0], 8 + 16 * patches.cols)
    # Streamed, each position comes once, with the vector that it has in the store.
    known = dict(
        zip(zip(patches.rows.tolist(), patches.cols.tolist(), strict=True), patches.embedding, strict=True)
    )
    seen = set()
    for slide, rows, cols, embedding in Loader(store, settings=LoadSettings(batch=64, seed=0)):
        for i in np.flatnonzero(slide == 0):
            place = int(rows[i]), int(cols[i])
            assert np.array_equal(embedding[i].astype(np.float32), known[place])
            seen.add(place)
    assert seen == set(known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--tokens", "four"),
            "--tokens 'four' is no number of positions along a patch; give it such as 4, or 4+cls",
        ),
        (("--tokens", "4+mean"), "--tokens '4+mean' is no number"),
        (
            ("--tokens", 4),
            "5 x 5 tokens of a patch of 160 px, which --tokens 4 does not divide; give --tokens 1 or 5",
        ),
        (("--tokens", 7), "7 x 7 positions do not divide a patch of 160 px; give one of 1, 2, 4, 5, 8"),
        (
            ("--tokens", 5, "--stride", 80),
            "--stride 80 does not go with --tokens, whose patches lie edge to edge",
        ),
        (
            ("--tokens", 4, "--token-overlap", 32),
            "32 does not cut off whole tokens; give --token-overlap 0 or 64",
        ),
        (("--token-overlap", 32), "--token-overlap is the overlap of patches with --tokens"),
        (("--tokens", 5, "--encoder", "morphology"), "morphology has no map of tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused_in_one_line(
    histosge: Histosge, sheet: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    run = histosge("embed", sheet, tmp_path / "store", *NETWORK, *GRID, *options)
    assert run.code == 2
    assert message in " ".join(run.err.split())
    assert not (tmp_path / "store").exists()
