"""Means of genes in regions, against numpy over whole arrays and matplotlib's test of points in polygons."""

import json
import urllib.error
import urllib.request
from typing import Any

import anndata
import numpy as np
import pytest
import shapely
from matplotlib.path import Path as Outline
from viewer_world import GENES, GRID, MPP, Get, World

from featurestore.blocks import Block
from featurestore.storage.block_array import BlockArray
from histosge.errors import ViewError
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.collection import Collection
from histosge.viewer.region_means import MAX_CORNERS, parse_region, patches_inside

BARE, GONE, HERE = 0, 1, 2
TRIANGLE = [[301.0, 353.0], [907.0, 401.0], [509.0, 883.0]]
SQUARE = [[601.0, 501.0], [1103.0, 501.0], [1103.0, 907.0], [601.0, 907.0]]


def _post(address: str, path: str, content: object, kind: str = "application/json") -> tuple[int, Any]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(f"{address}/{path}", data, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def _map(world: World, slide: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values ``(n, genes)`` and centres ``(n, 2)`` of the patches that hold a prediction."""
    stored = ExpressionStore.open(str(world.maps)).map(slide, GRID.key)
    values = stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols)).astype(np.float64)
    x, y = np.meshgrid(stored.grid.x_um, stored.grid.y_um)
    known = np.isfinite(values[..., 0])
    return values[known], np.stack([x[known], y[known]], axis=1)


def _cohen_d(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    spread = [((part - part.mean(axis=0)) ** 2).sum(axis=0) for part in (one, other)]
    return (one.mean(axis=0) - other.mean(axis=0)) / np.sqrt(sum(spread) / (len(one) + len(other) - 2))


def test_a_region_is_compared_with_the_rest_of_the_tissue(address: str, world: World) -> None:
    status, found = _post(address, f"data/{HERE}/regions", {"layer": 0, "region": [[TRIANGLE]]})
    assert status == 200
    values, places = _map(world, "here")
    inside = Outline(TRIANGLE).contains_points(places)
    predicted = found["predicted"]
    assert (predicted["n"], predicted["n_rest"]) == (inside.sum(), (~inside).sum())
    np.testing.assert_allclose(predicted["mean"], values[inside].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(predicted["rest"], values[~inside].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(
        predicted["effect"][:2], _cohen_d(values[inside, :2], values[~inside, :2]), rtol=1e-3
    )
    assert predicted["effect"][2:] == [None] * 3, "genes without spread have no effect size"
    spots = anndata.read_h5ad(world.store.parent / "spots.h5ad")
    logged = np.log1p(spots.X / spots.X.sum(axis=1, keepdims=True) * 1e4)
    inside = Outline(TRIANGLE).contains_points(spots.obsm["spatial"] * MPP)
    measured = found["measured"]
    assert (measured["n"], measured["n_rest"]) == (inside.sum(), (~inside).sum())
    np.testing.assert_allclose(
        measured["difference"], logged[inside].mean(axis=0) - logged[~inside].mean(axis=0), atol=1e-4
    )
    np.testing.assert_allclose(measured["effect"], _cohen_d(logged[inside], logged[~inside]), rtol=1e-3)


def test_two_regions_are_compared_with_each_other(address: str, world: World) -> None:
    asked = {"layer": 0, "region": [[TRIANGLE]], "other": [[SQUARE]]}
    status, found = _post(address, f"data/{GONE}/regions", asked)
    assert status == 200
    assert found["measured"] is None, "no spots are known of this slide"
    values, places = _map(world, "gone")
    one, other = (Outline(ring).contains_points(places) for ring in (TRIANGLE, SQUARE))
    assert found["predicted"]["n_rest"] == other.sum()
    np.testing.assert_allclose(
        found["predicted"]["difference"], values[one].mean(axis=0) - values[other].mean(axis=0), atol=1e-4
    )


def test_the_first_region_reads_each_block_once_and_a_later_one_its_own_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    read_block = BlockArray.read_block

    def counted_read(array: BlockArray, block: Block) -> np.ndarray:
        read.append(block.index)
        return read_block(array, block)

    monkeypatch.setattr(BlockArray, "read_block", counted_read)
    slide = Collection.open(str(world.store), str(world.maps)).slide(HERE)
    found = []
    for _ in range(2):
        read.clear()
        found.append(slide.compare_region(0, parse_region([[TRIANGLE]]))["predicted"])
        assert len(read) == len(set(read))
        found[-1]["reads"] = len(read)
    assert 0 < found[1]["reads"] < found[0]["reads"]
    for name in ("mean", "rest", "difference"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=2e-5)
    np.testing.assert_allclose(found[0]["effect"][:2], found[1]["effect"][:2], rtol=1e-3)
    assert (found[0]["n"], found[0]["n_rest"]) == (found[1]["n"], found[1]["n_rest"])


def test_holes_are_left_out_and_a_lasso_may_cross_itself(world: World) -> None:
    grid = ExpressionStore.open(str(world.maps)).map("here", GRID.key).grid
    whole = [[100.0, 100.0], [1000.0, 100.0], [1000.0, 1000.0], [100.0, 1000.0]]
    hole = [[400.0, 400.0], [700.0, 400.0], [700.0, 700.0], [400.0, 700.0]]
    count = [
        int(patches_inside(parse_region([rings]), grid).sum()) for rings in ([whole], [hole], [whole, hole])
    ]
    assert count[2] == count[0] - count[1]
    bow_tie = [[100.0, 100.0], [1000.0, 1000.0], [1000.0, 100.0], [100.0, 1000.0]]
    assert parse_region([[bow_tie]]).area == pytest.approx(2 * 0.5 * 900 * 450)


def test_a_region_beside_the_slide_holds_nothing(address: str) -> None:
    far = [[[[90000, 90000], [90001, 90000], [90000, 90001]]]]
    status, found = _post(address, f"data/{HERE}/regions", {"layer": 0, "region": far})
    assert status == 200
    assert (found["predicted"]["n"], found["measured"]["n"]) == (0, 0)
    assert found["predicted"]["mean"] == [None] * len(GENES)


def test_a_slide_without_a_map_has_nothing_to_compare(address: str) -> None:
    status, found = _post(address, f"data/{BARE}/regions", {"region": [[TRIANGLE]]})
    assert (status, found) == (200, {"predicted": None, "measured": None})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"{" * 100_000,
        {"region": None},
        {"region": [[]]},
        {"region": [[[[1, 2], [3, 4]]]]},
        {"region": [[[[1, 2], [3, float("nan")], [5, 6]]]]},
        {"region": [[[["a", "b"], ["c", "d"], ["e", "f"]]]]},
        {"region": [[[[1, 2, 3], [3, 4, 5], [5, 6, 7]]]]},
        {"region": [[TRIANGLE]], "layer": "0"},
        {"region": [[TRIANGLE]], "other": 7},
    ],
)
def test_what_is_no_region_is_refused_in_one_line(address: str, content: object) -> None:
    status, found = _post(address, f"data/{HERE}/regions", content)
    assert status == 400
    assert found["error"]
    assert "\n" not in found["error"]


def test_other_sites_and_large_requests_are_refused(address: str, get: Get) -> None:
    asked = {"layer": 0, "region": [[TRIANGLE]]}
    assert _post(address, f"data/{HERE}/regions", asked, "text/plain")[0] == 400
    assert _post(address, f"data/{HERE}/regions", b" " * 8_100_000)[0] == 400
    assert _post(address, f"data/{HERE}/regions", {**asked, "layer": 7})[0] == 404
    assert _post(address, "data/9/regions", asked)[0] == 404
    assert get(f"data/{HERE}/regions").status == 405


def test_outlines_of_very_many_corners_are_refused() -> None:
    angles = np.linspace(0, 6, MAX_CORNERS + 1)
    with pytest.raises(ViewError, match="simplify"):
        parse_region([[np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist()]])
    assert isinstance(parse_region([[TRIANGLE]]), shapely.Polygon)
