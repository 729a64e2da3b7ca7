"""Domains as polygons: GeoJSON that QuPath, and anything that reads GeoJSON, opens on the slide.

Coordinates are level-0 pixels. A domain's patches that touch along a side make one polygon, with its holes.

Terms
    labels   a whole number per patch of the grid, -1 where there is none
    ring     a closed line of lattice corners, first = last; outer rings run one way, holes the other
"""

import colorsys
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from featurestore.grid import PatchGrid
from featurestore.whole_file import whole_file
from histosge.exporting.domain_labels import domain_labels, read_labels
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings

Ring = list[tuple[int, int]]
_GOLDEN = 0.618033988749895


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
        Of the domains, by label; ``domain 1`` and so on where there is none.
    """
    given = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    features: list[dict[str, Any]] = []
    for label in np.unique(labels[labels >= 0]).tolist():
        name = given.get(label, f"domain {label + 1}")
        pieces = polygons(labels == label)
        features.extend(_feature(rings, grid, name, _colour(label)) for rings in pieces)
    with whole_file(path) as partial:
        partial.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return len(features)


def _feature(rings: list[Ring], grid: PatchGrid, name: str, colour: list[int]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [_pixels(ring, grid) for ring in rings]},
        "properties": {
            "objectType": "annotation",
            "name": name,
            "classification": {"name": name, "color": colour},
            "isLocked": False,
        },
    }


def _pixels(ring: Ring, grid: PatchGrid) -> list[list[float]]:
    """Return lattice corners as level-0 pixels: a patch stands for its stride cell, around its centre."""
    first_um, step_um = (grid.patch_um - grid.stride_um) / 2, grid.stride_um
    return [[round((first_um + side * step_um) / grid.slide_mpp, 2) for side in (x, y)] for x, y in ring]


def _colour(label: int) -> list[int]:
    """Return a colour far from its neighbours', by steps of the golden ratio round the circle of hues."""
    return [round(255 * c) for c in colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.65, 0.9)]


def polygons(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """Outline the pieces of a mask whose cells touch along a side.

    Returns
    -------
    list
        Per piece its rings, the outer one first, then holes; corners are ``(x, y)``, cell (row, col)
        spanning x from col to col + 1 and y from row to row + 1.
    """
    pieces, n = ndimage.label(mask)
    found = []
    for number, where in enumerate(ndimage.find_objects(pieces, n), start=1):
        rows, cols = where
        rings = _rings(pieces[where] == number)
        rings.sort(key=lambda ring: -abs(_area(ring)))
        found.append([[(x + cols.start, y + rows.start) for x, y in ring] for ring in rings])
    return found


def _rings(cells: NDArray[np.bool_]) -> list[Ring]:
    """Chain the sides between a piece and its surroundings into rings, the piece on their right."""
    leaving = _sides(cells)
    rings = []
    while leaving:
        start = next(iter(leaving))
        ring, at, heading = [start], start, leaving[start][0]
        while True:
            leaving[at].remove(heading)
            if not leaving[at]:
                del leaving[at]
            at = (at[0] + heading[0], at[1] + heading[1])
            ring.append(at)
            if at == start:
                break
            heading = _turn(leaving[at], heading)
        rings.append(_straightened(ring))
    return rings


def _sides(cells: NDArray[np.bool_]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return corner -> headings ``(dx, dy)`` of the sides that leave it."""
    padded = np.pad(cells, 1)
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Clockwise on screen (y grows downwards): along the top to the right, down the right side, and so on.
    for (d_row, d_col), (dx, dy), (x, y) in (
        ((-1, 0), (1, 0), (0, 0)),
        ((0, 1), (0, 1), (1, 0)),
        ((1, 0), (-1, 0), (1, 1)),
        ((0, -1), (0, -1), (0, 1)),
    ):
        neighbour = padded[1 + d_row : padded.shape[0] - 1 + d_row, 1 + d_col : padded.shape[1] - 1 + d_col]
        for row, col in zip(*(a.tolist() for a in np.nonzero(cells & ~neighbour)), strict=True):
            leaving.setdefault((col + x, row + y), []).append((dx, dy))
    return leaving


def _turn(headings: list[tuple[int, int]], came: tuple[int, int]) -> tuple[int, int]:
    """Choose where to go on at a corner: where two cells meet there, keep what lies between them apart.

    One of the two gaps is enclosed by the piece, so crossing over to the other cell (left, seen along the
    way) keeps each ring simple: a hole may touch the outer ring but is never part of it.
    """
    left = (came[1], -came[0])
    return left if left in headings else headings[0]


def _straightened(ring: Ring) -> Ring:
    """Drop corners that lie on a straight line; the ring stays closed."""
    points = ring[:-1]
    kept = [
        here
        for before, here, after in zip(
            points[-1:] + points[:-1], points, points[1:] + points[:1], strict=True
        )
        if (here[0] - before[0]) * (after[1] - here[1]) != (here[1] - before[1]) * (after[0] - here[0])
    ]
    return [*kept, kept[0]]


def _area(ring: Ring) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    chosen = settings.domains
    labels = domain_labels(item.table, chosen) if isinstance(chosen, int) else read_labels(item.table, chosen)
    n_polygons = write_geojson(labels, item.table.grid, path)
    return f"{len(set(labels[labels >= 0].tolist()))} domains in {n_polygons} polygons"


RECORD = ExportFormat("geojson", "domains as polygons (QuPath)", ".geojson", _write)
