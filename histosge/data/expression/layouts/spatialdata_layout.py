"""SpatialData: a ``.zarr`` whose table annotates shapes. Needs the extra `spatialdata`.

Positions are read where the shapes lie in the coordinate system of a picture: that picture is taken as
the slide, or as a scaled copy of it if its sides have the slide's proportions.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import first_line
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.layouts.space_ranger import VISIUM_NOTE, theoretical_visium_mpp
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    check_zarr_folder,
    make_spots,
    zarr_attributes,
)
from histosge.errors import ExpressionError
from histosge.extras import load_extra

SAME_PROPORTIONS = 0.02
"""Relative difference of the two scales up to which a picture is a smaller copy of the slide: sides are rounded."""


def recognises(path: Path) -> bool:
    """Tell whether this is a SpatialData folder."""
    return path.is_dir() and "spatialdata_attrs" in zarr_attributes(path)


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read the table, and the shapes that it annotates, on the slide."""
    load_extra("spatialdata", f"reading {path.name}")
    import spatialdata

    check_zarr_folder(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        try:
            data = spatialdata.read_zarr(path)
            name, region, table = _annotating_table(data, path)
            shapes = data[region]
            matrix, picture = _to_slide(data, shapes, frame)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, ExpressionError):
                raise
            raise ExpressionError(f"{path} cannot be read as SpatialData: {first_line(error)}") from error
    instances = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()
    # A table's rows name their shapes and may come in any order.
    chosen = shapes.reindex(instances)
    centres, diameter, shape = _outline(chosen)
    xy_px = np.column_stack([centres, np.ones(len(centres))]) @ matrix.T
    wide_px = (diameter or 0.0) * float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    mpp = theoretical_visium_mpp(table.obs, xy_px[:, :2], wide_px)
    notes = [f"table {name!r} on shapes {region!r}", picture, *([VISIUM_NOTE] if mpp else [])]
    spots = make_spots(
        frame,
        path,
        table.obs_names.to_numpy().astype(str),
        xy_px[:, :2] * frame.mpp,
        table.layers.get("counts", table.X),
        table.var_names.astype(str).tolist(),
        diameter_um=wide_px * frame.mpp if wide_px and not mpp else VISIUM_SPOT_UM,
        shape=shape,
    )
    return LoadedExpression(spots, "SpatialData", mpp, tuple(notes))


def _annotating_table(data: Any, path: Path) -> tuple[str, str, Any]:
    """Return the first table that annotates shapes, with those shapes' name."""
    for name, table in data.tables.items():
        attrs = table.uns.get("spatialdata_attrs", {})
        regions = attrs.get("region")
        for region in [regions] if isinstance(regions, str) else list(regions or []):
            if region in data.shapes:
                rows = (table.obs[attrs["region_key"]] == region).to_numpy()
                return name, region, table[rows]
    held = ", ".join(data.tables) or "none"
    raise ExpressionError(
        f"{path} has no table that annotates shapes (tables: {held}); its spots cannot be placed"
    )


def _to_slide(data: Any, shapes: Any, frame: SlideFrame) -> tuple[NDArray[np.float64], str]:
    """Return the affine ``(3, 3)`` from the shapes' own coordinates to level-0 pixels, and how it was found."""
    from spatialdata.transformations import get_transformation

    axes = ("x", "y")
    systems = get_transformation(shapes, get_all=True)
    options = []
    for system, transform in systems.items():
        here = np.asarray(transform.to_affine_matrix(axes, axes), dtype=np.float64)
        for name, picture in data.images.items():
            known = get_transformation(picture, get_all=True)
            if system in known:
                there = np.asarray(known[system].to_affine_matrix(axes, axes), dtype=np.float64)
                width, height = _size(picture)
                options.append((width * height, name, (width, height), np.linalg.inv(there) @ here))
    if not options:
        system, transform = next(iter(systems.items()))
        matrix = np.asarray(transform.to_affine_matrix(axes, axes), dtype=np.float64)
        return matrix, f"no picture: coordinates of {system!r} taken as level-0 pixels"
    # The largest picture is the one nearest to the slide's full resolution.
    _, name, size, matrix = max(options, key=lambda option: option[0])
    if frame.size_px is None or size == frame.size_px:
        return matrix, f"picture {name!r} taken as the slide"
    scale = np.array(frame.size_px) / np.array(size)
    if abs(scale[0] / scale[1] - 1) > SAME_PROPORTIONS:
        raise ExpressionError(
            f"picture {name!r} is {size[0]} x {size[1]} px and the slide {frame.size_px[0]} x {frame.size_px[1]}: "
            "not the same; name the picture's own slide in the sheet"
        )
    return np.diag(
        [*scale, 1.0]
    ) @ matrix, f"picture {name!r} taken as the slide, {scale[0]:.4g} times smaller"


def _size(picture: Any) -> tuple[int, int]:
    """Return ``(width, height)`` of a picture's finest level."""
    finest = picture["scale0"] if "scale0" in getattr(picture, "children", {}) else picture
    sizes = dict(finest.sizes)
    return int(sizes["x"]), int(sizes["y"])


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


RECORD = ExpressionLayout("spatialdata", "a SpatialData .zarr", recognises, read, order=20)
