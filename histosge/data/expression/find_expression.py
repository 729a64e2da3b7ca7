"""Which layout is it? The `expression` column names a folder or a file, and each is recognised by itself."""

from pathlib import Path

from histosge.data.expression.layouts import (
    anndata_layout,
    legacy_st,
    space_ranger,
    spatialdata_layout,
    xenium,
)
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

LAYOUTS = (anndata_layout, spatialdata_layout, xenium, space_ranger, legacy_st)
KNOWN = (
    "an .h5ad, a Space Ranger folder (Visium or Visium HD), a Xenium output folder, a SpatialData .zarr, "
    "or legacy ST tables"
)


def find_expression(path: str, frame: SlideFrame) -> LoadedExpression:
    """Read the spots of one section, and say what was found.

    Parameters
    ----------
    path
        One of `KNOWN`; for the folders also the run's folder that holds ``outs/``.
    frame
        The slide that they lie on.

    Returns
    -------
    LoadedExpression
        Spots in the file's order; spots off tissue or without coordinates are left out. Gene names that
        occur twice get ``-1``, ``-2`` ... appended.

    Raises
    ------
    ExpressionError
        If it cannot be read, has no coordinates, or does not hold raw counts.
    """
    place = Path(path)
    if not place.exists():
        raise ExpressionError(f"there is no expression at {path}; give {KNOWN}")
    for layout in LAYOUTS:
        if layout.recognises(place):
            found: LoadedExpression = layout.read(place, frame)
            return found
    raise ExpressionError(f"{path} is none of the layouts that are read here; give {KNOWN}")


def read_expression(path: str, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    """Read the spots of one section: `find_expression` for who only wants the spots."""
    return find_expression(path, SlideFrame(slide_id, donor, slide_mpp)).spots
