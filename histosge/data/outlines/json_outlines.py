"""Outlines in JSON: GeoJSON as QuPath writes it (StarDist's and Cellpose's detections, too), and CellViT's two files.

Features are decoded one after another from a part of the text, so that a file of millions of cells is never in memory.

Terms
    QuPath   a FeatureCollection or a list of Features, in level-0 pixels: one cell each; the measurements are not read
    CellViT  ``cells.geojson``, where one MultiPolygon annotation holds all cells of a class, and ``cells.json``, a list of
             contours with the number of each cell's type
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from featurestore.errors import first_line
from featurestore.input_file import shown
from histosge.data.outlines.outline_batch import RawOutline
from histosge.errors import ExpressionError

FIRST_LETTERS = 1 << 20
"""Read at first; twice as many where a feature is longer, so that none is decoded more than a few times."""
MAX_LETTERS = 1 << 30
"""Of one feature. CellViT's largest, of a million cells, have half of it."""
_LIST = re.compile(r'"(features|cells)"\s*:\s*\[')
_GAP = re.compile(r"[\s,]*")
_ERRORS = (ValueError, RecursionError, UnicodeDecodeError, EOFError, OSError)


def read_json_outlines(file: Path) -> Iterator[RawOutline | None]:
    """Yield a file's cells; None for each feature that is no area.

    Raises
    ------
    ExpressionError
        If it is no such JSON, or is damaged.
    """
    with _opened(file) as stream:
        head, items = _items(stream, file)
        types = _type_names(head)
        for item in items:
            if not isinstance(item, dict):
                raise ExpressionError(
                    f"{shown(file)} holds {type(item).__name__} where a cell should be; {_WANTED}"
                )
            if "centroid" in item and "contour" not in item:
                raise ExpressionError(
                    f"{shown(file)} holds centres of cells without outlines, as CellViT's cell_detection.json does; give "
                    "its cells.json or cells.geojson"
                )
            yield from _contour(item, types) if "contour" in item else _feature(item)


_WANTED = "give GeoJSON of QuPath or CellViT, with outlines in level-0 pixels"


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    try:
        # utf-8-sig: some programs begin a file with a mark of the byte order.
        opener: Any = gzip.open if file.suffix.lower() == ".gz" else open
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            yield stream
    except _ERRORS as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(
            f"{shown(file)} cannot be read as GeoJSON: {first_line(error)}; {_WANTED}"
        ) from error


def _items(stream: TextIO, file: Path) -> tuple[str, Iterator[Any]]:
    """Return the text before the list of cells, and its items."""
    text = stream.read(FIRST_LETTERS)
    if text.lstrip().startswith("["):
        return "", _decoded(stream, text, text.index("[") + 1, file)
    while (found := _LIST.search(text)) is None:
        more = stream.read(len(text))
        if not more or len(text) > MAX_LETTERS:
            break
        text += more
    if found is not None and text.lstrip().startswith("{"):
        return text[: found.end()], _decoded(stream, text, found.end(), file)
    # A lone feature, which QuPath writes for one selected object.
    alone = json.loads(text)
    if not isinstance(alone, dict) or alone.get("type") != "Feature":
        raise ExpressionError(f"{shown(file)} holds no list of features or cells; {_WANTED}")
    return "", iter([alone])


def _decoded(stream: TextIO, text: str, start: int, file: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    size = FIRST_LETTERS
    at_end = False
    while True:
        start = _gap_end(text, start)
        if start < len(text) and text[start] == "]":
            return
        try:
            item, start = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # Half a feature ends in an error near the end of what was read, or in a text that does not end.
            is_cut = len(text) - error.pos < 64 or "Unterminated" in error.msg
            if at_end or not is_cut:
                where = (
                    "ends in the middle of a feature" if at_end and is_cut else f"is damaged ({error.msg})"
                )
                raise ExpressionError(f"{shown(file)} {where}; export it again") from error
            if len(text) - start > MAX_LETTERS:
                raise ExpressionError(
                    f"{shown(file)} has a feature of more than {MAX_LETTERS} letters; export one feature for each cell"
                ) from error
            more = stream.read(size)
            at_end = not more
            text, start, size = text[start:] + more, 0, 2 * size
            continue
        size = FIRST_LETTERS
        yield item


def _gap_end(text: str, start: int) -> int:
    found = _GAP.match(text, start)
    return found.end() if found else start


def _type_names(head: str) -> dict[str, str]:
    """Return the names of CellViT's types, which stand before its cells."""
    if '"type_map"' not in head:
        return {}
    document = json.loads(f"{head}]}}")
    types = document.get("type_map") if isinstance(document, dict) else None
    return {str(k): str(v) for k, v in types.items()} if isinstance(types, dict) else {}


def _contour(cell: dict[str, Any], types: dict[str, str]) -> Iterator[RawOutline | None]:
    kind = cell.get("type", "")
    yield RawOutline(_text(cell.get("id")), types.get(str(kind), _text(kind)), [[cell["contour"]]])


def _feature(feature: dict[str, Any]) -> Iterator[RawOutline | None]:
    geometry, properties = feature.get("geometry"), feature.get("properties")
    geometry = geometry if isinstance(geometry, dict) else {}
    shape = geometry.get("type")
    if shape not in ("Polygon", "MultiPolygon"):
        yield None
        return
    coordinates = geometry.get("coordinates")
    identifier, kind, name = _text(feature.get("id")), "", ""
    if isinstance(properties, dict):
        name = _text(properties.get("name"))
        found = properties.get("classification")
        kind = _text(found.get("name")) if isinstance(found, dict) else _text(found)
    coordinates = coordinates if isinstance(coordinates, list) else []
    if shape == "Polygon":
        yield RawOutline(identifier, kind, [coordinates], name)
    elif (
        isinstance(properties, dict) and properties.get("objectType") == "annotation" and len(coordinates) > 1
    ):
        # CellViT's layout: a class, not a cell. A cell of several parts is an object of type cell or detection in QuPath.
        yield from (RawOutline("", kind, [part], name) for part in coordinates)
    else:
        yield RawOutline(identifier, kind, coordinates, name)


def _text(value: Any) -> str:
    """Return a name as one short line of text."""
    text = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    return "".join(letter for letter in text if letter.isprintable())[:200]
