"""Expression per cell, taken on to QuPath and SpatialData."""

import json
import uuid
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import shapely
from make_maps import SLIDE_MPP, make_map

from featurestore.errors import EarlierResultError, FeatureStoreError
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.exporting import cell_export
from histosge.exporting.cell_export import export_cells
from histosge.exporting.cell_table import write_cells
from histosge.exporting.domain_labels import domain_colour
from histosge_cli import main as command_line

FRAME = SlideFrame("A", "", SLIDE_MPP, (1120, 880))
OWN_ID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of two classes and of none; one of two parts, one with a UUID as QuPath gives it."""
    folder = tmp_path_factory.mktemp("cells")
    stored = make_map(folder / "maps", "A", depth=8.0)
    rng = np.random.default_rng(3)
    features = []
    for i in range(23):
        x, y = rng.uniform((430, 330), (690, 550))
        parts = [[[[x, y], [x + 31, y], [x + 31, y + 37], [x, y + 37], [x, y]]]]
        if i == 5:
            parts.append([[[x + 41, y], [x + 52, y], [x + 52, y + 13], [x + 41, y]]])
        kind = {"classification": {"name": ("Tumor", "Stroma")[i % 2]}} if i != 7 else {}
        features.append(
            {
                "type": "Feature",
                "id": OWN_ID if i == 11 else f"c{i}",
                "geometry": {"type": "MultiPolygon", "coordinates": parts}
                if len(parts) > 1
                else {"type": "Polygon", "coordinates": parts[0]},
                "properties": {"objectType": "detection", **kind},
            }
        )
    (folder / "c.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    write_cells(stored, folder / "c.geojson", folder / "c.h5ad", FRAME)
    return folder / "c.h5ad"


def test_qupath_gets_each_cell_with_its_outline_class_and_measurements(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_export, "ROWS", 10)
    said = export_cells(table, tmp_path / "q.geojson", "qupath", ["CD3E", "EPCAM"])
    assert said == f"{tmp_path / 'q.geojson'}: 23 cells with 2 genes"
    features = json.loads((tmp_path / "q.geojson").read_text())["features"]
    given = json.loads((table.parent / "c.geojson").read_text())["features"]
    data = anndata.read_h5ad(table)
    assert len(features) == 23
    for i, (feature, own) in enumerate(zip(features, given, strict=True)):
        assert shapely.equals(
            shapely.geometry.shape(feature["geometry"]), shapely.geometry.shape(own["geometry"])
        )
        assert feature["geometry"]["type"] == own["geometry"]["type"]
        measured = feature["properties"]["measurements"]
        np.testing.assert_allclose([measured["EPCAM"], measured["CD3E"]], data.X[i, :2], atol=1e-4)
        assert list(measured)[:2] == ["CD3E", "EPCAM"]
        np.testing.assert_allclose(measured["Area µm^2"], data.obs["area_um2"].iloc[i], atol=1e-3)
        assert measured["log total counts"] == 8.0
        assert feature["properties"]["name"] == own["id"]
        uuid.UUID(feature["id"])
        kind = own["properties"].get("classification", {}).get("name")
        found = feature["properties"].get("classification")
        place = {"Stroma": 0, "Tumor": 1, None: None}[kind]
        assert found == (None if kind is None else {"name": kind, "color": domain_colour(place)})
    assert features[11]["id"] == OWN_ID
    assert len({feature["id"] for feature in features}) == 23
    first = (tmp_path / "q.geojson").read_bytes()
    assert "nothing to do" in export_cells(table, tmp_path / "q.geojson", "qupath", ["CD3E", "EPCAM"])
    with pytest.raises(EarlierResultError, match="--overwrite"):
        export_cells(table, tmp_path / "q.geojson", "qupath", ["EPCAM"])
    assert (tmp_path / "q.geojson").read_bytes() == first


@pytest.mark.spatialdata
def test_spatialdata_gets_outlines_in_microns_linked_to_their_values(table: Path, tmp_path: Path) -> None:
    export_cells(table, tmp_path / "s.zarr", "spatialdata")
    data = anndata.read_h5ad(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata

        found = spatialdata.read_zarr(tmp_path / "s.zarr")
        shapes, joined = spatialdata.join_spatialelement_table(
            sdata=found, spatial_element_names="A_cells", table_name="A_cell_expression", how="inner"
        )
    assert found.coordinate_systems == ["A"]
    centres = shapes["A_cells"].geometry.centroid
    np.testing.assert_allclose(np.stack([centres.x, centres.y], axis=1), data.obs[["x_um", "y_um"]])
    np.testing.assert_allclose(shapes["A_cells"].geometry.area, data.obs["area_um2"])
    np.testing.assert_array_equal(joined.X, data.X)
    np.testing.assert_allclose(joined.obsm["spatial"], data.obs[["x_um", "y_um"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TABLE", "o.geojson", "--to", "tiff"), "tiff takes no table of cells"),
        (("TABLE", "o.csv", "--to", "qupath"), "o.csv is no .geojson"),
        (("TABLE", "o.geojson", "--to", "qupath", "--genes", "CD3"), "has no gene 'CD3': did you mean CD3E"),
        (("TABLE", "o.geojson", "--to", "qupath", "--slide", "A"), "leave out --slide"),
        (
            ("PLAIN", "o.geojson", "--to", "qupath"),
            "holds no outlines of cells; give a table that was made with",
        ),
        (("DAMAGED", "o.geojson", "--to", "qupath"), "cannot be read as a table of cells"),
        (("CUT", "o.geojson", "--to", "qupath"), "cannot be read as HDF5"),
        (("none.h5ad", "o.geojson", "--to", "qupath"), "none.h5ad is not there"),
    ],
)
def test_what_is_no_table_of_cells_is_one_line(
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / f"{name}.h5ad" for name in ("PLAIN", "DAMAGED", "CUT")} | {"TABLE": table}
    anndata.AnnData(np.ones((3, 2), np.float32)).write_h5ad(places["PLAIN"])
    places["DAMAGED"].write_bytes(table.read_bytes())
    with h5py.File(places["DAMAGED"], "a") as file:
        del file["uns/outlines/coords"]
    places["CUT"].write_bytes(table.read_bytes()[:3000])
    monkeypatch.setattr("sys.argv", ["histosge", "export", *(str(places.get(a, a)) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.glob("o.*"))


def test_too_many_measurements_are_refused(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_export, "MAX_GENES", 2)
    with pytest.raises(FeatureStoreError, match=r"3 genes are too many measurements .* choose with --genes"):
        export_cells(table, tmp_path / "q.geojson", "qupath")
