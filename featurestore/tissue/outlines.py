"""GeoJSON of annotations: QuPath's exports, TRIDENT's ``contours_geojson``, HEST's ``tissue_seg``.

All three give corners in pixels of the slide at level 0, ``(x, y)`` from its top-left. QuPath writes a class as
``properties.classification.name`` (``names`` for derived ones), and cells as detections, which are no areas of tissue.
TRIDENT and HEST write one contour a piece of tissue, with its holes and without a class. A coordinate reference system
that a file names is ignored: geopandas needs one to write GeoJSON, and it says nothing of a slide.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from featurestore.documents import DocumentError, parse_json
from featurestore.errors import MaskError
from featurestore.tissue.annotation import Frame
from featurestore.tissue.polygon_raster import Ring, fill_crossing_rings, fill_rings

NOT_AREAS = ("detection", "cell", "tile", "PathDetectionObject", "PathCellObject", "PathTileObject")
"""QuPath's objects that are no annotations; the second kind of name stands in exports before version 0.3."""
MAX_BEYOND = 0.05
"""Share of a slide's side by which outlines may reach beyond it. Those that run along the edge of the glass are drawn
a little outside; those of another scale lie far out, or are found by what they cover."""


@dataclass(frozen=True)
class _Area:
    name: str
    polygon: tuple[Ring, ...]
    crosses_itself: bool = False


@dataclass(frozen=True)
class Outlines:
    """Polygons with classes, in level-0 pixels.

    Parameters
    ----------
    areas
        One for each polygon: its class, its outline and its holes.
    label
        Path or URL of the file, for messages.
    remark
        What was repaired.
    kind
        As `Annotation` has it.
    """

    areas: tuple[_Area, ...] = field(repr=False)
    label: str
    remark: str = ""
    kind: Literal["geojson"] = "geojson"

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the polygons, sorted; "" stands for those without one."""
        return tuple(sorted({area.name for area in self.areas}))

    def draw(
        self,
        classes: Collection[str],
        frame: Frame,
        px_per_unit: float | None = None,
        *,
        swapped: bool = False,
    ) -> NDArray[np.bool_]:
        """Return which pixels of a frame lie in an area of these classes.

        Parameters
        ----------
        px_per_unit
            Level-0 pixels per unit of the file, to try another reading of it; None for pixels, which are checked.
        swapped
            Read ``(y, x)`` in place of ``(x, y)``.

        Raises
        ------
        MaskError
            If outlines reach far beyond the slide.
        """
        if px_per_unit is None:
            self._check_bounds(frame)
        factor = (px_per_unit or 1.0) / frame.scale
        found = np.zeros(frame.shape, bool)
        for area in self.areas:
            if area.name in classes:
                fill = fill_crossing_rings if area.crosses_itself else fill_rings
                fill([(ring[:, ::-1] if swapped else ring) * factor for ring in area.polygon], found)
        return found

    def _check_bounds(self, frame: Frame) -> None:
        corners = np.concatenate([area.polygon[0] for area in self.areas])
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        width, height = frame.slide_px
        if min(x0 / width, y0 / height) < -MAX_BEYOND or max(x1 / width, y1 / height) > 1 + MAX_BEYOND:
            raise MaskError(
                f"{self.label} has outlines from ({x0:.0f}, {y0:.0f}) to ({x1:.0f}, {y1:.0f}), and the slide has {width} x "
                f"{height} px; coordinates are pixels of the slide's level 0, so write them at that scale, or it is "
                "another slide's file"
            )


def read_outlines(data: bytes, label: str) -> Outlines:
    """Read a GeoJSON file.

    Outlines that cross themselves are counted in the remark; what they wind round is their area.

    Raises
    ------
    MaskError
        If it is no GeoJSON, or holds no polygon.
    """
    try:
        document = parse_json(data, label)
    except DocumentError as error:
        raise MaskError(f"{error}; export annotations only, as GeoJSON") from error
    areas: list[_Area] = []
    repaired = total = 0
    for name, rings in _polygons(document, label):
        total += 1
        polygon = shapely.Polygon(rings[0], rings[1:])
        if polygon.is_valid:
            areas.append(_Area(name, tuple(rings)))
            continue
        repaired += 1
        # Corners on one line enclose nothing.
        if np.linalg.matrix_rank(rings[0] - rings[0][0]) == 2:
            areas.append(_Area(name, tuple(rings), crosses_itself=True))
    if not areas:
        raise MaskError(
            f"{label} holds no area: {'its outlines have none' if total else 'it has no polygons'}; "
            "export annotations that are closed areas"
        )
    remark = (
        f"{repaired} of {total} outlines in {label} cross themselves and were repaired" if repaired else ""
    )
    return Outlines(tuple(areas), label, remark)


def _polygons(document: Any, label: str) -> Iterator[tuple[str, list[Ring]]]:
    """Yield each polygon's class and rings, in whatever way features are wrapped."""
    features: Any
    if isinstance(document, list):  # QuPath's export without "Export as FeatureCollection"
        features = document
    elif isinstance(document, dict) and document.get("type") == "FeatureCollection":
        features = document.get("features")
    elif isinstance(document, dict) and isinstance(document.get("type"), str):
        features = [document]
    else:
        features = None
    if not isinstance(features, list):
        raise MaskError(f"{label} is no GeoJSON: it has no features; export annotations as GeoJSON")
    for number, feature in enumerate(features, start=1):
        if not isinstance(feature, dict):
            raise MaskError(f"{label} is no GeoJSON: feature {number} is no object")
        is_feature = feature.get("type") == "Feature"
        about = feature.get("properties") if is_feature else None
        about = about if isinstance(about, dict) else {}
        if about.get("objectType", about.get("object_type", feature.get("id"))) in NOT_AREAS:
            continue
        geometry = feature.get("geometry") if is_feature else feature
        for polygon in _coordinates(geometry):
            yield _class_name(about), _rings(polygon, f"{label} is damaged: feature {number}")


