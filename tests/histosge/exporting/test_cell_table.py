"""Expression per cell from outlines of other tools: the map's mean under each outline, at the right cell."""

import gzip
import json
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import polars as pl
import pytest
import shapely
from make_maps import SLIDE_MPP, make_map
from matplotlib.path import Path as Outline

from featurestore.errors import EarlierResultError, FeatureStoreError
from histosge.data.expression import foreign_files
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.outlines import json_outlines, open_outlines
from histosge.errors import HistosgeError
from histosge.exporting.cell_table import check_outlines, write_cells
from histosge.prediction.stored_map import StoredMap

FRAME = SlideFrame("A", "", SLIDE_MPP, (1120, 880))
N = 57


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredMap:
    return make_map(tmp_path_factory.mktemp("cells") / "maps", "A", trust=(0.7, 0.05, 0.3), depth=8.0)


def _blobs(n: int = N, seed: int = 3) -> list[np.ndarray]:
    """Return rings of cells 4 to 12 µm wide, inside the tissue, ``(k, 2)`` level-0 pixels, closed."""
    rng = np.random.default_rng(seed)
    rings = []
    for _ in range(n):
        centre = rng.uniform((430, 330), (690, 550))
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(7, 23)))
        ring = centre + rng.uniform(8, 24, (len(angles), 1)) * np.stack(
            [np.cos(angles), np.sin(angles)], axis=1
        )
        rings.append(np.round(np.vstack([ring, ring[:1]]), 2))
    return rings


def _qupath(rings: list[np.ndarray], **further: Any) -> list[dict[str, Any]]:
    """Return features as QuPath 0.5 exports cells: the nucleus and measurements beside the outline."""
    return [
        {
            "type": "Feature",
            "id": f"3f5b-{i}",
            "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
            "nucleusGeometry": {"type": "Polygon", "coordinates": [ring[:4].tolist()]},
            "properties": {
                "objectType": "cell",
                "classification": {"name": ("Tumor", "Stroma")[i % 2], "color": [200, 0, 0]},
                "measurements": {"Nucleus: Area µm^2": 30.1, 'a "features": [': 1},
            },
        }
        for i, ring in enumerate(rings)
    ]


def _write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def _painted(stored: StoredMap, ring: np.ndarray) -> np.ndarray:
    """Return the mean of the map under a ring by counting points of a fine lattice: another way than polygons' areas."""
    values = stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols)).astype(np.float64)
    low, high = ring.min(axis=0), ring.max(axis=0)
    points = np.stack(
        np.meshgrid(*(np.arange(a, b, 0.25) + 0.125 for a, b in zip(low, high, strict=True))), axis=-1
    )
    points = points.reshape(-1, 2)
    points = points[Outline(ring).contains_points(points)]
    grid = stored.grid
    cells = np.floor((points * SLIDE_MPP - (grid.patch_um - grid.stride_um) / 2) / grid.stride_um).astype(int)
    return np.asarray(np.nanmean(values[cells[:, 1], cells[:, 0]], axis=0))


