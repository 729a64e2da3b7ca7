"""Outlines of some cells, and what makes polygons of the corners that a file names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

Ring = NDArray[np.float64]
"""Corners ``(x, y)``, ``(n, 2)``, of a ring; closed or not."""


@dataclass(frozen=True)
class OutlineBatch:
    """Outlines of some cells.

    Parameters
    ----------
    ids
        As the file names them; empty where it does not.
    classes
        Such as ``Neoplastic``; empty where the file states none.
    polygons
        shapely Polygons and MultiPolygons, ``(n,)``, in level-0 pixels; valid, and of positive area.
    broken
        Cells that were left out: fewer than three corners, no area, or positions that are no numbers.
    other
        Features that are no outlines: points and lines.
    """

    ids: list[str]
    classes: list[str]
    polygons: NDArray[Any]
    broken: int = 0
    other: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class RawOutline:
    """One cell or region as a file has it: parts, each of an outer ring and its holes, as JSON or arrays hold them."""

    id: str
    kind: str
    parts: Sequence[Sequence[Any]]
    name: str = ""


def to_batch(cells: Sequence[RawOutline], other: int = 0) -> OutlineBatch:
    """Make polygons; cells that are none are left out and counted.

    Polygons that cross themselves are split where they do, as `shapely.make_valid` does.
    """
    corners: list[Ring] = []
    ring_part: list[int] = []
    part_cell: list[int] = []
    kept: list[RawOutline] = []
    for cell in cells:
        rings = [[_ring(ring) for ring in part] for part in cell.parts]
        if not rings or any(not part or any(ring is None for ring in part) for part in rings):
            continue
        for part in rings:
            for ring in part:
                assert ring is not None
                corners.append(ring)
                ring_part.append(len(part_cell))
            part_cell.append(len(kept))
        kept.append(cell)
    if not kept:
        return OutlineBatch([], [], np.empty(0, dtype=object), len(cells), other)
    index = np.repeat(np.arange(len(corners)), [len(ring) for ring in corners])
    # In one call each: a call for every cell takes ten times as long.
    linear = shapely.linearrings(np.concatenate(corners), indices=index)
    parts = shapely.polygons(linear, indices=np.array(ring_part))
    # A cell of one part stays a Polygon: that is what other tools expect to read.
    single = np.bincount(part_cell) == 1
    polygons = np.empty(len(kept), dtype=object)
    cell_of = np.array(part_cell)
    polygons[single] = parts[single[cell_of]]
    if not single.all():
        several = ~single[cell_of]
        polygons[~single] = shapely.multipolygons(
            parts[several], indices=np.unique(cell_of[several], return_inverse=True)[1]
        )
    polygons = _valid(polygons)
    good = np.flatnonzero(shapely.area(polygons) > 0)
    return OutlineBatch(
        [kept[i].id for i in good],
        [kept[i].kind for i in good],
        polygons[good],
        len(cells) - len(good),
        other,
    )


def _ring(corners: Any) -> Ring | None:
    """Return corners as an array; None if there are fewer than three, or they are no numbers."""
    try:
        found = np.asarray(corners)
    except ValueError:  # of unequal lengths
        return None
    if found.ndim != 2 or len(found) < 3 or found.shape[1] < 2 or found.dtype.kind not in "iuf":
        return None
    ring = found[:, :2].astype(np.float64)  # a third coordinate is a plane of the picture
    return ring if np.isfinite(ring).all() else None


def _valid(polygons: NDArray[Any]) -> NDArray[Any]:
    """Repair polygons that cross themselves; lines and points that are cut off are dropped."""
    crossed = np.flatnonzero(~shapely.is_valid(polygons))
    for i in crossed:
        parts = shapely.get_parts(shapely.make_valid(polygons[i]))
        areas = [part for part in shapely.get_parts(parts) if shapely.area(part) > 0]
        polygons[i] = areas[0] if len(areas) == 1 else shapely.MultiPolygon(areas)
    return polygons
