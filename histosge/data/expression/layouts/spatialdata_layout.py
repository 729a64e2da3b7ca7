"""SpatialData: a ``.zarr`` whose table annotates shapes. Needs the extra `spatialdata`.

Positions are read where the shapes lie in the coordinate system of a picture: that picture is taken as
the slide, or as a scaled copy of it if its sides have the slide's proportions.

Terms
    region   the shapes of one section, as a table annotates them; Visium HD has one for each size of bins
    system   a coordinate system of SpatialData: a name that elements share
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histosge.data.expression.annotated_table import choose_counts, choose_rows
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.foreign_files import reading
from histosge.data.expression.layouts.space_ranger import (
    DEFAULT_BIN_UM,
    VISIUM_NOTE,
    chip_mpp,
    theoretical_visium_mpp,
)
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    check_zarr_folder,
    left_out,
    make_spots,
    parse_flags,
    zarr_attributes,
)
from histosge.data.expression.section_choice import EVERYTHING, choose_section, is_named, listed
from histosge.errors import ExpressionError
from histosge.extras import load_extra

SAME_PROPORTIONS = 0.02
"""Relative difference of the two scales up to which a picture is a smaller copy of the slide: sides are rounded."""
SAME_SCALE = 0.05
"""Relative difference of two scales that rounding and measuring explain."""
PIXELS = ("pixel", "pixels", "px")
MICRONS = ("micrometer", "micrometers", "micron", "microns", "um", "\u00b5m", "\u03bcm")
"""Names of units, and of coordinate systems that readers of SpatialData call after their unit."""
# Of spatialdata-io's Visium HD reader: "<dataset>_square_008um".
_BIN = re.compile(r"_?square_(\d{3})um")
_Matrix = NDArray[np.float64]


def recognises(path: Path) -> bool:
    """Tell whether this is a SpatialData folder."""
    return path.is_dir() and "spatialdata_attrs" in zarr_attributes(path)


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read the table, and the shapes that it annotates, on the slide; spots off tissue (``in_tissue`` 0) are left out."""
    load_extra("spatialdata", f"reading {path.name}")
    import spatialdata

    check_zarr_folder(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        with reading(path, "SpatialData"):
            data = spatialdata.read_zarr(path)
            region = _choose_region(data, path, frame)
            shapes = data.shapes[region.name]
        table, notes = _rows_of(data.tables[region.table], region, path, frame)
        with reading(path, "SpatialData"):
            instances = table.obs[region.instance_key].to_numpy()
            if not shapes.index.is_unique:
                raise ExpressionError(f"{path}: names of the shapes {region.name!r} occur twice")
            # A table's rows name their shapes and may come in any order.
            chosen = shapes.reindex(instances)
            centres, diameter, shape = _outline(chosen)
            systems = _systems(shapes)
            matrix, placed_by = _to_slide(data, shapes, region.name, path, frame)
    if matrix is None:
        matrix, placed_by = _by_unit(path, region.name, table.obs, systems, centres, frame)
    xy_px = np.column_stack([centres, np.ones(len(centres))]) @ matrix.T
    wide_px = (diameter or 0.0) * float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    mpp = theoretical_visium_mpp(table.obs, xy_px[:, :2], wide_px)
    counts, genes, counts_note = choose_counts(table, path)
    keep = parse_flags(table.obs["in_tissue"], path) if "in_tissue" in table.obs else None
    xy_um = xy_px[:, :2] * frame.mpp
    spots = make_spots(
        frame,
        path,
        table.obs_names.to_numpy().astype(str),
        xy_um,
        counts,
        genes,
        diameter_um=wide_px * frame.mpp if diameter is not None and not mpp else VISIUM_SPOT_UM,
        shape=shape,
        keep=keep,
    )
    notes = [f"table {region.table!r} on shapes {region.name!r}", *notes, placed_by, counts_note]
    notes += [VISIUM_NOTE if mpp else "", *left_out(xy_um, keep)]
    return LoadedExpression(spots, "SpatialData", mpp, tuple(note for note in notes if note))


@dataclass(frozen=True)
class _Region:
    """Shapes that a table annotates.

    Parameters
    ----------
    name, table
        Of the shapes, and of the table.
    region_key, instance_key
        Columns of the table: the shapes' name, and which of them a row is of.
    note
        Which others of its section there are.
    """

    name: str
    table: str
    region_key: str
    instance_key: str
    note: str = ""

    @property
    def section(self) -> str:
        """Its name without the size of bins; the whole name if nothing else is in it."""
        return _BIN.sub("", self.name) or self.name

    @property
    def bin_um(self) -> int | None:
        match = _BIN.search(self.name)
        return int(match[1]) if match else None


def _choose_region(data: Any, path: Path, frame: SlideFrame) -> _Region:
    regions = _regions(data)
    if not regions:
        held = listed(data.tables) or "none"
        raise ExpressionError(
            f"{path} has no table that annotates shapes (tables: {held}); its spots cannot be placed"
        )
    # The name of a region itself is clear, also where it is one size of bins of several.
    if frame.section in {region.name for region in regions}:
        return next(region for region in regions if region.name == frame.section)
    sections = list(dict.fromkeys(region.section for region in regions))
    if frame.section is not None and len(sections) == 1:
        section = sections[0]  # it may name a library in the table
    else:
        section = choose_section(sections, _by_system(data, regions, sections, frame), path, "regions")
    ours = [region for region in regions if region.section == section]
    bins = {region.bin_um: region for region in ours}
    size = DEFAULT_BIN_UM if DEFAULT_BIN_UM in bins else min(um or 0 for um in bins)
    first = bins.get(size) or ours[0]
    others = listed(region.name for region in ours if region.name != first.name)
    tables = listed(
        region.table for region in ours if region.name == first.name and region.table != first.table
    )
    notes = (
        *([f"{first.name} taken, of others there: {others}"] if others else []),
        *([f"table {first.table} taken, of others on {first.name}: {tables}"] if tables else []),
    )
    return replace(first, note="; ".join(notes))


def _regions(data: Any) -> list[_Region]:
    found = []
    for name, table in data.tables.items():
        attrs = table.uns.get("spatialdata_attrs")
        attrs = attrs if isinstance(attrs, Mapping) else {}
        regions = attrs.get("region")
        names = [regions] if isinstance(regions, str) else list(regions if regions is not None else ())
        found += [
            _Region(str(region), name, attrs["region_key"], attrs["instance_key"])
            for region in names
            if region in data.shapes
        ]
    return found


def _by_system(data: Any, regions: list[_Region], sections: list[str], frame: SlideFrame) -> SlideFrame:
    """Return the frame with the section whose coordinate system is called like the slide, if just one is."""
    if frame.section is not None or any(is_named(name, frame) for name in sections):
        return frame
    systems = {region.section: _systems(data.shapes[region.name]) for region in regions}
    found = [section for section, names in systems.items() if any(is_named(name, frame) for name in names)]
    return replace(frame, section=found[0]) if len(found) == 1 else frame


def _rows_of(table: Any, region: _Region, path: Path, frame: SlideFrame) -> tuple[Any, list[str]]:
    """Return the rows of a table that annotate the region and are of the section, and notes."""
    missing = [key for key in (region.region_key, region.instance_key) if key not in table.obs]
    if missing:
        raise ExpressionError(
            f"{path}: table {region.table!r} has no column {missing[0]!r}, which its attributes name"
        )
    table = table[(table.obs[region.region_key] == region.name).to_numpy()]
    # The region's name has done its part; any other name is of a library within the region.
    named = frame.section in (region.name, region.section)
    inner = replace(frame, section=None if named and frame.section != EVERYTHING else frame.section)
    rows, _, note = choose_rows(table.obs, [], path, inner)
    return table if rows.all() else table[rows], [region.note, note]


def _to_slide(
    data: Any, shapes: Any, region: str, path: Path, frame: SlideFrame
) -> tuple[_Matrix | None, str]:
    """Return the affine ``(3, 3)`` from the shapes' own coordinates to level-0 pixels by a picture, and how; or None."""
    options = list(_pictures(data, shapes))
    if not options:
        return None, ""
    if frame.size_px is None:
        # The largest picture is the one nearest to the slide's full resolution.
        best = max(options, key=lambda option: option.size_px[0] * option.size_px[1])
        return best.matrix, f"picture {best.name!r} taken as the slide"
    fitting = [option for option in options if option.fits(frame.size_px)]
    if not fitting:
        texts = (f"{o.name} of {o.size_px[0]} x {o.size_px[1]} px" for o in _largest_first(options))
        sizes = listed(dict.fromkeys(texts))
        raise ExpressionError(
            f"{path}: the slide is {frame.size_px[0]} x {frame.size_px[1]} px, and no picture there is the same or a "
            f"smaller copy ({sizes}); name the picture's own slide in the sheet"
        )
    # A picture of just the slide's size is the slide itself; of copies the largest is the finest.
    exact = [option for option in fitting if option.size_px == frame.size_px]
    candidates = exact or _largest_first(fitting)
    named = [
        o
        for o in candidates
        if any(name and name in o.name for name in (region, frame.slide_id, frame.section))
    ]
    best = (named or candidates)[0]
    corners = np.array([[*shapes.total_bounds[:2], 1], [*shapes.total_bounds[2:], 1]])
    here = corners @ best.onto(frame.size_px).T
    for other in named or candidates:
        away = np.abs(corners @ other.onto(frame.size_px).T - here).max()
        if not away <= SAME_PROPORTIONS * max(frame.size_px):
            raise ExpressionError(
                f"{path}: pictures {best.name!r} and {other.name!r} may both be the slide, and put the shapes {region!r} "
                "at different places; leave the shapes one coordinate system, that of their own picture"
            )
    scale = frame.size_px[0] / best.size_px[0]
    smaller = f", {scale:.4g} times smaller" if best.size_px != frame.size_px else ""
    return best.onto(frame.size_px), f"picture {best.name!r} taken as the slide{smaller}"


@dataclass(frozen=True)
class _Picture:
    """A picture in a coordinate system with the shapes.

    Parameters
    ----------
    size_px
        ``(width, height)`` of its finest level.
    matrix
        From the shapes' own coordinates to its pixels, ``(3, 3)``.
    """

    name: str
    size_px: tuple[int, int]
    matrix: _Matrix

    def _scales(self, size_px: tuple[int, int]) -> tuple[float, float]:
        return size_px[0] / self.size_px[0], size_px[1] / self.size_px[1]

    def fits(self, size_px: tuple[int, int]) -> bool:
        """Tell whether a slide of this size may be the picture, or a larger copy."""
        across, down = self._scales(size_px)
        return abs(across / down - 1) <= SAME_PROPORTIONS

    def onto(self, size_px: tuple[int, int]) -> _Matrix:
        return np.asarray(np.diag([*self._scales(size_px), 1.0]) @ self.matrix)


def _largest_first(pictures: list[_Picture]) -> list[_Picture]:
    return sorted(pictures, key=lambda picture: -picture.size_px[0] * picture.size_px[1])


def _pictures(data: Any, shapes: Any) -> list[_Picture]:
    found = []
    ours = _systems(shapes)
    for name, picture in data.images.items():
        theirs = _systems(picture)
        found += [
            _Picture(name, _size(picture), np.linalg.inv(theirs[system]) @ ours[system])
            for system in ours
            if system in theirs
        ]
    return found


def _systems(element: Any) -> dict[str, _Matrix]:
    """Return the affine from an element's own coordinates to each of its coordinate systems, ``(3, 3)``."""
    from spatialdata.transformations import get_transformation

    axes = ("x", "y")
    transforms = get_transformation(element, get_all=True)
    return {
        name: np.asarray(transform.to_affine_matrix(axes, axes), dtype=np.float64)
        for name, transform in transforms.items()
    }


def _size(picture: Any) -> tuple[int, int]:
    """Return ``(width, height)`` of a picture's finest level."""
    finest = picture["scale0"] if "scale0" in getattr(picture, "children", {}) else picture
    sizes = dict(finest.sizes)
    return int(sizes["x"]), int(sizes["y"])


def _by_unit(
    path: Path,
    region: str,
    obs: Any,
    systems: Mapping[str, _Matrix],
    centres: NDArray[np.float64],
    frame: SlideFrame,
) -> tuple[_Matrix, str]:
    """Return the affine of shapes in systems without a picture, by whatever tells their unit; and what did.

    Parameters
    ----------
    systems
        The affine from the shapes' own coordinates to each system, ``(3, 3)``.
    """
    units = {name: _stated_unit(path / "shapes" / region, name) for name in systems}
    stated = {name: unit for name, unit in units.items() if unit}
    name = next(iter(stated or systems))
    xy = (np.column_stack([centres, np.ones(len(centres))]) @ systems[name].T)[:, :2]
    unit = stated.get(name) or _likely_unit(obs, xy, frame)
    if unit is None:
        raise ExpressionError(
            f"{path}: no picture and no unit tell whether the shapes {region!r} are in pixels or microns; name their "
            "coordinate system 'pixels' or 'microns'"
        )
    scale = 1.0 if unit == "pixels" else 1 / frame.mpp
    how = "are" if name in stated else "taken as"
    return np.diag([scale, scale, 1.0]) @ systems[name], f"no picture: coordinates of {name!r} {how} {unit}"


def _stated_unit(element: Path, system: str) -> str:
    """Return ``pixels`` or ``microns`` as the system's name or its axes state it; empty if neither does."""
    words = {system.lower()}
    transforms = zarr_attributes(element).get("coordinateTransformations")
    for transform in transforms if isinstance(transforms, list) else ():
        output = transform.get("output") if isinstance(transform, Mapping) else None
        if isinstance(output, Mapping) and output.get("name") == system:
            axes = output.get("axes")
            # SpatialData writes "unit" where none was given.
            words |= {str(axis.get("unit")).lower() for axis in axes or () if isinstance(axis, Mapping)}
    return "microns" if words & set(MICRONS) else "pixels" if words & set(PIXELS) else ""


def _likely_unit(obs: Any, xy: NDArray[np.float64], frame: SlideFrame) -> str | None:
    """Return the unit in which a Visium chip has its pitch or the spots fit on the slide; None if both are possible."""
    if frame.size_px is None or abs(frame.mpp - 1) <= SAME_SCALE:
        return "pixels"  # nothing to compare with, or no difference
    pitch = chip_mpp(obs, xy)
    if pitch is not None:
        # In microns a chip has one micron per unit. Any other scale is some picture's pixels, and is compared later.
        return "microns" if abs(pitch - 1) <= SAME_SCALE else "pixels"
    inside = [
        name
        for name, scale in (("pixels", 1.0), ("microns", 1 / frame.mpp))
        if _mostly_on(xy * scale, frame.size_px)
    ]
    return inside[0] if len(inside) == 1 else None


def _mostly_on(xy_px: NDArray[np.float64], size_px: tuple[int, int]) -> bool:
    placed = xy_px[np.isfinite(xy_px).all(axis=1)]
    # Not all: a few shapes beyond the edge are no evidence of another unit.
    return bool(len(placed)) and bool(((placed >= 0) & (placed <= size_px)).all(axis=1).mean() > 0.9)


def _outline(shapes: Any) -> tuple[NDArray[np.float64], float | None, str]:
    """Return centres ``(n, 2)``, the diameter or side in the shapes' own units, and disc or square."""
    centroid = shapes.geometry.centroid
    centres = np.column_stack([centroid.x, centroid.y]).astype(np.float64)
    if "radius" in shapes.columns:
        return centres, 2 * float(shapes["radius"].median()), "disc"
    area = float(shapes.geometry.area.median())
    # A square has five, as its first corner closes the ring. A hundred shapes are enough: counting a million is slow.
    corners = shapes.geometry.dropna().iloc[:100].count_coordinates()
    if area > 0 and (corners == 5).all():
        return centres, float(np.sqrt(area)), "square"
    return centres, 2 * float(np.sqrt(area / np.pi)) if area > 0 else None, "disc"


RECORD = ExpressionLayout("spatialdata", "a SpatialData .zarr", recognises, read, order=20, has_sections=True)
