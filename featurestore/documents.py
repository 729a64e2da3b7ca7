"""JSON documents that may come from anybody: parsed once, against a typed schema, with the field in the message.

A document is data that somebody else may have written. Before anything is made of a value, its type and its bounds are
checked here, by a msgspec schema that lies beside the code that uses the document.

Terms
    label  how a document is named in messages: its path or URL, without credentials
"""

import json
import re
from typing import Any, TypeVar

import msgspec

from featurestore.errors import StoreError

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Of one JSON document. A slide's consolidated metadata take about 10 kB; parsed, JSON takes up to ten times its bytes."""
_SHOWN = 60
"""Letters of a refused value that a message shows."""
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class DocumentError(StoreError):
    """A document that is no JSON, is too large, or holds a value that its schema does not admit."""


def parse_json(data: bytes | str, label: str) -> Any:
    """Return the value of a JSON document.

    Raises
    ------
    DocumentError
        If it is too large, nested too deeply, no JSON, or names a key twice.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentError(
            f"{label} has {len(data)} bytes, more than the {MAX_DOCUMENT_BYTES} that a document may have"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Parsers differ in which of two values they take, so what was checked might not be what is used.
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DocumentError(f"{label} is damaged: it names {_shown(twice)} twice")
        return found

    try:
        # The standard library's parser, not msgspec's: zarr-python writes NaN into attributes, which is no JSON.
        return json.loads(data, object_pairs_hook=unique)
    except RecursionError as error:
        raise DocumentError(f"{label} is damaged: it is nested too deeply") from error
    except DocumentError:
        raise
    except ValueError as error:  # of JSON, of UTF-8, or a number of more than 4,300 digits
        raise DocumentError(f"{label} is damaged: {' '.join(str(error).split())}") from error


def convert(value: Any, schema: type[T], label: str, *, at: str = "") -> T:
    """Return a parsed document as its schema's type; fields that the schema does not name are left out.

    Parameters
    ----------
    value
        From `parse_json`, or a part of it.
    schema
        A msgspec.Struct.
    label, at
        The document, and the part of it that `value` is, for messages.

    Raises
    ------
    DocumentError
        Naming the field and its value.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        field, found = _follow(value, path.strip("`").removeprefix("$"))
        field = ".".join(part for part in (at, field) if part).replace(".[", "[")
        raise DocumentError(
            f"{label} is damaged: {field or 'the document'} is {_shown(found)}: "
            f"{what[:1].lower()}{what[1:].replace('`', '')}"
        ) from error
    except RecursionError as error:
        raise DocumentError(f"{label} is damaged: {at or 'it'} is nested too deeply") from error


def _follow(value: Any, path: str) -> tuple[str, Any]:
    """Return the field that msgspec names, and what stands there; of a mapping msgspec does not say which entry."""
    for match in _STEP.finditer(path):
        name, index = match.groups()
        try:
            value = value[int(index)] if index else value[name]
        except (LookupError, TypeError, ValueError):
            break
    return path.removeprefix("."), value


def _shown(value: Any) -> str:
    """Return a value for a message: one line, not long, without control characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