def test_a_cell_has_the_mean_of_the_map_under_its_outline(stored: StoredMap, tmp_path: Path) -> None:
    rings = _blobs()
    file = _write(tmp_path / "cells.geojson", {"type": "FeatureCollection", "features": _qupath(rings)})
    done = write_cells(stored, file, tmp_path / "cells.h5ad", FRAME)
    data = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert (done.cells, data.shape) == (N, (N, 3))
    assert data.obs_names.tolist() == [f"3f5b-{i}" for i in range(N)]
    assert data.obs["classification"].tolist() == ["Tumor", "Stroma"] * (N // 2) + ["Tumor"]
    expected = np.stack([_painted(stored, ring) for ring in rings])
    np.testing.assert_allclose(data.X, expected, atol=0.004)
    np.testing.assert_allclose(data.obs["log_total_counts"], 8.0)
    assert data.var["trusted"].tolist() == [True, False, True]
    assert (data.obs["share"] > 0.999).all()
    assert data.obs["n_patches"].between(1, 16).all()
    again = write_cells(stored, file, tmp_path / "cells.h5ad", FRAME)
    assert again.was_there
    with pytest.raises(EarlierResultError, match="--overwrite"):
        write_cells(stored, _write(tmp_path / "b.json", _qupath(rings[:9])), tmp_path / "cells.h5ad", FRAME)


def test_the_file_states_what_the_map_resolves(stored: StoredMap, tmp_path: Path) -> None:
    file = _write(tmp_path / "cells.geojson", _qupath(_blobs()))
    done = write_cells(stored, file, tmp_path / "cells.h5ad", FRAME)
    assert done.resolution.startswith(
        "The map has one value for each patch of 16 µm, every 8 µm; the median cell is "
    )
    facts = anndata.read_h5ad(tmp_path / "cells.h5ad").uns["histosge"]
    assert facts["resolution"] == done.resolution
    assert (facts["patch_um"], facts["stride_um"]) == (16.0, 8.0)


def test_outlines_come_back_as_they_were(stored: StoredMap, tmp_path: Path) -> None:
    rings = _blobs()
    features = _qupath(rings)
    features[5]["geometry"] = {  # a cell of two parts, one of them with a hole
        "type": "MultiPolygon",
        "coordinates": [
            [
                [[500, 400], [540, 400], [540, 440], [500, 440], [500, 400]],
                [[510, 410], [510, 420], [520, 420], [510, 410]],
            ],
            [[[550, 400], [560, 400], [560, 410], [550, 400]]],
        ],
    }
    write_cells(stored, _write(tmp_path / "c.geojson", features), tmp_path / "c.h5ad", FRAME)
    found = anndata.read_h5ad(tmp_path / "c.h5ad")
    kept = found.uns["outlines"]
    offsets = tuple(kept[name] for name in ("ring_offsets", "polygon_offsets", "cell_offsets"))
    shapes = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, kept["coords"], offsets)
    assert len(shapes) == N
    for i, ring in enumerate(rings):
        expected = shapely.geometry.shape(features[5]["geometry"]) if i == 5 else shapely.Polygon(ring)
        assert shapely.equals(shapes[i], expected if expected.is_valid else shapely.make_valid(expected))
    np.testing.assert_allclose(found.obsm["spatial"], [(s.centroid.x, s.centroid.y) for s in shapes])


@pytest.mark.spatialdata
def test_spatialdata_takes_table_and_outlines(stored: StoredMap, tmp_path: Path) -> None:
    write_cells(stored, _write(tmp_path / "c.geojson", _qupath(_blobs())), tmp_path / "c.h5ad", FRAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geopandas
        import spatialdata
        from spatialdata.models import ShapesModel, TableModel

        table = anndata.read_h5ad(tmp_path / "c.h5ad")
        kept = table.uns.pop("outlines")
        offsets = tuple(kept[name] for name in ("ring_offsets", "polygon_offsets", "cell_offsets"))
        outlines = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, kept["coords"], offsets)
        shapes = ShapesModel.parse(
            geopandas.GeoDataFrame(geometry=outlines, index=table.obs["instance_id"].to_numpy())
        )
        data = spatialdata.SpatialData(shapes={"A_cells": shapes}, tables={"cells": TableModel.parse(table)})
        data.write(tmp_path / "c.zarr")
        back = spatialdata.read_zarr(tmp_path / "c.zarr")
        elements, joined = spatialdata.join_spatialelement_table(
            sdata=back, spatial_element_names="A_cells", table_name="cells", how="inner"
        )
    assert len(elements["A_cells"]) == joined.n_obs == N