def _coordinates(geometry: Any) -> Iterator[Any]:
    """Yield the coordinates of each polygon of a geometry; points and lines have no area."""
    if not isinstance(geometry, dict):  # a feature may have none
        return
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "Polygon":
        yield coordinates
    elif kind == "MultiPolygon" and isinstance(coordinates, list):
        yield from coordinates
    elif kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
        for part in geometry["geometries"]:
            yield from _coordinates(part)


def _rings(polygon: Any, where: str) -> list[Ring]:
    if not isinstance(polygon, list) or not polygon:
        raise MaskError(f"{where} has no coordinates; export it again")
    rings: list[Ring] = []
    for ring in polygon:
        try:
            corners = np.array([point[:2] for point in ring], dtype=np.float64)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise MaskError(
                f"{where} has coordinates that are no pairs of numbers; export it again"
            ) from error
        # Three corners, and the first again: fewer enclose nothing.
        if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 4:
            if not rings:
                raise MaskError(f"{where} has an outline of {len(corners)} corners; an area needs four")
            continue
        # Larger ones would overflow when they are multiplied; no slide has 1e9 pixels on a side.
        if not (np.abs(corners) < 1e9).all():
            raise MaskError(
                f"{where} has coordinates that are not finite, or beyond any slide; export it again"
            )
        rings.append(corners)
    return rings


def _class_name(about: Mapping[str, Any]) -> str:
    """Return the class that a feature's properties name; "" if there is none."""
    for key in ("classification", "class"):
        found = about.get(key)
        if isinstance(found, dict):
            names = found.get("names")
            if isinstance(names, list) and not isinstance(found.get("name"), str):
                return ": ".join(map(str, names))  # as QuPath shows derived classes
            found = found.get("name")
        if isinstance(found, str) and found:
            return found
    return ""
