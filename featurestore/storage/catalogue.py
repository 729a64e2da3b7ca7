"""What a store holds: one row per slide, grid and encoder, as a polars frame.

Done blocks are counted from one listing of each slide. Failure records are shown, and decide nothing.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import polars as pl

from featurestore.blocks import planned_blocks
from featurestore.documents import DocumentError, convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.location import Entry, Location, PathOrUrl
from featurestore.names import is_segment
from featurestore.storage.layout import EMBEDDING, QUALITY, SPOTS, chunk_index, grid_path
from featurestore.storage.quality_array import read_quality
from featurestore.storage.spots import spot_state
from featurestore.storage.store import Store
from featurestore.storage.stored_documents import (
    EncoderAttrs,
    SlideAttrs,
    check_bounds,
    check_on_grid,
    parse_grid,
)
from featurestore.storage.zarr_metadata import (
    array_from_document,
    document_label,
    documents_below,
    read_values,
)
from featurestore.tissue.flags import flag_shares, shares_text
from featurestore.tissue.threshold import is_tissue
from featurestore.zarr_documents import ArrayDocument, GroupDocument, check_node

Schema = TypeVar("Schema")

SCHEMA: dict[str, Any] = {
    "slide": pl.String,
    "grid": pl.String,
    "encoder": pl.String,
    "state": pl.String,
    "done": pl.Int64,
    "planned": pl.Int64,
    "patches": pl.Int64,
    "bytes": pl.Int64,
    "unreadable": pl.Int64,
    "reason": pl.String,
    "fingerprint": pl.String,
    "source": pl.String,
    "modified": pl.Datetime("us", "UTC"),
    "flags": pl.String,
}


def catalogue(url: PathOrUrl) -> pl.DataFrame:
    """List a store.

    Parameters
    ----------
    url
        Folder or URL.

    Returns
    -------
    polars.DataFrame
        Columns as in `SCHEMA`. `state` is ``done``, ``partial`` or ``failed``; `done` and `planned` count blocks;
        `patches` counts tissue patches, and `unreadable` those without a vector; `reason` is why the first of them
        has none; `modified` is when the last block was written (UTC); `flags` the
        shares of the tissue patches with quality flags, such as ``pen 12%, blur 3%``; None of a grid without flags.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no store at `url`.
    """
    return pl.DataFrame(list(_rows(Store.open(url))), schema=SCHEMA)


def _rows(store: Store) -> Iterator[dict[str, Any]]:
    known = set(store.slide_ids())
    slides_failed, blocks_failed = store.failures()
    for slide_id in sorted(known | set(slides_failed)):
        try:
            rows = list(_slide_rows(store, slide_id, blocks_failed)) if slide_id in known else []
        except DocumentError as error:
            # One damaged slide must not hide the others; `validate` says more of it.
            rows = [_row(slide=slide_id, state="failed", reason=str(error))]
        # Both: a slide that could not be opened in the last run may hold blocks of an earlier one.
        if slide_id in slides_failed:
            yield _row(slide=slide_id, state="failed", reason=slides_failed[slide_id])
            rows = [row for row in rows if row["grid"] or row["reason"]]
        yield from rows


def _slide_rows(store: Store, slide_id: str, blocks_failed: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a slide: it costs one listing, the slide's document, and tissue and flags of each grid."""
    entries = store.location.entries(slide_id)
    documents = _Documents(store.location, slide_id, entries)
    if "zarr.json" not in entries:
        return  # a folder of another program
    slide = documents.attributes("", "slide", SlideAttrs)
    empty = True
    # From the listing of the whole slide: to list its folders one by one would cost a request for each.
    for grid_key in sorted({name.split("/")[0] for name in entries if name.count("/") >= 2}):
        grid_attrs = documents.read(grid_key)
        if grid_key.startswith(SPOTS):
            for row in _spot_rows(store, slide_id, grid_key, slide.source):
                empty = False
                yield row
            continue
        if not is_segment(grid_key) or grid_attrs is None or not (grid_attrs.attributes or {}).get("grid"):
            continue
        label = f"{store.location.label}/{slide_id}/{grid_key}"
        grid = parse_grid((grid_attrs.attributes or {})["grid"], f"{label}/zarr.json")
        at = f"{slide_id}/{grid_key}/tissue"
        shares = array_from_document(store.location, at, documents.raw(f"{grid_key}/tissue"))
        tissue = is_tissue(read_values(shares, f"{store.location.label}/{at}", grid.shape))
        flags = None
        if f"{grid_key}/{QUALITY}/zarr.json" in entries:
            document = documents.raw(f"{grid_key}/{QUALITY}")
            quality = read_quality(store.location, grid_path(slide_id, grid_key), grid.shape, document)
            flags = None if quality is None else shares_text(flag_shares(quality, tissue))
        ends = f"/{EMBEDDING}/zarr.json"
        slugs = [
            name.split("/")[1] for name in entries if name.startswith(f"{grid_key}/") and name.endswith(ends)
        ]
        for encoder_slug in sorted(filter(is_segment, slugs)):
            path = f"{grid_key}/{encoder_slug}/{EMBEDDING}"
            array = documents.read(path)
            if not isinstance(array, ArrayDocument):
                raise DocumentError(f"{label}/{encoder_slug}/{EMBEDDING} is damaged: it is no array")
            encoder = documents.attributes(path, "encoder", EncoderAttrs)
            block_shape = _block_shape(array, f"{label}/{encoder_slug}/{EMBEDDING}", grid)
            chunks = {
                index: entry
                for name, entry in entries.items()
                if name.startswith(f"{path}/c/") and (index := chunk_index(name.removeprefix(f"{path}/")))
            }
            planned = {block.index for block in planned_blocks(tissue, block_shape)}
            # Objects of blocks without tissue do not count as done; `validate` reports them.
            done = len(planned & {(row, col) for row, col, _ in chunks})
            unreadable, reason = _failure_summary(
                store, blocks_failed.get(f"{slide_id}/{grid_key}/{encoder_slug}", [])
            )
            identity = EncoderIdentity(encoder.key, encoder.dim, encoder.facts)
            empty = False
            yield _row(
                slide=slide_id,
                grid=grid_key,
                encoder=identity.key,
                state="done" if done == len(planned) else "partial",
                done=done,
                planned=len(planned),
                patches=int(tissue.sum()),
                bytes=sum(entry.size for entry in chunks.values()),
                unreadable=unreadable,
                reason=reason,
                fingerprint=identity.fingerprint,
                source=slide.source,
                modified=max((e.modified for e in chunks.values() if e.modified), default=None),
                flags=flags,
            )
    if empty:
        yield _row(slide=slide_id, state="partial", source=slide.source)


