"""Read measured expression in whatever layout it has: the first registered layout that recognises the path."""

from pathlib import Path

from histosge.data.expression.expression_layout import LAYOUTS
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.sections import Spots
from histosge.errors import ExpressionError


def find_expression(path: str | Path, frame: SlideFrame) -> LoadedExpression:
    """Read the spots of one section, and describe what was found.

    Parameters
    ----------
    path
        In one of the registered layouts, see `known_layouts`; of a run's folder also the parent that holds ``outs/``.
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
        raise ExpressionError(f"there is no expression at {path}; give {known_layouts()}")
    for layout in sorted(LAYOUTS.records(), key=lambda layout: layout.order):
        # The first one decides: a file that it recognises and cannot read is refused with its reason.
        if layout.recognises(place):
            return layout.read(place, frame)
    raise ExpressionError(f"{path} is none of the layouts that are read here; give {known_layouts()}")


def read_expression(path: str | Path, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    """Read only the spots of one section; see `find_expression`."""
    return find_expression(path, SlideFrame(slide_id, donor, slide_mpp)).spots


def known_layouts() -> str:
    """Return the help lines of all layouts as one phrase: "a, b or c"."""
    *first, last = (layout.help for layout in sorted(LAYOUTS.records(), key=lambda layout: layout.order))
    return f"{', '.join(first)} or {last}" if first else last
