"""The server over HTTP: what a page asks for, and what it must not get."""

import http.client
import io
import json
import urllib.parse
from pathlib import Path

import anndata
import numpy as np
import polars as pl
import pytest
from PIL import Image
from viewer_world import GENES, GRID, MPP, SIZE, SPOT_GENES, Get, World

from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.map_domains import table_domains_made_by

BARE, GONE, HERE = 0, 1, 2


def _json(get: Get, path: str) -> dict:
    answer = get(path)
    assert answer.status == 200, answer
    return json.loads(answer.body)


def test_slides_are_listed_and_described(get: Get) -> None:
    assert _json(get, "data/index.json")["slides"] == ["bare", "gone", "here"]
    slide = _json(get, f"data/{HERE}/slide.json")
    assert slide["size_um"] == [SIZE[0] * MPP, SIZE[1] * MPP]
    assert (slide["layers"], slide["spots"], slide["notes"]) == ([GRID.key], True, [])


def test_tiles_are_the_slides_own_pixels(get: Get, world: World) -> None:
    picture = _json(get, f"data/{HERE}/picture.json")
    assert picture["state"] == "ready"
    source = open_slide(str(world.store.parent / "slides" / "here.tif"))
    finest = picture["max_level"]
    answer = get(f"data/{HERE}/tiles/{finest}/1_1.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    tile = np.asarray(Image.open(io.BytesIO(answer.body))).astype(int)
    expected = source.read_region(512, 512, 512, 512, MPP).astype(int)
    assert tile.shape == expected.shape
    assert np.abs(tile - expected).mean() < 6
    edge = Image.open(io.BytesIO(get(f"data/{HERE}/tiles/{finest}/2_2.jpg").body))
    assert edge.size == (SIZE[0] - 1024, SIZE[1] - 1024)


def test_a_gene_comes_as_the_store_holds_it(get: Get, world: World) -> None:
    layer = _json(get, f"data/{HERE}/layers/0/layer.json")
    assert layer["genes"] == list(GENES)
    assert layer["unit"] == "log1p of counts per 10,000"
    stored = ExpressionStore.open(str(world.maps)).map("here", GRID.key)
    for gene in (0, 4):
        body = get(f"data/{HERE}/layers/0/genes/{gene}.f16").body
        values = np.frombuffer(body, "<f2").reshape(layer["shape"])
        expected = stored.array.read((0, layer["shape"][0]), (0, layer["shape"][1]))[..., gene]
        np.testing.assert_array_equal(values, expected)


def test_quality_flags_come_with_their_names_as_the_store_holds_them(get: Get, world: World) -> None:
    assert (
        "only those that are skipped were left out"
        in _json(get, f"data/{HERE}/layers/0/layer.json")["quality_by"]
    )
    """The slide is clean: its tissue patches have no flag but that their focus was measured, which is not shown."""
    layer = _json(get, f"data/{HERE}/layers/0/layer.json")
    assert layer["quality"] == ["pen", "blur", "fold", "bubble", "edge", "skipped"]
    body = get(f"data/{HERE}/layers/0/quality.u8").body
    stored = Store.open(str(world.store)).quality("here", GRID.key, tuple(layer["shape"]))
    np.testing.assert_array_equal(np.frombuffer(body, np.uint8).reshape(layer["shape"]), stored)
    assert stored.any()


def test_patches_are_placed_around_their_centres(get: Get, world: World) -> None:
    layer = _json(get, f"data/{HERE}/layers/0/layer.json")
    grid = ExpressionStore.open(str(world.maps)).map("here", GRID.key).grid
    for axis, centres in ((0, grid.x_um), (1, grid.y_um)):
        origin, step = layer["origin_um"][axis], layer["step_um"]
        np.testing.assert_allclose(origin + (np.arange(len(centres)) + 0.5) * step, centres)


def test_what_is_known_of_a_gene_comes_with_it_and_unknown_is_null(get: Get) -> None:
    layer = _json(get, f"data/{HERE}/layers/0/layer.json")
    assert layer["half_widths"] == [[0.0], [0.25], [0.5], [0.75], [1.0]]
    assert layer["half_width_texts"][1] == "± 0.25"
    assert layer["trust"] == [0.9, 0.5, None, 0.1, 0.0]
    assert layer["interval"] == "90 % prediction interval (donors not considered)"
    assert not layer["strata"]
    assert get(f"data/{HERE}/layers/0/strata.i16").status == 404


def test_half_widths_are_those_of_each_patch_s_predicted_depth(get: Get, world: World) -> None:
    layer = _json(get, f"data/{GONE}/layers/0/layer.json")
    assert layer["interval"] == "80 % prediction interval (donors not considered)"
    assert layer["half_width_texts"][2] == "± 0.30 to ± 1.20"
    strata = np.frombuffer(get(f"data/{GONE}/layers/0/strata.i16").body, "<i2").reshape(layer["shape"])
    stored = ExpressionStore.open(str(world.maps)).map("gone", GRID.key)
    size = stored.grid.n_rows, stored.grid.n_cols
    values, _, upper = stored.read_with_bounds((0, size[0]), (0, size[1]))
    known = np.isfinite(values[..., 2])
    assert set(np.unique(strata[known])) == {0, 1, 2}
    assert (strata[~known] == -1).all()
    shown = np.array(layer["half_widths"][2])[strata[known]]
    np.testing.assert_allclose(shown, (upper - values)[known][:, 2], atol=2e-3)


def test_the_page_states_whether_the_model_was_trained_on_the_slide(get: Get) -> None:
    trained, untrained = (_json(get, f"data/{n}/layers/0/layer.json")["caveat"] for n in (HERE, GONE))
    assert trained.startswith("The model was trained on spots of this slide")
    assert untrained.startswith("The model was trained without spots of this slide.")


def test_spots_come_with_places_in_microns_and_values_as_models_see_them(get: Get, world: World) -> None:
    spots = _json(get, f"data/{HERE}/spots.json")
    assert spots["genes"] == list(SPOT_GENES)
    data = anndata.read_h5ad(world.store.parent / "spots.h5ad")
    np.testing.assert_allclose(spots["xy_um"], data.obsm["spatial"] * MPP)
    gene = SPOT_GENES.index("ONLY9")
    values = np.frombuffer(get(f"data/{HERE}/spots/{gene}.f16").body, "<f2")
    expected = np.log1p(data.X[:, gene] / data.X.sum(axis=1) * 1e4)
    np.testing.assert_allclose(values, expected, rtol=1e-3)


def test_domains_come_from_a_table(get: Get) -> None:
    layer = _json(get, f"data/{HERE}/layers/0/layer.json")
    labels = np.frombuffer(get(f"data/{HERE}/layers/0/domains.i16").body, "<i2").reshape(layer["shape"])
    assert layer["domains"] == 2
    assert layer["domains_by"].endswith("that this page was given: two halves of a test.")
    assert set(np.unique(labels)) == {-1, 0, 1}
    assert _json(get, f"data/{GONE}/layers/0/layer.json")["domains"] == 0
    assert get(f"data/{GONE}/layers/0/domains.i16").status == 404


def test_who_made_domains_is_said_at_a_length_that_a_legend_takes(tmp_path: Path) -> None:
    frame = pl.DataFrame({"row": [0], "col": [0], "cluster": [0]})
    frame.write_parquet(tmp_path / "a.parquet", metadata={"made_by": "x" * 9000})
    frame.write_parquet(tmp_path / "b.parquet")
    assert len(table_domains_made_by(tmp_path, "a")) < 300
    assert table_domains_made_by(tmp_path, "b").endswith("that this page was given.")


def test_a_slide_that_is_gone_is_said_with_its_reason_and_its_thumbnail_is_there(get: Get) -> None:
    picture = _json(get, f"data/{GONE}/picture.json")
    assert picture["state"] == "absent"
    assert "there is no slide at" in picture["reason"]
    thumbnail = Image.open(io.BytesIO(get(f"data/{GONE}/thumbnail.png").body))
    shape = _json(get, f"data/{GONE}/slide.json")["thumbnail"]["shape"]
    assert thumbnail.size == (shape[1], shape[0])
    assert get(f"data/{GONE}/tiles/0/0_0.jpg").status == 404


def test_a_slide_without_a_map_says_how_to_make_one(get: Get) -> None:
    slide = _json(get, f"data/{BARE}/slide.json")
    assert "histosge predict" in slide["notes"][0]
    assert _json(get, f"data/{BARE}/layers/0/layer.json")["genes"] == []
    assert get(f"data/{BARE}/layers/0/genes/0.f16").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "data/3/slide.json",
        "data/here/slide.json",
        "data/99999999999999999999/slide.json",
        f"data/{HERE}/layers/1/layer.json",
        f"data/{HERE}/layers/0/genes/5.f16",
        f"data/{HERE}/spots/5.f16",
        f"data/{HERE}/tiles/0/1_0.jpg",
        f"data/{HERE}/tiles/77/0_0.jpg",
        "data/../../etc/passwd",
        "static/../server.py",
        "static/%2e%2e/%2e%2e/server.py",
        "static/..%2fserver.py",
        "static//etc/passwd",
        "static/vendor/",
        "static/vendor/README.md",
    ],
)
def test_what_is_not_there_is_not_found(get: Get, path: str) -> None:
    answer = get(path)
    assert answer.status == 404
    assert b"Traceback" not in answer.body


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "localhost@evil", "", "127.0.0.1:x"]
)
def test_a_page_asked_for_under_another_name_is_refused(address: str, host: str) -> None:
    where = urllib.parse.urlsplit(address)
    for path in ("/", "/data/index.json"):
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 400
        assert b"here" not in body


def test_the_page_and_its_parts_are_served_and_kept_to_themselves(get: Get) -> None:
    page = get("", Host="localhost")
    assert page.status == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    text = page.body.decode()
    assert "http://" not in text
    assert "https://" not in text
    for part in ("static/main.js", "static/viewer.css", "static/vendor/openseadragon.min.js"):
        assert part in text
        assert get(part).status == 200
    headers = get("data/index.json").headers
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_only_tiles_are_kept_by_the_browser(get: Get) -> None:
    assert "immutable" in get(f"data/{HERE}/tiles/0/0_0.jpg").headers["cache-control"]
    assert get(f"data/{HERE}/layers/0/genes/0.f16").headers["cache-control"] == "no-store"
