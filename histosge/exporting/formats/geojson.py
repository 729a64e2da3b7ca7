"""Domains as polygons: GeoJSON that QuPath, and anything that reads GeoJSON, opens on the slide.

Coordinates are level-0 pixels. A domain's patches that touch along a side make one polygon, with its holes.

Terms
    labels   a whole number per patch of the grid, -1 where there is none
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon, mapping
from shapely.geometry.polygon import orient

from featurestore.grid import PatchGrid
from featurestore.whole_file import whole_file
from featurestore.wording import counted
from histosge.exporting.domain_labels import domain_colour, domain_labels, domain_name, read_labels
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.patch_table import PatchTable


def write_geojson(
    labels: NDArray[np.integer[Any]],
    grid: PatchGrid,
    path: Path,
    names: Mapping[int, str] | Sequence[str] = (),
) -> int:
    """Write one feature per connected piece of a domain; return their number.

    Parameters
    ----------
    labels
        ``(n_rows, n_cols)``; -1 belongs to no domain.
    names
        Of the domains, by label; `histosge.exporting.domain_labels.domain_name` where there is none.
    """
    features = domain_features(labels, grid, names)
    with whole_file(path) as partial:
        partial.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return len(features)


def domain_features(
    labels: NDArray[np.integer[Any]], grid: PatchGrid, names: Mapping[int, str] | Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return one annotation per connected piece of a domain; parameters as of `write_geojson`."""
    given = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    features: list[dict[str, Any]] = []
    for label in np.unique(labels[labels >= 0]).tolist():
        name = given.get(label, domain_name(label))
        features.extend(
            _feature(piece, grid, name, domain_colour(label)) for piece in polygons(labels == label)
        )
    return features


def _feature(outline: Polygon, grid: PatchGrid, name: str, colour: list[int]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": mapping(shapely.transform(outline, lambda corners: _pixels(corners, grid))),
        "properties": {
            "objectType": "annotation",
            "name": name,
            "classification": {"name": name, "color": colour},
            "isLocked": False,
        },
    }


def _pixels(corners: NDArray[np.float64], grid: PatchGrid) -> NDArray[np.float64]:
    """Return lattice corners as level-0 pixels: a patch stands for its stride cell, around its centre."""
    first_um, step_um = np.asarray(grid.origin_um) + (grid.patch_um - grid.stride_um) / 2, grid.stride_um
    return np.round((first_um + corners * step_um) / grid.slide_mpp, 2)


def polygons(mask: NDArray[np.bool_]) -> list[Polygon]:
    """Outline the pieces of a mask whose cells touch along a side.

    Returns
    -------
    list of shapely.Polygon
        Corners are ``(x, y)``, cell (row, col) spanning x from col to col + 1 and y from row to row + 1. Outer rings
        have a positive area by the shoelace formula, as RFC 7946 asks, and holes a negative one.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    # One box for each run of cells in a row: joining single cells takes five times as long.
    area = shapely.union_all(shapely.box(starts, rows, stops, rows + 1))
    # Rings then start at their lowest corner. GEOS 3.11 (shapely 2.0) keeps the first point even in the middle of a side.
    area = shapely.normalize(area)
    # Tolerance 0 drops collinear points only, so the topology cannot change and need not be guarded (40 times as slow).
    area = shapely.simplify(area, 0, preserve_topology=False)
    return [orient(part) for part in shapely.get_parts(area)]


def labels_of(table: PatchTable, settings: ExportSettings) -> NDArray[np.int64]:
    """Return a table's domains: as many as the settings want, or those of the table that they name."""
    chosen = settings.domains
    return domain_labels(table, chosen) if isinstance(chosen, int) else read_labels(table, chosen)


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    labels = labels_of(item.table, settings)
    n_polygons = write_geojson(labels, item.table.grid, path)
    return f"{counted(len(set(labels[labels >= 0].tolist())), 'domain')} in {counted(n_polygons, 'polygon')}"


RECORD = ExportFormat("geojson", "domains as polygons (QuPath)", ".geojson", _write)
