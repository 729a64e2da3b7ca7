"""A pathologist's annotation of spots: a column of the file that holds their expression.

Terms
    label   the class of a spot, as text; a spot without one is absent
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from histosge.data.expression.find_expression import find_layout
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.expression.section_choice import listed
from histosge.errors import ExpressionError

MISSING = ("", "nan", "na", "n/a", "none", "null", "<na>")
"""What tables hold, in any case, where an annotator gave no class; such spots are unlabelled."""
Labels = Mapping[str, str]
"""Barcode -> label."""


def read_annotation(expression: str | Path, frame: SlideFrame, column: str) -> Labels:
    """Return the labels of one section's spots.

    Parameters
    ----------
    expression
        As the sample sheet names it; see `find_expression`.
    frame
        The slide; of it the slide id and the section are used.
    column
        Of ``obs``.

    Raises
    ------
    ExpressionError
        If the layout holds no columns of spots, or there is no such column (near names are given).
    """
    with find_layout(expression, frame) as (layout, place, own):
        if layout.annotation is None:
            raise ExpressionError(
                f"{expression} is {layout.help}, from which no annotation is read; give an AnnData whose obs holds "
                f"{column!r}"
            )
        return layout.annotation(place, own, column)


def labels_from(obs: Any, column: str, path: Path) -> Labels:
    """Return the labels of a table's rows, which are spots of one section.

    Raises
    ------
    ExpressionError
        If the table has no such column.
    """
    if column not in obs:
        near = get_close_matches(column, map(str, obs.columns), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"obs holds {listed(sorted(map(str, obs.columns))) or 'nothing'}"
        )
        raise ExpressionError(f"{path} has no column {column!r} in obs; {hint}")
    values, gone = obs[column].tolist(), obs[column].isna().tolist()
    barcodes = obs.index.astype(str).tolist()
    return {
        barcode: text
        for barcode, value, missing in zip(barcodes, values, gone, strict=True)
        if not missing and (text := str(value).strip()).lower() not in MISSING
    }
