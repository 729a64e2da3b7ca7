"""QuPath's objects as its own Python package reads them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_maps import SLIDE_MPP, make_map
from shapely.geometry import shape

from histosge.exporting.domain_labels import domain_colour
from histosge.exporting.export import export
from histosge.exporting.export_format import ExportSettings
from histosge.exporting.open_tables import ExportSelection, open_tables


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps") / "maps"
    make_map(folder)
    return folder


def _read(path: Path) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qubalab.objects.geojson import geojson_features_from_string
        from qubalab.objects.image_feature import ImageFeature

        features: Any = geojson_features_from_string(path.read_text())
        return [ImageFeature.create_from_feature(feature) for feature in features]


@pytest.mark.qubalab
def test_qubalab_reads_domains_and_patches_with_their_measurements(maps: Path, tmp_path: Path) -> None:
    choice = ExportSelection(["A"], ["CD3E", "EPCAM"])
    export(str(maps), tmp_path / "A.geojson", "qupath", choice, ExportSettings(domains=3))
    (table,) = open_tables(str(maps), choice)
    found = _read(tmp_path / "A.geojson")
    detections = [one for one in found if one.object_type.name == "DETECTION"]
    annotations = [one for one in found if one.object_type.name == "ANNOTATION"]
    assert len(detections) + len(annotations) == len(found)
    assert len(detections) == len(table)
    assert all(one.is_detection for one in detections)
    values = np.concatenate([values for _, values in table.chunks()])
    np.testing.assert_allclose(
        [[one.measurements["CD3E"], one.measurements["EPCAM"]] for one in detections], values, atol=1e-4
    )
    centres = [(p.x, p.y) for p in (shape(one.geometry).centroid for one in detections)]
    np.testing.assert_allclose(centres, table.xy_um / SLIDE_MPP, atol=0.02)
    assert len({one.id for one in found}) == len(found)
    # One class has one colour, whether a patch or an outline has it.
    for one in found:
        if one.classification is not None:
            (name,) = one.classification.names
            assert tuple(one.classification.color) == tuple(domain_colour(int(name.removeprefix("domain "))))
    assert {one.classification.names for one in annotations} == {(f"domain {i}",) for i in range(3)}
    # Whatever of ours it does not know, it keeps apart; there is nothing of that kind.
    known = {"object_type", "classification", "name", "measurements", "isLocked"}
    assert all(set(one.properties) <= known | {"objectType"} for one in found)
    assert all(shape(one.geometry).is_valid for one in found)