def _cellvit(rings: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return features as CellViT exports contours: one for a class."""
    return [
        {
            "type": "Feature",
            "id": f"class{k}",
            "geometry": {"type": "MultiPolygon", "coordinates": [[ring.tolist()] for ring in rings[k::2]]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}},
        }
        for k, name in enumerate(("Neoplastic", "Inflammatory"))
    ]


def _cellvit_json(rings: list[np.ndarray]) -> dict[str, Any]:
    return {
        "wsi_metadata": {"magnification": 40, "base_mpp": 0.25},
        "processed_patches": ["0_0", "0_1"],
        "type_map": {"1": "Neoplastic", "2": "Inflammatory"},
        "cells": [
            {
                "bbox": [[1, 2], [3, 4]],
                "centroid": ring.mean(axis=0).tolist(),
                "contour": ring[:-1].tolist(),
                "type": 1 + i % 2,
            }
            for i, ring in enumerate(rings)
        ],
    }


def _xenium(folder: Path, rings: list[np.ndarray], per_um: float = 1 / SLIDE_MPP) -> Path:
    """Write boundaries as a Xenium run does: microns, a row a corner, the first corner again at the end."""
    rows = [
        (f"aaab-{i}", float(x / per_um), float(y / per_um), i + 1)
        for i, ring in enumerate(rings)
        for x, y in ring
    ]
    frame = pl.DataFrame(rows, schema=["cell_id", "vertex_x", "vertex_y", "label_id"], orient="row")
    frame.write_parquet(folder / "cell_boundaries.parquet")
    return folder / "cell_boundaries.parquet"


def _gzipped(folder: Path, rings: list[np.ndarray]) -> Path:
    with gzip.open(folder / "c.geojson.gz", "wt", encoding="utf-8") as stream:
        json.dump({"type": "FeatureCollection", "features": _qupath(rings)}, stream)
    return folder / "c.geojson.gz"


LAYOUTS: dict[str, Callable[[Path, list[np.ndarray]], Path]] = {
    "a list of features": lambda folder, rings: _write(folder / "c.json", _qupath(rings)),
    "gzip": _gzipped,
    "CellViT's contours": lambda folder, rings: _write(folder / "cells.geojson", _cellvit(rings)),
    "CellViT's cells": lambda folder, rings: _write(folder / "cells.json", _cellvit_json(rings)),
    "Xenium": _xenium,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_cells(
    stored: StoredMap, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts far smaller than the file, so that cells lie across their ends.
    monkeypatch.setattr(json_outlines, "FIRST_LETTERS", 700)
    monkeypatch.setattr(foreign_files, "ROWS", 100)
    monkeypatch.setattr(open_outlines, "CELLS", 13)
    rings = _blobs()
    file = LAYOUTS[layout](tmp_path, rings)
    write_cells(stored, file, tmp_path / "c.h5ad", FRAME)
    data = anndata.read_h5ad(tmp_path / "c.h5ad")
    order = np.concatenate([np.arange(N)[0::2], np.arange(N)[1::2]]) if "contours" in layout else np.arange(N)
    np.testing.assert_allclose(data.X, np.stack([_painted(stored, rings[i]) for i in order]), atol=0.004)
    if "CellViT" in layout:
        assert data.obs["classification"].tolist() == [("Neoplastic", "Inflammatory")[i % 2] for i in order]
    if layout == "Xenium":
        assert data.obs_names.tolist() == [f"aaab-{i}" for i in range(N)]


def test_xenium_s_cells_are_placed_by_the_alignment(stored: StoredMap, tmp_path: Path) -> None:
    rings = _blobs()
    # The run is turned by 90 degrees and shifted: H&E pixels -> pixels of 0.2125 µm of the morphology picture.
    scale = SLIDE_MPP / 0.2125
    matrix = np.array([[0, -scale, 2000], [scale, 0, 70], [0, 0, 1.0]])
    np.savetxt(tmp_path / "A_he_imagealignment.csv", matrix, delimiter=",")
    turned = [(np.column_stack([ring, np.ones(len(ring))]) @ matrix.T)[:, :2] for ring in rings]
    file = _xenium(tmp_path, turned, 1 / 0.2125)
    messages: list[str] = []
    write_cells(stored, file, tmp_path / "c.h5ad", FRAME, on_message=messages.append)
    assert "placed by A_he_imagealignment.csv" in messages[0]
    data = anndata.read_h5ad(tmp_path / "c.h5ad")
    np.testing.assert_allclose(data.X, np.stack([_painted(stored, ring) for ring in rings]), atol=0.004)


@pytest.mark.spatialdata
def test_geoparquet_is_read(stored: StoredMap, tmp_path: Path) -> None:
    import geopandas

    rings = _blobs()
    names = [f"n{i}" for i in range(N)]
    geopandas.GeoDataFrame({"id": names}, geometry=[shapely.Polygon(r) for r in rings]).to_parquet(
        tmp_path / "c.parquet"
    )
    write_cells(stored, tmp_path / "c.parquet", tmp_path / "c.h5ad", FRAME)
    data = anndata.read_h5ad(tmp_path / "c.h5ad")
    assert data.obs_names.tolist() == names
    np.testing.assert_allclose(data.X, np.stack([_painted(stored, ring) for ring in rings]), atol=0.004)


def test_several_nuclei_of_one_cell_are_rows_of_their_own(stored: StoredMap, tmp_path: Path) -> None:
    rings = _blobs(7)
    file = _xenium(tmp_path, rings)
    # As nucleus_boundaries.parquet of a run has them: the cell's name twice, with a label for each nucleus.
    names = pl.col("cell_id").replace({"aaab-3": "aaab-2"})
    pl.read_parquet(file).with_columns(names).write_parquet(tmp_path / "nucleus_boundaries.parquet")
    write_cells(stored, tmp_path / "nucleus_boundaries.parquet", tmp_path / "n.h5ad", FRAME)
    data = anndata.read_h5ad(tmp_path / "n.h5ad")
    assert data.obs_names[2:5].tolist() == ["aaab-2", "aaab-2-1", "aaab-4"]
    np.testing.assert_allclose(data.X, np.stack([_painted(stored, ring) for ring in rings]), atol=0.004)


def test_what_is_left_out_is_counted_and_said(stored: StoredMap, tmp_path: Path) -> None:
    rings = _blobs(7)
    square = np.array([[0, 0], [30, 0], [30, 30], [0, 30], [0, 0]])
    features = _qupath([*rings, square, square + np.array([9000, 100])])
    broken = [
        [[1, 1], [2, 2]],
        [[1, 1], [5, 5], [9, 9], [1, 1]],
        [[1, 1], [float("nan"), 2], [3, 1], [1, 1]],
        [],
    ]
    features += _qupath([np.zeros((4, 2))] * len(broken))
    for feature, ring in zip(features[9:], broken, strict=True):
        feature["geometry"]["coordinates"] = [ring] if ring else []
    features.append(
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}}
    )
    features.append({"type": "Feature", "geometry": None, "properties": None})
    messages: list[str] = []
    done = write_cells(
        stored, _write(tmp_path / "c.json", features), tmp_path / "c.h5ad", FRAME, on_message=messages.append
    )
    assert (done.cells, done.off_map, done.broken) == (7, 2, 4)
    assert [message.split(" ")[0] for message in messages] == ["2", "4", "2"]
    assert len(set(anndata.read_h5ad(tmp_path / "c.h5ad").obs_names)) == 7


def test_ids_that_come_twice_get_a_number(stored: StoredMap, tmp_path: Path) -> None:
    features = _qupath(_blobs(5))
    for feature, name in zip(features, ("a", "a-1", "a", "a", ""), strict=True):
        feature["id"] = name
    write_cells(stored, _write(tmp_path / "c.json", features), tmp_path / "c.h5ad", FRAME)
    assert anndata.read_h5ad(tmp_path / "c.h5ad").obs_names.tolist() == ["a", "a-1", "a-2", "a-3", "A_cell_4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "c.geojson",
            '{"type": "FeatureCollection", "features": [{"a": 1}, {"type": ',
            "in the middle of a feature",
        ),
        ("c.geojson", '[{"type" "Feature"}' + " " * 200 + "]", "is damaged"),
        ("c.geojson", '{"type": "Topology"}', "no list of features or cells"),
        ("c.geojson", "[1, 2]", "holds int where a cell should be"),
        ("c.geojson", "PK\x03\x04", "cannot be read as GeoJSON"),
        ("c.geojson", "[" * 100_000, "cannot be read as GeoJSON"),
        ("c.geojson", "[]", "has 0 outlines of cells, none on the map"),
        (
            "cell_detection.json",
            '{"type_map": {"1": "Neoplastic"}, "cells": [{"bbox": [[1, 2], [3, 4]], "centroid": [2, 3], "type": 1}]}',
            r"holds centres of cells without outlines, .* give its cells\.json",
        ),
        ("c.parquet", "PAR1", "cannot be read as parquet"),
        ("c.geojson.gz", "no gzip", "cannot be read as GeoJSON"),
        ("c.roi", "x", "ends in none of .geojson"),
    ],
)
def test_files_that_hold_no_cells_are_one_line(
    stored: StoredMap, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FeatureStoreError, match=message) as refused:
        write_cells(stored, tmp_path / name, tmp_path / "out.h5ad", FRAME)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out.h5ad").exists()


def _scaled(factor: float, shift: float = 0) -> list[dict[str, Any]]:
    return _qupath([ring * factor + shift for ring in _blobs()])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (_scaled(0.25 * 0.9), "the median outline of .* cells are 2.5 to 100 µm; give"),
        (_scaled(40), "the median outline of .* µm wide"),
        (_scaled(1, 5000), "57 outlines of cells, none on the map of 'A'"),
        ([*_qupath(_blobs()), *_scaled(1, 5000), *_scaled(1, 6000)], "only 57 of 171 cells .* --force"),
        (
            [*_qupath(_blobs()), *_qupath([np.array([[0, 0], [9e9, 0], [9e9, 9e9], [0, 0]])])],
            "that is no cell",
        ),
    ],
)
def test_cells_of_another_scale_or_slide_are_refused(
    stored: StoredMap,
    tmp_path: Path,
    features: list[dict[str, Any]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("histosge.exporting.cell_table.MAX_PATCHES", 100)
    file = _write(tmp_path / "c.json", features)
    with pytest.raises(HistosgeError, match=message):
        write_cells(stored, file, tmp_path / "c.h5ad", FRAME)
    assert not (tmp_path / "c.h5ad").exists()
    if "--force" in message:
        assert write_cells(stored, file, tmp_path / "c.h5ad", FRAME, force=True).off_map == 2 * N
    elif "median" in message:
        with pytest.raises(HistosgeError, match=message):
            check_outlines(file, FRAME)


def test_a_cell_whose_corners_are_apart_in_a_table_is_refused(stored: StoredMap, tmp_path: Path) -> None:
    file = _xenium(tmp_path, _blobs(9))
    frame = pl.read_parquet(file)
    pl.concat([frame[40:], frame[:40]]).write_parquet(file)
    with pytest.raises(HistosgeError, match="in several places; sort it by cell_id"):
        write_cells(stored, file, tmp_path / "c.h5ad", FRAME)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_outlines(
    stored: StoredMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held are a batch and a few numbers for each cell, whatever its outline takes."""
    monkeypatch.setattr(open_outlines, "CELLS", 64)
    monkeypatch.setattr(json_outlines, "FIRST_LETTERS", 1 << 14)
    angle = np.linspace(0, 6.2, 150)
    ring = np.round(np.array([560, 440]) + 24 * np.stack([np.cos(angle), np.sin(angle)], axis=1), 2)
    peaks = []
    for n in (384, 1408):
        _write(tmp_path / "c.json", _qupath([ring] * n))
        tracemalloc.start()
        write_cells(stored, tmp_path / "c.json", tmp_path / "c.h5ad", FRAME, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Both are more than the batches that are read ahead. 1,024 outlines more have 2.5 MB of corners as arrays, and 25 MB
    # as lists.
    assert peaks[1] - peaks[0] < 6e5
