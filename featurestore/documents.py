"""JSON documents that may come from anybody: parsed once, against a typed schema, with the field in the message.

A document is data that somebody else may have written. Before anything is made of a value, its type and its bounds are
checked here, by a msgspec schema that lies beside the code that uses the document.

Terms
    label  how a document is named in messages: its path or URL, without credentials
"""

import json
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from featurestore.errors import StoreError, shorten

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 64 * 2**20
"""Of one JSON document. A slide's consolidated metadata take about 10 kB; parsed, JSON takes up to ten times its bytes."""
MAX_DEPTH = 100
"""Levels of nesting; metadata consolidated in a slide's document have about 12."""
_SHOWN = 60
"""Letters of a refused value that a message shows."""
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class DocumentError(StoreError):
    """A document that is no JSON, is too large, or holds a value that its schema does not admit."""


def check_file(file: Path, label: str, most_bytes: int | None = MAX_DOCUMENT_BYTES) -> None:
    """Refuse a local file that must not be opened: a fifo waits for ever for somebody to write.

    Parameters
    ----------
    most_bytes
        That it may have; None for any number.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    DocumentError
        If it is no file, or too large.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DocumentError(f"{label} is no file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise DocumentError(
            f"{label} has {found.st_size} bytes, more than the {most_bytes} that a document may have"
        )


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
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # The standard library's parser, not msgspec's: zarr-python writes NaN into attributes, which is no JSON.
        return _checked(json.loads(text, object_pairs_hook=unique), text, label)
    except RecursionError as error:
        raise DocumentError(f"{label} is damaged: it is nested too deeply") from error
    except DocumentError:
        raise
    except ValueError as error:  # of JSON, of UTF-8, or a number of more than 4,300 digits
        raise DocumentError(f"{label} is damaged: {' '.join(str(error).split())}") from error


def _checked(value: Any, text: str, label: str) -> Any:
    """Refuse what parses, and stops what is done with it later: deep nesting, and text that no encoding can write."""
    waiting = [(value, 1)]
    while waiting:
        found, depth = waiting.pop()
        # Well below Python's limit of 1,000 calls: code that goes through a value starts somewhere in the stack.
        if depth > MAX_DEPTH:
            raise DocumentError(f"{label} is damaged: it is nested too deeply")
        inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
        waiting += [(part, depth + 1) for part in inner if isinstance(part, (dict, list))]
    # Half of a surrogate pair can only be written as an escape, so most documents need no second look.
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{label} is damaged: it holds half of a surrogate pair, which is no text"
            ) from error
    return value


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
        text = str(error)
        # From the end: what msgspec says may repeat a value that holds the same words.
        what, path = text.rsplit(" - at ", 1) if " - at " in text else (text, "")
        field, found = _follow(value, path.strip("`").removeprefix("$"))
        field = ".".join(part for part in (at, field) if part).replace(".[", "[")
        raise DocumentError(
            f"{label} is damaged: {field or 'the document'} is {_shown(found)}: "
            f"{shorten(what[:1].lower() + what[1:].replace('`', ''))}"
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
