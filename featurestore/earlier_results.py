"""Whether an earlier result may be replaced: the same again is nothing to do, a different one is refused.

A result that takes long to make records what it was made with: settings, and fingerprints of its inputs, as JSON; such
records are compared before the work (`is_same_result`). A file in another tool's format has no place for a record: it is
written beside the earlier one and compared with it, byte for byte (`staged_result`). A record stands in a model's
``config.json`` and in a page's ``<meta name="record">``.

Terms
    made_with  the record: name -> JSON value, at most two levels deep
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurestore.errors import EarlierResultError
from featurestore.whole_file import partial_place, put_in_place

MadeWith = Mapping[str, Any]
SHOWN_DIFFERENCES = 3
"""Differences that a message names; the others are counted. One more would not fit on a line."""
SHOWN_LETTERS = 60
_UUID = re.compile(rb"urn:uuid:[0-9a-f-]{36}")
SAMPLE_BYTES = 1 << 20
"""Bytes hashed at each end of a file, as for slides: whole files of many GB would cost more than reading them."""
FINGERPRINT_LETTERS = 16
"""64 bits: readable in a message, and two inputs of one user never share them by chance."""


def is_same_result(what: str | Path, earlier: MadeWith | None, wanted: MadeWith, *, overwrite: bool) -> bool:
    """Tell whether an earlier result is the one that is wanted, so that there is nothing to do.

    Parameters
    ----------
    what
        The earlier result, for messages: its path.
    earlier
        What it was made with; None if it does not say.
    wanted
        What this run would make it with.
    overwrite
        Make it again whatever it is.

    Raises
    ------
    EarlierResultError
        If it was made with something else, or does not say with what, and `overwrite` is not set.
    """
    if overwrite:
        return False
    if earlier is None:
        raise EarlierResultError(
            f"{what} does not record what it was made with (an older version or another program wrote it), so it "
            "cannot be compared; give another path, or replace it with --overwrite"
        )
    changed = list(_differences(earlier, wanted))
    if not changed:
        return True
    more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
    raise EarlierResultError(
        f"{what} was made with {', '.join(changed[:SHOWN_DIFFERENCES])}{more}; give another path, or replace it with "
        "--overwrite"
    )


def _differences(earlier: MadeWith, wanted: MadeWith) -> Iterator[str]:
    """Yield what differs, as text with both values."""
    # Through JSON, which knows no tuples, as the earlier one went.
    old, new = dict(_flat(earlier)), dict(_flat(json.loads(json.dumps(wanted))))
    # In the order of the new record: settings stand first in it, the many sections last.
    for name in (*new, *(name for name in old if name not in new)):
        if name not in old:
            yield f"no {name} (now {_brief(new[name])})"
        elif name not in new:
            yield f"{name} {_brief(old[name])} (now none)"
        elif old[name] != new[name]:
            yield f"{name} {_brief(old[name], new[name])} (now {_brief(new[name], old[name])})"


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _brief(value: object, other: object = None) -> str:
    """Return a value on one line, of a long one its beginning, told apart from the `other` by a digest."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    if len(text) <= SHOWN_LETTERS:
        return text or "''"
    digest = "" if other is None else f" ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
    return f"{text[:SHOWN_LETTERS]}...{digest}"


def short_fingerprint(text: str) -> str:
    """Return a fingerprint's first letters, or those of the hash of a longer text."""
    return text if len(text) <= FINGERPRINT_LETTERS else hashlib.sha256(text.encode()).hexdigest()[:16]


def content_fingerprint(path: str | Path) -> str:
    """Return a short fingerprint of a file, or of all files below a folder, that does not depend on times.

    Of each file the size and both ends are hashed, `SAMPLE_BYTES` each.

    Raises
    ------
    OSError
        If something cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in _files_below(path):
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode(errors="surrogateescape"))
            _hash_file(file, digest)
    else:
        _hash_file(path, digest)
    return digest.hexdigest()[:FINGERPRINT_LETTERS]


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()  # in place: the walk goes on in this order, whatever the file system's
        # Files of desktop programs come and go by themselves.
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _hash_file(file: Path, digest: "hashlib._Hash") -> None:
    # A pipe would wait for ever, and a broken link is no content.
    if not file.is_file():
        return
    size = file.stat().st_size
    digest.update(f"{size}\n".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(SAMPLE_BYTES))
        if size > SAMPLE_BYTES:
            stream.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))


@dataclass
class StagedResult:
    """A result that is being written.

    Parameters
    ----------
    path
        Where to write it: a place of the same name beside the final one.
    was_there
        After the block: whether the earlier result has the same content, so that it was left as it is.
    """

    path: Path
    was_there: bool = False


@contextmanager
def staged_result(path: Path, *, overwrite: bool) -> Iterator[StagedResult]:
    """Write a file or a folder, and put it in its place when it is complete and may stand there.

    Raises
    ------
    EarlierResultError
        If something of other content is there, and `overwrite` is not set; it is left as it is.
    """
    with partial_place(path) as place:
        staged = StagedResult(place)
        yield staged
        staged.was_there = check_content(place, path, overwrite=overwrite)
        if not staged.was_there:
            put_in_place(place, path)


def check_content(new: Path, path: Path, *, overwrite: bool) -> bool:
    """Tell whether what is at a path has the content of a new file or folder already.

    Raises
    ------
    EarlierResultError
        If something of other content is there, and `overwrite` is not set.
    """
    if not path.is_file() and not (path.is_dir() and any(path.iterdir())):
        return False
    if has_same_content(new, path):
        return True
    if not overwrite:
        raise EarlierResultError(
            f"{path} is there with other content, made from something else or with other settings; give another path, "
            "or replace it with --overwrite"
        )
    return False


def has_same_content(one: Path, other: Path) -> bool:
    """Tell whether two files, or all files below two folders, have the same bytes; identifiers of OME-TIFF aside."""
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return one.stat().st_size == other.stat().st_size and _content(one) == _content(other)
    names = [{str(file.relative_to(top)) for file in _files_below(top)} for top in (one, other)]
    return names[0] == names[1] and all(has_same_content(one / name, other / name) for name in names[0])


def _content(file: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        first = True
        while data := stream.read(1 << 24):
            # Drawn at random for every OME-TIFF; it stands in the description, which is written first.
            digest.update(_UUID.sub(b"", data) if first and file.suffix in (".tif", ".tiff") else data)
            first = False
    return digest.hexdigest()
