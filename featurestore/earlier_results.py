"""Whether an earlier result may be replaced: the same again is nothing to do, a different one is refused.

Every result that a command writes records what it was made with: settings, and fingerprints of its inputs, as JSON. This
module compares such records. Where they stand is the business of each kind of result: a model's ``config.json``, an
evaluation's ``evaluation.json``, a page's ``<meta>``, a table's metadata.

Terms
    made_with  the record: name -> JSON value, at most two levels deep
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featurestore.errors import EarlierResultError

MadeWith = Mapping[str, Any]
SHOWN_DIFFERENCES = 3
"""Differences that a message names; the others are counted. One more would not fit on a line."""
SHOWN_LETTERS = 60
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
