"""Records of what could not be read, under ``_failures``: for diagnosis alone.

No decision depends on them, so that a damaged or a missing record changes nothing that is computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from featurestore.credentials import redact
from featurestore.documents import DocumentError, convert
from featurestore.location import Location
from featurestore.names import check_segment, is_segment
from featurestore.storage.layout import FAILURES, failure_path
from featurestore.storage.private_text import remove_names
from featurestore.storage.stored_documents import FailureRecord

MAX_REASON = 2000
"""Letters that are shown of why something failed."""


def write(location: Location, path: str, reason: dict[str, Any], private_files: Sequence[str] | None) -> None:
    """Write a record, without credentials.

    Parameters
    ----------
    private_files
        Files whose names are kept out of the reason; None for a store that may hold names of files.
    """
    record = {key: redact(value) if isinstance(value, str) else value for key, value in reason.items()}
    if private_files is not None and isinstance(text := record.get("reason"), str):
        record["reason"] = remove_names(text, private_files, [str(record.get("slide_id", ""))])
    location.write_json(path, record)


def list_all(location: Location) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return slide id -> reason, and ``slide/grid/encoder`` -> paths of the records of its blocks; one listing."""
    blocks: dict[str, list[str]] = {}
    slides: list[str] = []
    for name in sorted(location.sizes(FAILURES)):
        embedding, slash, _ = name.rpartition("/")
        if slash:
            blocks.setdefault(embedding, []).append(f"{FAILURES}/{name}")
        elif is_segment(name.removesuffix(".json")):
            slides.append(name.removesuffix(".json"))
    return {name: str(read(location, failure_path(name)).reason) for name in slides}, blocks


def read(location: Location, path: str) -> FailureRecord:
    """Read a record. One that is damaged gives its own damage as the reason."""
    # Records decide nothing, so none of them may stop what the blocks themselves decide.
    try:
        found = convert(location.read_json(path) or {}, FailureRecord, f"{location.label}/{path}")
    except DocumentError as error:
        return FailureRecord(str(error))
    # One line, without characters that a terminal would obey.
    reason = "".join(c if c.isprintable() else " " for c in str(found.reason))[:MAX_REASON]
    return FailureRecord(" ".join(reason.split()), found.block, found.patches)


def of_blocks(location: Location, slide_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(path below the slide's failures, record)`` of every block of a slide with unreadable patches."""
    base = f"{FAILURES}/{check_segment(slide_id, 'slide id')}"
    if not location.exists(base):
        return
    for name in sorted(location.sizes(base)):
        # Only records that name a block: what else may lie there is no record of ours.
        if name.count("/") == 2 and read(location, f"{base}/{name}").block is not None:
            yield name.removesuffix(".json"), location.read_json(f"{base}/{name}") or {}
