"""Which section of a file with several: the one that the sheet names, or the one with the slide's id.

A file of several sections is named by several rows of a sheet, and each row must get its own. ``FILE#NAME`` in the
column `expression` names one; without it the slide id does.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from featurestore.input_file import kind_of, shown
from featurestore.slides.sample_sheet import name_slide
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.errors import ExpressionError

MARK = "#"
"""Between a file and the name of a section in it."""
EVERYTHING = "*"
"""In place of a section's name: all spots, whatever columns the file has."""
_LISTED = 12


def split_section(place: str) -> tuple[str, str | None]:
    """Return a path, and the section that is named behind it; None if none is."""
    # A file whose own name holds the mark is that file.
    if MARK not in place or ("://" not in place and kind_of(place) is not None):
        return place, None
    path, _, section = place.rpartition(MARK)
    return path, section or None


def is_named(name: str, frame: SlideFrame) -> bool:
    """Tell whether a name in a file is the row's: the one the sheet gives, or its slide id."""
    if frame.section is not None:
        return name == frame.section
    # The slide id was made fit for a store; the same must be done to the file's name.
    return name == frame.slide_id or name_slide(name) == frame.slide_id


def choose_section(names: Sequence[str], frame: SlideFrame, path: Path, what: str) -> str:
    """Return the one of a file's sections that the row means; a single one is taken whatever it is called.

    Parameters
    ----------
    names
        Of the file's sections, each once.
    what
        What they are in this layout, for the message, such as ``libraries``.

    Raises
    ------
    ExpressionError
        If none is named like the row, with a list of all.
    """
    if len(names) == 1 and frame.section is None:
        return names[0]
    found = [name for name in names if is_named(name, frame)]
    # Two names may become one slide id ("A 1", "A_1"): then the exact one is meant.
    exact = [name for name in found if name == (frame.section or frame.slide_id)] or found
    if len(exact) == 1:
        return exact[0]
    raise no_such_section(names, frame, path, what)


def no_such_section(names: Sequence[str], frame: SlideFrame, path: Path, what: str) -> ExpressionError:
    """Return the refusal of a file whose sections are not called like the row, with their list."""
    wanted = frame.section or frame.slide_id
    number = f"{len(names)} sections" if len(names) != 1 else "one section"
    return ExpressionError(
        f"{shown(path)} holds {number} ({what}: {listed(names)}), and none is {wanted!r}; name the row's in the "
        f"sheet's expression column, such as {path.name}{MARK}{names[0]}, or make it the row's slide_id"
    )


def listed(names: Iterable[str]) -> str:
    """Return names for a message; of many, the first and a count."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name[:60] for name in names[:_LISTED]) + more