def _spot_rows(store: Store, slide_id: str, key: str, source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of patches that are on no grid; `done` and `planned` count objects."""
    if not is_segment(key):
        return
    for encoder_slug in store.encoder_slugs(slide_id, key):
        done, planned, patches, size = spot_state(store.location, slide_id, key, encoder_slug)
        identity = store.identity(slide_id, key, encoder_slug)
        yield _row(
            slide=slide_id,
            grid=key,
            encoder=identity.key,
            state="done" if done == planned else "partial",
            done=done,
            planned=planned,
            patches=patches,
            bytes=size,
            unreadable=0,
            fingerprint=identity.fingerprint,
            source=source,
        )


class _Documents:
    """The documents of a slide, from the consolidated ones where these have them."""

    def __init__(self, location: Location, slide_id: str, entries: dict[str, Entry]) -> None:
        self._location, self._slide_id, self._entries = location, slide_id, entries
        # Read once: a request costs more than all else of a row.
        own = location.read_json(f"{slide_id}/zarr.json")
        below = {} if own is None else documents_below(own, document_label(location, slide_id))
        self._consolidated = below if own is None else {"": own, **below}

    def read(self, path: str) -> ArrayDocument | GroupDocument | None:
        """Return a group or array below the slide, or the slide itself; None where there is none."""
        if f"{path}/zarr.json" not in self._entries and path:
            return None
        whole = f"{self._slide_id}/{path}" if path else self._slide_id
        document = self._json(path)
        return None if document is None else check_node(document, document_label(self._location, whole))

    def raw(self, path: str) -> dict[str, Any]:
        """Return the document of an array below the slide as it is stored.

        Raises
        ------
        StoreError
            If there is none.
        """
        document = self._json(path)
        if document is None:
            raise StoreError(f"{self._location.label}/{self._slide_id} holds no array {path}")
        return document

    def _json(self, path: str) -> dict[str, Any] | None:
        whole = f"{self._slide_id}/{path}" if path else self._slide_id
        return self._consolidated.get(path) or self._location.read_json(f"{whole}/zarr.json")

    def attributes(self, path: str, name: str, schema: type[Schema]) -> Schema:
        """Return one of a node's attributes, typed."""
        whole = f"{self._slide_id}/{path}" if path else self._slide_id
        node = self.read(path)
        found = (node.attributes if node else None) or {}
        return convert(
            found.get(name), schema, document_label(self._location, whole), at=f"attributes.{name}"
        )


def _block_shape(array: ArrayDocument, label: str, grid: PatchGrid) -> tuple[int, int]:
    """Return the patches of one object, ``(rows, cols)``, of an array that is not opened."""
    chunks = tuple(array.chunk_grid.configuration.chunk_shape)
    # Half precision: the bound on an object's bytes need not be exact.
    check_bounds(label, tuple(array.shape), chunks, np.dtype(np.float16))
    check_on_grid(label, tuple(array.shape), grid)
    return chunks[0], chunks[1]


def _failure_summary(store: Store, paths: list[str]) -> tuple[int, str | None]:
    """Return how many patches of some blocks have no vector, and why the first of them has none."""
    records = [store.failure_record(path) for path in paths]
    reason = next((str(record.reason) for record in records if record.reason), None)
    return sum(len(record.patches) for record in records), reason


def _row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA), **values}
