"""Which slides of a store have one fingerprint.

A store has no list of them: plain zarr would warn of a folder that is no part of the hierarchy. Each slide's document is
read once, some at a time, and only the fingerprint is kept of it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from featurestore.documents import MAX_DOCUMENT_BYTES
from featurestore.server_errors import ABSENT
from featurestore.storage.store import Store

THREADS = 32
"""Documents read at once: of a store behind a URL each is a request, of which an object store answers any number."""


class _Slide(msgspec.Struct):
    fingerprint: str = ""


class _Attributes(msgspec.Struct):
    slide: _Slide = msgspec.field(default_factory=_Slide)


class _Document(msgspec.Struct):
    attributes: _Attributes = msgspec.field(default_factory=_Attributes)


class FingerprintIndex:
    """The fingerprints of a store's slides, as they are when it is made.

    Parameters
    ----------
    store
        All of its slides are looked at: 10,000 take seconds.
    """

    def __init__(self, store: Store) -> None:
        self._ids: dict[str, list[str]] = {}
        for slide_id, fingerprint in fingerprints(store):
            self._ids.setdefault(fingerprint, []).append(slide_id)

    def holds(self, slide_id: str, fingerprint: str) -> bool:
        """Tell whether the store holds a slide of this id and fingerprint."""
        return slide_id in self._ids.get(fingerprint, ())

    def other_id(self, slide_id: str, fingerprint: str) -> str | None:
        """Return the id under which the store holds a slide of this fingerprint, other than the one given."""
        return next((other for other in self._ids.get(fingerprint, ()) if other != slide_id), None)


def fingerprints(store: Store) -> Iterator[tuple[str, str]]:
    """Yield the id and the fingerprint of each slide of a store; slides whose document is damaged are left out."""

    def read(slide_id: str) -> str:
        # Not `Store.slide`: to check ten thousand whole documents takes longer than to read them.
        try:
            data = store.location.read_bytes(f"{slide_id}/zarr.json")
            return _decode(data) if len(data) <= MAX_DOCUMENT_BYTES else ""
        except ABSENT:  # removed since the listing
            return ""

    ids = store.slide_ids()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fingerprints") as threads:
        for slide_id, fingerprint in zip(ids, threads.map(read, ids), strict=True):
            if fingerprint:
                yield slide_id, fingerprint


def _decode(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Document).attributes.slide.fingerprint
    except (msgspec.MsgspecError, ValueError):
        return ""
