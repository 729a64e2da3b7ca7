"""Read measured expression in whatever layout it has: the first registered layout that recognises the path."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from featurestore.credentials import strip_credentials
from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.input_file import kind_of, shown
from featurestore.slides.download_cache import fetch, is_remote
from histosge.data.expression.expression_layout import LAYOUTS, ExpressionLayout
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.expression.molecules import Molecules
from histosge.data.expression.section_choice import MARK, listed, split_section
from histosge.data.sections import Spots
from histosge.errors import ExpressionError


def find_expression(path: str | Path, frame: SlideFrame) -> LoadedExpression:
    """Read the spots of one section, and describe what was found.

    Parameters
    ----------
    path
        In one of the registered layouts, see `known_layouts`; of a run's folder also the parent that holds ``outs/``.
        ``FILE#NAME`` names one section of a file with several. A URL of one file is fetched.
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
        If it cannot be read, has no coordinates, does not hold raw counts, or holds several sections of which none
        is named.
    """
    with find_layout(path, frame) as (layout, place, own):
        return layout.read(place, own)


@contextmanager
def find_layout(path: str | Path, frame: SlideFrame) -> Iterator[tuple[ExpressionLayout, Path, SlideFrame]]:
    """Yield the layout of an expression, where it is on this machine, and the frame with the section that is named.

    Raises
    ------
    ExpressionError
        See `find_expression`; of a URL, messages raised inside name the URL and not the local copy.
    """
    text, section = split_section(str(path).removeprefix("file://"))
    if section is not None:
        frame = replace(frame, section=section)
    place = _local(text)
    kind = kind_of(place)
    if kind is None:
        raise ExpressionError(f"there is no expression at {shown(text)}; give {known_layouts()}")
    if kind == "other":
        raise ExpressionError(f"{shown(text)} is a pipe or a device, no file; give {known_layouts()}")
    layout = _recognise(place)
    if layout is None:
        raise ExpressionError(
            f"{shown(text)} is none of the layouts that are read here; {_sections_below(place)}give {known_layouts()}"
        )
    if frame.section is not None and not layout.has_sections:
        raise ExpressionError(
            f"{shown(text)} is {layout.help}, of one section; leave out {MARK}{frame.section}"
        )
    if not is_remote(text):
        yield layout, place, frame
        return
    try:
        yield layout, place, frame
    except ExpressionError as error:
        # The copy's name says nothing to the user, and is another one tomorrow.
        label = strip_credentials(text)
        message = str(error).replace(str(place), label).replace(place.name, label)
        raise ExpressionError(message) from error


def read_expression(path: str | Path, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    """Read only the spots of one section; see `find_expression`."""
    return find_expression(path, SlideFrame(slide_id, donor, slide_mpp)).spots


def find_molecules(path: str | Path, frame: SlideFrame) -> Molecules | None:
    """Return the single molecules of a section; None where its layout or its folder has none.

    Parameters
    ----------
    path, frame
        See `find_expression`.

    Raises
    ------
    ExpressionError
        If their file cannot be used.
    """
    with find_layout(path, frame) as (layout, place, own):
        return None if layout.molecules is None else layout.molecules(place, own)


def known_layouts() -> str:
    """Return the help lines of all layouts as one phrase: "a, b or c"."""
    *first, last = (layout.help for layout in _in_order())
    return f"{', '.join(first)} or {last}" if first else last


def _in_order() -> list[ExpressionLayout]:
    return sorted(LAYOUTS.records(), key=lambda layout: layout.order)


def _recognise(place: Path) -> ExpressionLayout | None:
    try:
        # The first one decides: a file that it recognises and cannot read is refused with its reason.
        return next((layout for layout in _in_order() if layout.recognises(place)), None)
    except OSError as error:
        raise ExpressionError(f"{shown(place)} cannot be read: {error.strerror or error}") from error


def _local(place: str) -> Path:
    """Return a path on this machine: what is behind a URL is fetched."""
    if not is_remote(place):
        return Path(place)
    label = strip_credentials(place)
    # A folder, or one file of several that belong together.
    if Path(label).suffix.lower() in ("", ".zarr", ".h5", ".json", ".parquet", ".xenium"):
        raise ExpressionError(
            f"{label} is not read from a URL, of which single files are fetched; copy the whole output folder to this "
            "machine, or give the URL of an .h5ad"
        )
    try:
        return fetch(place)
    except SlideNotFoundError as error:
        raise ExpressionError(f"there is no expression at {label}; give the URL of an .h5ad") from error
    except SlideError as error:
        raise ExpressionError(f"{error}; check the URL and your access to it") from error


def _sections_below(place: Path) -> str:
    """Return what in a folder is read as a section, as the first half of a fix."""
    if kind_of(place) != "folder":
        return ""
    children = [child for child in sorted(place.iterdir()) if kind_of(child) in ("folder", "file")]
    # A few hundred at most: a folder of ten thousand patients is not searched for a hint.
    found = [child.name for child in children[:200] if _recognise(child) is not None]
    return f"in it are {listed(found)}, name the section's own; or " if found else ""
