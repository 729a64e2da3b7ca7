"""Maps and embeddings in other tools' files: the same values, at the same places."""

import json
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import anndata
import numpy as np
import polars as pl
import pytest
import tifffile
import zarr
from make_slides import tissue_like, write_pyramid
from shapely.geometry import Polygon
from third_party import install

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import EarlierResultError, OutputError, StoreError
from featurestore.extensions import Registry
from featurestore.grid import GridSpec, OffsetGridSpec, PatchGrid
from featurestore.storage.store import Store
from histosge import viewer
from histosge.errors import ExportError, MissingExtraError
from histosge.exporting.domain_labels import domain_colour, domain_labels, read_labels
from histosge.exporting.export import export
from histosge.exporting.export_format import FORMATS, ExportFormat, ExportItem, ExportSettings
from histosge.exporting.formats.geojson import polygons, write_geojson
from histosge.exporting.formats.heat_map_tiff import write_tiffs
from histosge.exporting.formats.ome_zarr import write_ome_zarr
from histosge.exporting.open_tables import ExportSelection, open_tables, table_of_map
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import on_slide
from histosge.prediction.expression_store import ExpressionStore

SLIDE_MPP = 0.5
GRID = GridSpec(mpp=1.0, patch_px=32, stride_px=16)
GENES = ("EPCAM", "CD3E", "COL1A1", "row", "ACTA2")
BLOCK = (7, 11)


@dataclass(frozen=True)
class Made:
    """Two slides, their embeddings, and maps with known values."""

    folder: Path
    store: str
    maps: str

    def values(self, slide_id: str) -> np.ndarray:
        stored = ExpressionStore.open(self.maps).map(slide_id, GRID.key)
        return stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols)).astype(np.float32)


