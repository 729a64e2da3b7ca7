"""What a layout of measured expression declares, and the registry of all of them.

A layout is one module with a `RECORD`: in our folder ``layouts``, or in any installed package that names its record
under the entry-point group ``histosge.expression_layouts``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from featurestore.extensions import Registry
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.expression.molecules import Molecules
from histosge.errors import ExpressionError


@dataclass(frozen=True)
class ExpressionLayout:
    """One way in which files hold the expression of a section.

    Parameters
    ----------
    name
        A short one, as other packages register it.
    help
        A noun phrase with its article, such as ``a Xenium output folder``: error messages list these.
    recognises
        Tells whether a path, which exists, holds this layout. It is called on files of every kind, so it should look
        at names and first lines only, and return False for what it cannot read.
    read
        Reads the spots, or raises `ExpressionError` with one line: what is wrong, and how to correct it.
        `histosge.data.expression.loaded_expression.make_spots` checks and assembles them.
    order
        Layouts are tried in this order, lowest first. Ours stand at 10 to 50. Anything below 10 is tried before them.
    has_sections
        One file may hold several sections: `read` goes by `SlideFrame.section` and the slide id
        (`histosge.data.expression.section_choice`). Otherwise ``FILE#NAME`` is refused.
    annotation
        Returns barcode -> label of a named column, see `histosge.data.expression.annotation`; None for files that hold
        no columns of spots.
    molecules
        Returns where single molecules are, see `histosge.data.expression.molecules`; it returns None for a folder without
        them. Those who evaluate with ``--at`` count them in squares of any side.
    """

    name: str
    help: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, SlideFrame], LoadedExpression]
    order: int = 60  # after ours, so that another package takes nothing from them unless it says so
    has_sections: bool = False
    annotation: Callable[[Path, SlideFrame, str], Mapping[str, str]] | None = None
    molecules: Callable[[Path, SlideFrame], Molecules | None] | None = None


# Filled when it is first used: a layout's module imports this one.
LAYOUTS: Registry[ExpressionLayout] = Registry(
    "expression_layouts", "histosge.data.expression.layouts", ExpressionLayout, ExpressionError
)
