"""QuPath objects: domains as annotations, and patches as detections with a measurement for each gene.

QuPath's measurement maps then colour the patches by a gene. Written in the GeoJSON that QuPath documents: level-0 pixels,
``objectType``, ``classification`` with name and colour, and ``measurements`` as an object of numbers.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.whole_file import whole_file
from featurestore.wording import counted
from histosge.errors import ExportError
from histosge.exporting.domain_labels import domain_colour, domain_name
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.formats.geojson import domain_features, labels_of
from histosge.exporting.patch_table import PatchTable

MAX_GENES = 64
"""QuPath lists all measurements of an object in one panel, and each takes 20 bytes for each patch."""
# Of the ids: the same patch of the same map has the same id in every export, so that QuPath recognises it.
_NAMESPACE = uuid.UUID("6b1d7f0e-9a0c-5c1e-8f5b-2f6f8a3f1f10")


def write_qupath(table: PatchTable, labels: NDArray[np.integer[Any]], path: Path) -> int:
    """Write one slide's domains and patches; return the number of objects.

    Parameters
    ----------
    labels
        Domain of each patch, ``(n_rows, n_cols)``; -1 belongs to none.

    Raises
    ------
    ExportError
        If the table has more than `MAX_GENES` genes.
    """
    if len(table.names) > MAX_GENES:
        raise ExportError(
            f"{len(table.names)} genes are too many measurements (at most {MAX_GENES}); choose with --genes A,B"
        )
    annotations = domain_features(labels, table.grid)
    n = 0
    with whole_file(path, sweep=True) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        # One after another: a million patches would be gigabytes as Python's objects.
        for feature in annotations:
            stream.write(f"{',' if n else ''}\n{json.dumps(feature)}")
            n += 1
        for feature in _detections(table, labels):
            stream.write(f"{',' if n else ''}\n{json.dumps(feature)}")
            n += 1
        stream.write("\n]}\n")
    return n


def _detections(table: PatchTable, labels: NDArray[np.integer[Any]]) -> Iterator[dict[str, Any]]:
    grid = table.grid
    half, xy_um = grid.stride_um / 2, table.xy_um
    ids = table.ids
    for rows, values in table.chunks():
        for i, patch in zip(range(rows.start, rows.stop), values.astype(float).tolist(), strict=True):
            left, top = np.round((xy_um[i] - half) / grid.slide_mpp, 2).tolist()
            right, bottom = np.round((xy_um[i] + half) / grid.slide_mpp, 2).tolist()
            ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            properties: dict[str, Any] = {"objectType": "detection", "name": ids[i]}
            label = int(labels[table.rows[i], table.cols[i]])
            if label >= 0:
                properties["classification"] = {"name": domain_name(label), "color": domain_colour(label)}
            # Four digits: the store keeps three.
            properties["measurements"] = {
                name: round(value, 4)
                for name, value in zip(table.names, patch, strict=True)
                if np.isfinite(value)
            }
            yield {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, ids[i])),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    labels = labels_of(item.table, settings)
    n = write_qupath(item.table, labels, path)
    return f"{counted(n, 'object')}, {len(item.table)} of them patches with {counted(len(item.table.names), 'measurement')}"


RECORD = ExportFormat(
    "qupath",
    "domains as annotations, and patches as detections with genes as measurements (QuPath)",
    ".geojson",
    _write,
    embeddings=False,
)