def _true(grid: PatchGrid) -> np.ndarray:
    """Return ``(rows, cols, genes)``: each gene its own function of the place, so that no swap goes unseen."""
    y, x = np.meshgrid(grid.y_um, grid.x_um, indexing="ij")
    return np.stack([x / 97, y / 89, (x + 2 * y) / 301, (x > 300) * 2.0, np.full(x.shape, 1.5)], axis=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("exports")
    (folder / "slides").mkdir()
    for name, size in (("A", (1100, 900)), ("B", (700, 600))):
        write_pyramid(folder / "slides" / f"{name}.tif", tissue_like(*size, 0.5), SLIDE_MPP)
    embed(str(folder / "slides"), str(folder / "store"), EmbedSettings(("colour",), GRID, block_shape=BLOCK))
    store, maps = Store.open(str(folder / "store")), ExpressionStore.open_or_create(str(folder / "maps"))
    for slide_id in store.slide_ids():
        stored = store.grid(slide_id, GRID.key)
        target = maps.add_map(stored, GENES, BLOCK, {"model": "known"})
        values = np.where(stored.is_tissue[..., None], _true(stored.grid), np.nan)
        for block in target.planned():
            target.array.write(block, values[block.slices])
    return Made(folder, str(folder / "store"), str(folder / "maps"))


@pytest.fixture
def table(made: Made) -> PatchTable:
    return open_tables(made.maps, ExportSelection(["A"]))[0]


def _expected(made: Made, table: PatchTable) -> np.ndarray:
    return made.values(table.slide_id)[table.rows, table.cols]


def test_a_table_s_rows_are_the_patches_with_values_in_row_major_order(made: Made, table: PatchTable) -> None:
    stored = Store.open(made.store).grid("A", GRID.key)
    rows, cols = np.nonzero(stored.is_tissue)
    np.testing.assert_array_equal(table.rows, rows)
    np.testing.assert_array_equal(table.cols, cols)
    streamed = np.concatenate([values for _, values in table.chunks()])
    np.testing.assert_array_equal(streamed, _expected(made, table))
    assert len(table.bands()) > 2
    np.testing.assert_array_equal(np.asarray(table.to_dask().compute(scheduler="synchronous")), streamed)


def test_genes_come_in_the_order_asked_for(made: Made) -> None:
    (table,) = open_tables(made.maps, ExportSelection(["A"], ["ACTA2", "EPCAM"]))
    np.testing.assert_array_equal(
        np.concatenate([v for _, v in table.chunks()]), _expected(made, table)[:, [4, 0]]
    )


@pytest.mark.parametrize("name", ["A.h5ad", "A.zarr"])
def test_anndata_has_what_scanpy_expects(made: Made, table: PatchTable, tmp_path: Path, name: str) -> None:
    settings = ExportSettings(store=made.store)
    (line,) = export(made.maps, tmp_path / name, "h5ad", ExportSelection(["A"]), settings)
    assert line == f"{tmp_path / name}: {len(table)} patches x 5 genes"
    data = anndata.read_h5ad(tmp_path / name) if name.endswith("h5ad") else anndata.read_zarr(tmp_path / name)
    np.testing.assert_array_equal(data.X, _expected(made, table))
    assert data.var_names.tolist() == list(GENES)
    np.testing.assert_allclose(data.obsm["spatial"] * SLIDE_MPP, table.xy_um)
    library = data.uns["spatial"]["A"]
    picture, factors = library["images"]["hires"], library["scalefactors"]
    assert picture.shape == (900, 1100, 3)  # the slide's own
    assert factors["tissue_hires_scalef"] == 1.0
    assert factors["spot_diameter_fullres"] * SLIDE_MPP == 16


def test_scanpy_plots_it(made: Made, tmp_path: Path) -> None:
    import matplotlib as mpl
    import scanpy

    mpl.use("agg")
    export(made.maps, tmp_path / "B.h5ad", "h5ad", ExportSelection(["B"]))
    data = scanpy.read_h5ad(tmp_path / "B.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = scanpy.pl.spatial(data, color="EPCAM", show=False, return_fig=False)
    assert axes


def test_without_the_slide_mean_colours_lie_under_the_positions(made: Made, tmp_path: Path) -> None:
    messages: list[str] = []
    export(made.maps, tmp_path / "A.h5ad", "h5ad", ExportSelection(["A"]), on_message=messages.append)
    assert "name the feature store with --store" in messages[0]
    data = anndata.read_h5ad(tmp_path / "A.h5ad")
    library = data.uns["spatial"]["A"]
    at = np.floor(data.obsm["spatial"] * library["scalefactors"]["tissue_hires_scalef"]).astype(int)
    rgb = Store.open(made.store).grid("A", GRID.key).rgb
    np.testing.assert_array_equal(
        library["images"]["hires"][at[:, 1], at[:, 0]], rgb[data.obs["row"], data.obs["col"]]
    )


def test_a_slide_that_is_gone_is_said_and_replaced(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.store, tmp_path / "store")
    document = tmp_path / "store" / "A" / "zarr.json"
    document.write_text(document.read_text().replace("A.tif", "gone.tif"))
    messages: list[str] = []
    settings = ExportSettings(store=str(tmp_path / "store"))
    export(
        made.maps, tmp_path / "A.h5ad", "h5ad", ExportSelection(["A"]), settings, on_message=messages.append
    )
    assert "the slide cannot be reached" in messages[0]
    assert "gone.tif" in messages[0]


def test_what_else_a_map_says_goes_along(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.maps, tmp_path / "maps")
    group = zarr.open_group(tmp_path / "maps" / "A" / GRID.key, mode="r+")
    shape = ExpressionStore.open(made.maps).map("A", GRID.key).grid.shape
    group.create_array("novelty", data=np.arange(np.prod(shape)).reshape(shape), dimension_names=("y", "x"))
    group.create_array("trust", data=np.arange(5.0), dimension_names=("gene",))
    choice = ExportSelection(["A"], ["ACTA2", "CD3E"])
    export(str(tmp_path / "maps"), tmp_path / "A.h5ad", "h5ad", choice)
    data = anndata.read_h5ad(tmp_path / "A.h5ad")
    assert data.var["trust"].tolist() == [4.0, 1.0]
    assert (data.obs["novelty"] == data.obs["row"] * shape[1] + data.obs["col"]).all()
    export(str(tmp_path / "maps"), tmp_path / "A.parquet", "parquet", choice)
    assert pl.read_parquet(tmp_path / "A.parquet")["novelty"].to_list() == data.obs["novelty"].tolist()


def test_parquet_has_a_row_per_patch_and_a_column_per_gene(
    made: Made, table: PatchTable, tmp_path: Path
) -> None:
    export(made.maps, tmp_path, "parquet")
    frame = pl.read_parquet(tmp_path / "A.parquet")
    names = ["EPCAM", "CD3E", "COL1A1", "gene_row", "ACTA2"]
    assert frame.columns == ["slide", "row", "col", "x_um", "y_um", *names]
    np.testing.assert_array_equal(frame.select(names).to_numpy(), _expected(made, table))
    np.testing.assert_allclose(frame.select("x_um", "y_um").to_numpy(), table.xy_um)
    assert (tmp_path / "B.parquet").is_file()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_has_the_fields_that_ngff_requires(
    made: Made, table: PatchTable, tmp_path: Path, version: str
) -> None:
    out = tmp_path / "A.ome.zarr"
    export(made.maps, out, "ome-zarr", ExportSelection(["A"]), ExportSettings(ngff=version))
    group = zarr.open_group(out, mode="r")
    attrs = dict(group.attrs)
    if version == "0.5":
        assert group.metadata.zarr_format == 3
        attrs = attrs["ome"]
        assert attrs["version"] == "0.5"
    else:
        assert attrs["multiscales"][0]["version"] == "0.4"
        assert (out / "0" / "0" / "0" / "0").is_file()  # nested chunks, as 0.4 demands
    (multiscale,) = attrs["multiscales"]
    assert [(axis["name"], axis["type"]) for axis in multiscale["axes"]] == [
        ("c", "channel"),
        ("y", "space"),
        ("x", "space"),
    ]
    assert [channel["label"] for channel in attrs["omero"]["channels"]] == list(GENES)
    for channel in attrs["omero"]["channels"]:
        assert set(channel["window"]) == {"min", "max", "start", "end"}
        assert len(channel["color"]) == 6
    finest = group["0"]
    np.testing.assert_array_equal(finest[...].transpose(1, 2, 0), made.values("A"))
    for dataset in multiscale["datasets"]:
        scale, translation = (dataset["coordinateTransformations"][i] for i in (0, 1))
        assert (scale["type"], translation["type"]) == ("scale", "translation")
        level = group[dataset["path"]]
        step = scale["scale"][1]
        values = level[0]
        rows, cols = np.nonzero(np.isfinite(values))
        x_um = translation["translation"][2] + cols * step
        # Gene 0 is x / 97 everywhere: a level in the wrong place shows it, but for ragged edges.
        inner = np.abs(values[rows, cols] * 97 - x_um)
        assert np.median(inner) < 0.2
    assert len(multiscale["datasets"]) == 1  # 55 patches wide: no coarser level is needed


def test_coarser_levels_are_means_of_what_is_there(
    made: Made, table: PatchTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.exporting.formats.ome_zarr.SMALLEST", 8)
    monkeypatch.setattr("histosge.exporting.formats.ome_zarr.CHUNK", 10)
    n_levels = write_ome_zarr(table, tmp_path / "a.ome.zarr", "0.5")
    assert n_levels == 4
    group = zarr.open_group(tmp_path / "a.ome.zarr", mode="r")
    finer, coarser = group["0"][...], group["1"][...]
    padded = np.pad(finer, ((0, 0), (0, finer.shape[1] % 2), (0, finer.shape[2] % 2)), constant_values=np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.nanmean(
            padded.reshape(5, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2), axis=(2, 4)
        )
    np.testing.assert_allclose(coarser, expected, rtol=1e-6)
    whole = np.isfinite(padded[0].reshape(expected.shape[1], 2, expected.shape[2], 2)).all(axis=(1, 3))
    scale, translation = (
        t[t["type"]] for t in group.attrs["ome"]["multiscales"][0]["datasets"][1]["coordinateTransformations"]
    )
    rows, cols = np.nonzero(whole)
    # Gene 0 is x / 97, gene 1 is y / 89: the store keeps half precision.
    np.testing.assert_allclose(coarser[0][whole] * 97, cols * scale[2] + translation[2], atol=0.5)
    np.testing.assert_allclose(coarser[1][whole] * 89, rows * scale[1] + translation[1], atol=0.5)


@pytest.mark.spatialdata
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_py_reads_it(made: Made, tmp_path: Path, version: str) -> None:
    out = tmp_path / "A.ome.zarr"
    export(made.maps, out, "ome-zarr", ExportSelection(["A"]), ExportSettings(ngff=version))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        (node,) = list(Reader(parse_url(out))())
        np.testing.assert_array_equal(np.asarray(node.data[0]).transpose(1, 2, 0), made.values("A"))
    assert node.metadata["channel_names"] == list(GENES)


def test_tiffs_lie_on_the_slide_by_their_resolution(made: Made, table: PatchTable, tmp_path: Path) -> None:
    export(made.maps, tmp_path, "tiff", ExportSelection(["A"], ["EPCAM", "CD3E"]))
    with tifffile.TiffFile(tmp_path / "A" / "values.ome.tif") as file:
        page = file.pages[0]
        per_cm, unit = page.tags["XResolution"].value, page.tags["ResolutionUnit"].value
        mpp = 1e4 * per_cm[1] / per_cm[0]
        assert (unit, mpp) == (3, pytest.approx(8.0))
        assert 'Name="CD3E"' in file.ome_metadata
        assert 'PhysicalSizeX="8.0"' in file.ome_metadata
        values = file.asarray()
    at = np.floor(table.xy_um / mpp).astype(int)
    np.testing.assert_array_equal(values[:, at[:, 1], at[:, 0]].T, _expected(made, table)[:, :2])
    heat = tifffile.imread(tmp_path / "A" / "EPCAM.tif")
    assert heat.shape == (*values.shape[1:], 3)
    shown = (heat != 255).any(axis=2)
    np.testing.assert_array_equal(shown, np.isfinite(values[0]))
    legend = ET.parse(tmp_path / "A" / "legend.svg").getroot()
    words = [text.text for text in legend.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A, log1p(CP10k)", "EPCAM", "CD3E"} <= set(words)
    # The ends are those of the picture: the patch at the upper one has the last colour of viridis.
    low, high = np.nanpercentile(values[0], (1, 99))
    assert {f"≤ {low:.3g}", f"≥ {high:.3g}"} <= set(words)
    at_end = heat[values[0] >= high]
    assert len(at_end)
    assert np.abs(at_end.astype(int) - (253, 231, 37)).max() <= 1


# ---------------------------------------------------------------- domains


def _rings(polygon: Polygon) -> list[list[tuple[int, int]]]:
    rings = [polygon.exterior, *polygon.interiors]
    return [[(int(x), int(y)) for x, y in ring.coords] for ring in rings]


def _paint(rings: list[list[tuple[int, int]]], shape: tuple[int, int]) -> np.ndarray:
    """Return which cells' centres lie in a polygon, by the even-odd rule over all of its rings."""
    inside = np.zeros(shape, dtype=int)
    for ring in rings:
        assert ring[0] == ring[-1]
        for (x0, y0), (x1, y1) in pairwise(ring):
            if x0 == x1:  # a side down or up: cells right of it change
                inside[min(y0, y1) : max(y0, y1), x0:] += 1
    return inside % 2 == 1


def _area(ring: list[tuple[int, int]]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


@pytest.mark.parametrize("seed", range(20))
def test_polygons_cover_exactly_the_mask(seed: int) -> None:
    mask = np.random.default_rng(seed).random((13, 17)) < 0.2 + 0.035 * seed
    covered = np.zeros(mask.shape, dtype=int)
    for polygon in polygons(mask):
        rings = _rings(polygon)
        covered += _paint(rings, mask.shape)
        assert polygon.is_valid
        assert [_area(ring) > 0 for ring in rings] == [True] + [False] * (len(rings) - 1)
        for ring in rings:
            assert len(set(ring[:-1])) == len(ring) - 1  # touches itself nowhere
            sides = np.diff([*ring, ring[1]], axis=0)
            turns = sides[:-1, 0] * sides[1:, 1] - sides[:-1, 1] * sides[1:, 0]
            assert (turns != 0).all()  # no corner lies on a straight side, the first one included
    np.testing.assert_array_equal(covered, mask)


def test_a_polygon_is_made_of_cells_that_touch_along_a_side() -> None:
    mask = np.array([[1, 1, 0], [0, 0, 1], [0, 1, 1]], dtype=bool)  # two pieces that touch at a corner
    assert sorted(polygon.area for polygon in polygons(mask)) == [2, 3]
    assert polygons(np.zeros((2, 3), bool)) == []


def test_a_hole_that_touches_the_rim_is_a_ring_of_its_own() -> None:
    mask = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=bool)
    (polygon,) = polygons(mask)
    outer, hole = _rings(polygon)
    assert set(hole) == {(1, 1), (2, 1), (2, 2), (1, 2)}
    assert (2, 2) in outer


def test_geojson_is_in_level_0_pixels_with_qupath_s_fields(tmp_path: Path) -> None:
    grid = PatchGrid(GridSpec(1.0, 32, 16), 0.5, 1.0, 4, 5)
    labels = np.full((4, 5), -1)
    labels[1, 2:4] = 0
    labels[3, 0] = 1
    assert write_geojson(labels, grid, tmp_path / "d.geojson", ["tumour"]) == 2
    first, second = json.loads((tmp_path / "d.geojson").read_text())["features"]
    # Stride cells: patch (1, 2) is centred on x = 2 * 16 + 16 µm, so its cell starts at 40 µm, pixel 80.
    assert sorted(map(tuple, first["geometry"]["coordinates"][0][:-1])) == [
        (80.0, 48.0),
        (80.0, 80.0),
        (144.0, 48.0),
        (144.0, 80.0),
    ]
    assert first["properties"]["classification"]["name"] == "tumour"
    assert first["properties"]["objectType"] == "annotation"
    assert second["properties"]["name"] == "domain 1"
    assert len(first["properties"]["classification"]["color"]) == 3


def test_k_means_domains_follow_the_expression(made: Made) -> None:
    (table,) = open_tables(made.maps, ExportSelection(["A"], ["row"]))  # 0 left of 300 µm, 2 right of it
    labels = domain_labels(table, 2)
    found, rim = labels[table.rows, table.cols], table.at_rim
    # Half background: they belong to no domain.
    assert 0 < rim.mean() < 0.5
    assert (found[rim] == -1).all()
    found, right = found[~rim], table.xy_um[~rim, 0] > 300
    assert len(set(found[right])) == len(set(found[~right])) == 1
    assert set(labels.ravel().tolist()) == {-1, 0, 1}
    assert (found == 0).sum() >= (found == 1).sum()
    np.testing.assert_array_equal(labels, domain_labels(table, 2))


def test_domains_have_the_viewer_s_colours() -> None:
    page = Path(viewer.__file__).parent / "static" / "colours.js"
    listed = re.search(r"const DOMAINS = \[(.*?)\]", page.read_text(), re.DOTALL)
    assert listed is not None
    colours = re.findall(r'"([0-9a-f]{6})"', listed[1])
    assert [bytes(domain_colour(i)).hex() for i in range(len(colours))] == colours
    # After the last they come again, darker: Math.round(value / 1.5) in the page.
    assert domain_colour(len(colours)) == [int(v / 1.5 + 0.5) for v in bytes.fromhex(colours[0])]


def test_qupath_gets_domains_and_patches_with_measurements(
    made: Made, table: PatchTable, tmp_path: Path
) -> None:
    choice = ExportSelection(["A"], ["CD3E", "row"])
    (line,) = export(made.maps, tmp_path / "A.geojson", "qupath", choice, ExportSettings(domains=3))
    features = json.loads((tmp_path / "A.geojson").read_text())["features"]
    detections = [f for f in features if f["properties"]["objectType"] == "detection"]
    annotations = [f for f in features if f["properties"]["objectType"] == "annotation"]
    assert line.endswith(f"{len(features)} objects, {len(table)} of them patches with 2 measurements")
    assert len({f["id"] for f in detections}) == len(detections) == len(table)
    expected = _expected(made, table)[:, [1, 3]]
    found = [[f["properties"]["measurements"][gene] for gene in ("CD3E", "row")] for f in detections]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    squares = [Polygon(f["geometry"]["coordinates"][0]) for f in detections]
    np.testing.assert_allclose(
        [(s.centroid.x, s.centroid.y) for s in squares], table.xy_um / SLIDE_MPP, atol=0.02
    )
    np.testing.assert_allclose([s.area for s in squares], (16 / SLIDE_MPP) ** 2)
    classes = {json.dumps(f["properties"]["classification"]) for f in annotations}
    assert classes == {json.dumps({"name": f"domain {i}", "color": domain_colour(i)}) for i in range(3)}
    # Each patch in a domain's polygon is of that domain's class; those at the rim are of none.
    of_domain = {json.dumps(f["properties"].get("classification")) for f in detections}
    assert of_domain == classes | {"null"}
    for annotation in annotations:
        outline = Polygon(annotation["geometry"]["coordinates"][0], annotation["geometry"]["coordinates"][1:])
        inside = [f for f, s in zip(detections, squares, strict=True) if outline.contains(s.centroid)]
        assert {f["properties"]["classification"]["name"] for f in inside} == {
            annotation["properties"]["name"]
        }
    with pytest.raises(ExportError, match="qupath takes maps of genes"):
        export(made.store, tmp_path / "x", "qupath")


def test_too_many_measurements_are_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.exporting.formats.qupath.MAX_GENES", 4)
    with pytest.raises(ExportError, match=r"5 genes are too many measurements .* choose with --genes"):
        export(made.maps, tmp_path / "x.geojson", "qupath", ExportSelection(["A"]))


def test_stored_domains_win_over_k_means(made: Made) -> None:
    stored = ExpressionStore.open(made.maps).map("A", GRID.key)
    own = np.arange(np.prod(stored.grid.shape)).reshape(stored.grid.shape) % 3
    table = table_of_map(stored, (), {"domain": (("y", "x"), own)})
    labels = domain_labels(table, 7)
    np.testing.assert_array_equal(labels[table.kept], own[table.kept])


def test_labels_come_from_a_table_per_slide(made: Made, table: PatchTable, tmp_path: Path) -> None:
    frame = pl.DataFrame({"row": table.rows, "col": table.cols, "cluster": table.rows % 3})
    frame.write_parquet(tmp_path / "A.parquet")
    settings = ExportSettings(domains=tmp_path)
    export(made.maps, tmp_path / "A.geojson", "geojson", ExportSelection(["A"]), settings)
    features = json.loads((tmp_path / "A.geojson").read_text())["features"]
    assert {f["properties"]["name"] for f in features} == {
        "domain 0",
        "domain 1",
        "domain 2",
    }  # as in the table
    assert len(features) >= len(np.unique(table.rows))  # stripes
    with pytest.raises(ExportError, match=r"there is no .*B\.parquet"):
        export(made.maps, tmp_path / "x", "geojson", settings=settings)
    frame.rename({"cluster": "niche"}).write_parquet(tmp_path / "B.parquet")
    with pytest.raises(ExportError, match="one of domain, cluster"):
        export(made.maps, tmp_path / "x", "geojson", ExportSelection(["B"]), settings)


@pytest.mark.parametrize("shift_um", [0.0, 8.0])
def test_labels_of_another_grid_are_refused_by_place_or_by_position(
    made: Made, table: PatchTable, tmp_path: Path, shift_um: float
) -> None:
    x_um, y_um = table.xy_um.T
    columns = {
        "row": table.rows,
        "col": table.cols,
        "x_um": x_um + shift_um,
        "y_um": y_um,
        "domain": table.rows,
    }
    frame = pl.DataFrame(columns)
    if not shift_um:
        frame = frame.with_columns(pl.col("row") + table.grid.n_rows)
    frame.write_parquet(tmp_path / "A.parquet")
    with pytest.raises(ExportError, match=rf"A\.parquet is of another grid than {GRID.key}"):
        read_labels(table, tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("cluster", ["tumour"], "holds String; give whole numbers"),
        ("cluster", [0.5], "holds Float64; give whole numbers"),
        ("cluster", [40_000], "has the label 40000; labels go from 0 to 32767"),
        ("row", [-1], "is of another grid"),
        ("row", [None], "has a row without a place"),
    ],
)
def test_a_table_that_holds_no_labels_of_patches_is_refused(
    made: Made, table: PatchTable, tmp_path: Path, column: str, values: list[object], message: str
) -> None:
    place = {"row": table.rows[:1], "col": table.cols[:1], "cluster": np.array([3])}
    dtype = pl.Int64 if values == [None] else None
    frame = pl.DataFrame(place).with_columns(pl.Series(column, values, dtype=dtype))
    frame.write_parquet(tmp_path / "A.parquet")
    with pytest.raises(ExportError, match=message):
        read_labels(table, tmp_path)
    (tmp_path / "A.parquet").write_text("no parquet")
    with pytest.raises(ExportError, match="cannot be read as parquet"):
        read_labels(table, tmp_path)


@pytest.mark.parametrize("n_domains", [0, 1001, 1_000_000])
def test_a_number_of_domains_that_no_eye_tells_apart_is_refused(table: PatchTable, n_domains: int) -> None:
    with pytest.raises(ExportError, match=f"into {n_domains} domains: give a number from 1 to 1000"):
        domain_labels(table, n_domains)


# ---------------------------------------------------------------- embeddings, refusals


def test_embeddings_go_out_as_tables_too(made: Made, tmp_path: Path) -> None:
    (table,) = open_tables(made.store, ExportSelection(["B"]))
    export(made.store, tmp_path / "B.h5ad", "h5ad", ExportSelection(["B"]))
    data = anndata.read_h5ad(tmp_path / "B.h5ad")
    embedding = Store.open(made.store).embedding("B", GRID.key, "colour")
    whole = embedding.read((0, embedding.shape[0]), (0, embedding.shape[1]))
    np.testing.assert_array_equal(data.X, whole[table.rows, table.cols].astype(np.float32))
    assert data.var_names[3] == "colour_3"
    assert data.uns["spatial"]["B"]["images"]["hires"].shape == (600, 700, 3)


@pytest.fixture
def half(made: Made, tmp_path: Path) -> str:
    shutil.copytree(made.maps, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "A" / GRID.key / "expression" / "c" / "1")
    return str(tmp_path / "half")


def test_a_map_that_is_not_whole_is_not_exported(half: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run the same histosge predict again"):
        export(half, tmp_path / "A.h5ad", "h5ad", ExportSelection(["A"]))
    assert not (tmp_path / "A.h5ad").exists()


@pytest.mark.parametrize(
    ("to", "choice", "message"),
    [
        (
            "xlsx",
            ExportSelection(),
            "choose one of h5ad, geojson, tiff, ome-zarr, parquet, qupath, spatialdata, trident",
        ),
        ("parket", ExportSelection(), "did you mean parquet"),
        ("h5ad", ExportSelection(["C"]), "it has: A, B"),
        ("h5ad", ExportSelection(["A"], ["EPCAN"]), "did you mean EPCAM"),
        ("h5ad", ExportSelection(["A"], grid="mpp9"), "no map of slide 'A' on grid mpp9"),
        ("trident", ExportSelection(), "trident takes embeddings; .* give the feature store"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    made: Made, tmp_path: Path, to: str, choice: ExportSelection, message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export(made.maps, tmp_path / "x", to, choice)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["ome-zarr", "tiff"])
def test_pictures_of_genes_cannot_be_made_of_embeddings(made: Made, tmp_path: Path, to: str) -> None:
    with pytest.raises(ExportError, match=f"{to} takes maps of genes; .* give an expression store"):
        export(made.store, tmp_path / "x", to)


def test_a_trident_file_goes_to_out_if_it_is_the_only_one(made: Made, tmp_path: Path) -> None:
    export(made.store, tmp_path / "mine.h5", "trident", ExportSelection(["A"]))
    export(made.store, tmp_path / "all", "trident")
    assert (tmp_path / "mine.h5").stat().st_size == (tmp_path / "all" / "A.h5").stat().st_size


def test_a_slide_without_values_is_refused_before_anything_is_written_but_by_formats_that_take_it(
    made: Made, tmp_path: Path
) -> None:
    shutil.copytree(made.store, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    array = store.embedding("B", GRID.key, "colour", read_only=False)
    for block in store.grid("B", GRID.key).planned(BLOCK):
        array.write(block, np.full((*block.shape, array.shape[2]), np.nan, np.float16))
    with pytest.raises(ExportError, match="slide 'B' has no patch with values"):
        export(tmp_path / "store", tmp_path / "out", "parquet")
    assert not (tmp_path / "out").exists()
    lines = export(tmp_path / "store", tmp_path / "out", "trident")
    assert lines[1] == f"{tmp_path}/out/B.h5: 0 patches"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_something_else_are_never_replaced(made: Made, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    shutil.copytree(made.maps, tmp_path / "maps")
    for place, reason in ((out, "is no Zarr"), (tmp_path / "maps", "is a store")):
        with pytest.raises(ExportError, match=reason):
            export(made.maps, place, "ome-zarr", ExportSelection(["A"]), overwrite=overwrite)
    assert (out / "thesis.txt").is_file()
    assert ExpressionStore.open(str(tmp_path / "maps"))


@pytest.mark.parametrize(
    ("to", "name"),
    [("h5ad", "a.h5ad"), ("h5ad", "a.zarr"), ("geojson", "a.geojson"), ("ome-zarr", "a"), ("tiff", "folder")],
)
def test_the_same_export_is_nothing_to_do_and_another_is_refused_or_replaced(
    made: Made, tmp_path: Path, to: str, name: str
) -> None:
    def run(slide_id: str, *, overwrite: bool = False) -> str:
        selection = ExportSelection((slide_id,))
        return export(
            made.maps, tmp_path / name, to, selection, ExportSettings(domains=2), overwrite=overwrite
        )[0]

    first = run("A")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run("A") == first.replace(": ", ": nothing to do, ", 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    if name == "folder":  # a file or folder a slide: another slide is beside it
        return
    with pytest.raises(EarlierResultError, match="replace it with --overwrite"):
        run("B")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    assert "nothing to do" not in run("B", overwrite=True)
    assert "nothing to do" in run("B")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_extra_is_named_in_one_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spatialdata", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'histosge\[spatialdata\]'") as caught:
        export(made.maps, tmp_path / "x", "spatialdata")
    assert "\n" not in str(caught.value)


def test_too_many_genes_for_a_picture_are_refused(
    made: Made, table: PatchTable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("histosge.exporting.formats.ome_zarr.MOST_CHANNELS", 4)
    with pytest.raises(ExportError, match="choose with --genes"):
        write_ome_zarr(table, tmp_path / "x")


# ---------------------------------------------------------------- SpatialData


@pytest.mark.spatialdata
def test_spatialdata_opens_with_everything_in_microns(made: Made, tmp_path: Path) -> None:
    settings = ExportSettings(store=made.store, picture_mpp=1.0)
    export(made.maps, tmp_path / "OUT", "spatialdata", settings=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata
        from spatialdata.transformations import get_transformation

        data = spatialdata.read_zarr(tmp_path / "OUT")
        assert set(data.images) == {"A_image", "B_image"}
        assert set(data.shapes) == {"A_patches", "B_patches"}
        assert set(data.tables) == {"A_expression", "B_expression"}
        (table,) = open_tables(made.maps, ExportSelection(["A"]))
        held = data.tables["A_expression"]
        np.testing.assert_array_equal(np.asarray(held.X), _expected(made, table))
        squares = data.shapes["A_patches"].loc[held.obs["instance_id"]]
        assert held.obs["instance_id"].dtype == data.shapes["A_patches"].index.dtype == np.int64
        np.testing.assert_allclose(np.column_stack([squares.centroid.x, squares.centroid.y]), table.xy_um)
        np.testing.assert_allclose(squares.area, 16.0**2)
        matrix = get_transformation(data.images["A_image"], "A").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([1.0, 1.0, 1.0]))
        assert data.images["A_image"].shape == (3, 450, 550)
        box = spatialdata.bounding_box_query(
            data,
            axes=("x", "y"),
            min_coordinate=[100, 100],
            max_coordinate=[300, 250],
            target_coordinate_system="A",
        )
        centres = box.shapes["A_patches"].centroid
        assert len(box.tables["A_expression"]) == len(centres) > 10


@pytest.mark.spatialdata
def test_measured_spots_are_a_second_table_of_spatialdata(made: Made, tmp_path: Path) -> None:
    from scipy import sparse

    rng = np.random.default_rng(5)
    xy_px, counts = rng.uniform(400, 800, (31, 2)), rng.poisson(3.0, (31, 4))
    spots = anndata.AnnData(sparse.csr_matrix(counts), obsm={"spatial": xy_px})
    spots.var_names = ["EPCAM", "CD3E", "X", "Y"]
    spots.write_h5ad(tmp_path / "A_spots.h5ad")
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"slide_id,slide,expression\nA,{made.folder}/slides/A.tif,A_spots.h5ad\n")
    messages: list[str] = []
    settings = ExportSettings(store=made.store, samples=str(sheet))
    export(made.maps, tmp_path / "OUT", "spatialdata", settings=settings, on_message=messages.append)
    assert messages == ["B: the sample sheet names no expression of this slide, so its spots are left out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata

        data = spatialdata.read_zarr(tmp_path / "OUT")
        assert set(data.tables) == {"A_expression", "A_measured", "B_expression"}
        measured, circles = data.tables["A_measured"], data.shapes["A_spots"]
        matched, joined = spatialdata.join_spatialelement_table(
            sdata=data, spatial_element_names="A_spots", table_name="A_measured", how="inner"
        )
    np.testing.assert_array_equal(measured.layers["counts"].toarray(), counts)
    totals = counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(measured.X.toarray(), np.log1p(1e4 * counts / totals), rtol=1e-5)
    np.testing.assert_allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), xy_px * SLIDE_MPP)
    assert (circles["radius"] == 27.5).all()
    assert len(matched["A_spots"]) == joined.n_obs == 31
    with pytest.raises(ExportError, match=r"parquet holds no measured spots: .* export to spatialdata"):
        export(made.maps, tmp_path / "p", "parquet", settings=settings)


@pytest.mark.spatialdata
def test_embeddings_as_spatialdata(made: Made, tmp_path: Path) -> None:
    export(made.store, tmp_path / "OUT.zarr", "spatialdata", ExportSelection(["B"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata

        data = spatialdata.read_zarr(tmp_path / "OUT.zarr")
        (table,) = open_tables(made.store, ExportSelection(["B"]))
        assert data.tables["B_embedding"].shape == (len(table), len(table.names))


# ---------------------------------------------------------------- formats of other packages

THEIRS = """
from histosge.exporting.export_format import ExportFormat


def write(items, path, settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = [(item.table.slide_id, len(item.table), item.slide and item.slide.size_px) for item in items]
    path.write_text("".join("%s %s %s\\n" % fact for fact in facts))
    return f"{len(items)} lines"


RECORD = ExportFormat("theirs", "a line per slide (nobody)", ".txt", write, OPTIONS)
"""


def _add_format(monkeypatch: pytest.MonkeyPatch, site: Path, options: str) -> None:
    site.mkdir()
    install(site, "exports", "theirs", THEIRS.replace("OPTIONS", options))
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "their_theirs", raising=False)
    # A registry reads the entry points once; this one reads them now.
    fresh = Registry(FORMATS.kind, "histosge.exporting.formats", ExportFormat, ExportError)
    monkeypatch.setattr("histosge.exporting.export.FORMATS", fresh)


def test_a_format_of_another_package_writes_a_file_per_slide_with_the_slide_if_it_wants_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_format(monkeypatch, tmp_path / "site", "wants_slide=True")
    settings = ExportSettings(store=made.store)
    lines = export(made.maps, tmp_path / "out", "theirs", settings=settings)
    assert lines == [f"{tmp_path}/out/{name}.txt: 1 lines" for name in ("A", "B")]
    (table,) = open_tables(made.maps, ExportSelection(["B"]))
    assert (tmp_path / "out" / "B.txt").read_text() == f"B {len(table)} (700, 600)\n"
    export(made.maps, tmp_path / "only.txt", "theirs", ExportSelection(["A"]), settings)
    assert (tmp_path / "only.txt").read_text().startswith("A ")


def test_a_format_of_another_package_gets_all_slides_at_once_if_it_holds_them_in_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_format(monkeypatch, tmp_path / "site", "one_for_all=True, maps=False")
    assert export(made.store, tmp_path / "all.txt", "theirs") == [f"{tmp_path}/all.txt: 2 lines"]
    assert [line.split()[::2] for line in (tmp_path / "all.txt").read_text().splitlines()] == [
        ["A", "None"],
        ["B", "None"],
    ]
    with pytest.raises(ExportError, match=r"theirs takes embeddings; .* is an expression store"):
        export(made.maps, tmp_path / "no.txt", "theirs")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder is a folder, where a file would go"):
        export(made.store, tmp_path / "folder", "theirs")


# ---------------------------------------------------------------- elsewhere than on a disk


def test_a_map_behind_a_url_is_read_where_it_lies(made: Made, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in Path(made.maps).rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/exports/{file.relative_to(made.maps)}", file.read_bytes())
    export("memory://exports", tmp_path / "B.parquet", "parquet", ExportSelection(["B"]))
    export(made.maps, tmp_path / "local.parquet", "parquet", ExportSelection(["B"]))
    assert pl.read_parquet(tmp_path / "B.parquet").equals(pl.read_parquet(tmp_path / "local.parquet"))
    with pytest.raises(ExportError, match="export there, then copy it up"):
        export(made.maps, "s3://bucket/x.h5ad", "h5ad", ExportSelection(["B"]))


@pytest.mark.parametrize(
    ("to", "folder"), [("h5ad", False), ("parquet", False), ("geojson", False), ("tiff", True)]
)
def test_a_place_that_cannot_be_written_to_is_refused_in_one_line(
    made: Made, tmp_path: Path, to: str, folder: bool
) -> None:
    (tmp_path / "file").write_text("1")
    suffix = FORMATS.get(to).suffix
    (tmp_path / f"folder{suffix}").mkdir()
    places = [tmp_path / "file" / f"x{suffix}", tmp_path / ("a" * 300 + suffix), Path("/proc") / f"x{suffix}"]
    if not folder:
        places += [tmp_path / f"folder{suffix}"]
    for place in places:
        with pytest.raises((OutputError, ExportError)) as refused:
            export(made.maps, place, to, ExportSelection(["A"]))
        assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def test_a_gene_called_like_the_file_of_all_values_keeps_its_own(made: Made, tmp_path: Path) -> None:
    (table,) = open_tables(made.maps, ExportSelection(["A"], ["EPCAM"]))
    write_tiffs(replace(table, names=("values.ome",)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert tifffile.TiffFile(tmp_path / "values.ome.tif").is_ome


def test_a_grid_with_an_origin_is_drawn_where_its_patches_are(tmp_path: Path) -> None:
    plain = PatchGrid(GridSpec(1.0, 32, 16), 0.5, 1.0, 4, 5)
    grid = PatchGrid(OffsetGridSpec(1.0, 32, 16), 0.5, 1.0, 4, 5, (16.0, 48.0))  # 8 and 24 um
    plane = np.arange(20, dtype=np.float32).reshape(4, 5)
    np.testing.assert_array_equal(on_slide(plane, grid, -1)[3:, 1:], on_slide(plane, plain, -1))
    assert (on_slide(plane, grid, -1)[:3] == -1).all()
    corners = []
    for number, one in enumerate((plain, grid)):
        write_geojson(np.where(plane == 7, 0, -1), one, tmp_path / f"{number}.geojson", ["a"])
        (feature,) = json.loads((tmp_path / f"{number}.geojson").read_text())["features"]
        corners.append(np.asarray(feature["geometry"]["coordinates"][0]))
    np.testing.assert_array_equal(corners[1] - corners[0], np.broadcast_to([16.0, 48.0], corners[0].shape))


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "$\\frac{",
    "Aβ42 样本",
    "a\"b'c&d;",
    "../../etc/passwd",
    "row",
    "gene_row",
    "row",
)


@pytest.mark.parametrize("to", ["h5ad", "parquet", "geojson", "tiff", "ome-zarr"])
def test_any_name_of_a_gene_is_text_in_every_format(table: PatchTable, tmp_path: Path, to: str) -> None:
    hostile = replace(table, names=HOSTILE, columns=tuple(i % len(GENES) for i in range(len(HOSTILE))))
    chosen = FORMATS.get(to)
    out = tmp_path / "deep" / "down" / f"out{chosen.suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen.write([ExportItem(hostile, "")], out, ExportSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["down"]
    if to == "h5ad":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert tuple(anndata.read_h5ad(out).var_names) == HOSTILE
    if to == "parquet":
        columns = pl.read_parquet_schema(out)
        assert len(columns) == 5 + len(HOSTILE)
        assert {*HOSTILE[:5]} <= set(columns)
    if to == "tiff":
        assert len(list(out.iterdir())) == len(HOSTILE) + 2
        with tifffile.TiffFile(out / "values.ome.tif") as file:
            assert file.is_ome
