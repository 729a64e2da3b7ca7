"""What a store holds: one row per slide, grid and encoder, as a polars frame.

Done blocks are counted from one listing of each slide. Failure records are shown, and decide nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from featurestore.blocks import planned_blocks
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.location import Entry, PathOrUrl
from featurestore.storage.layout import EMBEDDING, SPOTS, chunk_index
from featurestore.storage.spots import spot_state
from featurestore.storage.store import Store
from featurestore.tissue.threshold import is_tissue

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
        has none; `modified` is when the last block was written (UTC).

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
        rows = list(_slide_rows(store, slide_id, blocks_failed)) if slide_id in known else []
        # Both: a slide that could not be opened in the last run may hold blocks of an earlier one.
        if slide_id in slides_failed:
            yield _row(slide=slide_id, state="failed", reason=slides_failed[slide_id])
        yield from rows
        if not rows and slide_id not in slides_failed:
            yield _row(slide=slide_id, state="partial", source=store.slide(slide_id).source)


def _slide_rows(store: Store, slide_id: str, blocks_failed: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a slide: it costs one listing, the slide's document, and the tissue of each grid."""
    entries = store.location.entries(slide_id)
    documents = _documents(store, slide_id, entries)
    attrs = documents(f"{slide_id}/zarr.json")["attributes"]
    # From the listing of the whole slide: to list its folders one by one would cost a request for each.
    for grid_key in sorted({name.split("/")[0] for name in entries if name.count("/") >= 2}):
        grid_attrs = documents(f"{slide_id}/{grid_key}/zarr.json").get("attributes", {})
        if grid_key.startswith(SPOTS) and grid_attrs.get("spots"):
            yield from _spot_rows(store, slide_id, grid_key, attrs["slide"]["source"])
        if not grid_attrs.get("grid"):
            continue
        tissue = is_tissue(store.tissue(slide_id, grid_key))
        ends = f"/{EMBEDDING}/zarr.json"
        slugs = [
            name.split("/")[1] for name in entries if name.startswith(f"{grid_key}/") and name.endswith(ends)
        ]
        for encoder_slug in sorted(slugs):
            path = f"{grid_key}/{encoder_slug}/{EMBEDDING}"
            array = documents(f"{slide_id}/{path}/zarr.json")
            chunks = {
                index: entry
                for name, entry in entries.items()
                if name.startswith(f"{path}/c/") and (index := chunk_index(name.removeprefix(f"{path}/")))
            }
            rows, cols, _ = array["chunk_grid"]["configuration"]["chunk_shape"]
            planned = {block.index for block in planned_blocks(tissue, (rows, cols))}
            # Objects of blocks without tissue do not count as done; `validate` reports them.
            done = len(planned & {(row, col) for row, col, _ in chunks})
            unreadable, reason = _failure_summary(
                store, blocks_failed.get(f"{slide_id}/{grid_key}/{encoder_slug}", [])
            )
            encoder = array["attributes"]["encoder"]
            identity = EncoderIdentity(encoder["key"], int(encoder["dim"]), encoder["facts"])
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
                source=attrs["slide"]["source"],
                modified=max((e.modified for e in chunks.values() if e.modified), default=None),
            )


def _spot_rows(store: Store, slide_id: str, key: str, source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of patches that are on no grid; `done` and `planned` count objects."""
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


def _documents(store: Store, slide_id: str, entries: dict[str, Entry]) -> Callable[[str], dict[str, Any]]:
    """Return a function that reads a zarr.json of a slide, from the consolidated document where that has it."""
    own = store.location.read_json(f"{slide_id}/zarr.json") or {"attributes": {}}
    consolidated = (own.get("consolidated_metadata") or {}).get("metadata") or {}

    def read(path: str) -> dict[str, Any]:
        below = path.removeprefix(f"{slide_id}/")
        if below == "zarr.json":
            return own
        if below not in entries:
            return {}
        return consolidated.get(below.removesuffix("/zarr.json")) or store.location.read_json(path) or {}

    return read


def _failure_summary(store: Store, paths: list[str]) -> tuple[int, str | None]:
    """Return how many patches of some blocks have no vector, and why the first of them has none."""
    records = [record for path in paths if (record := store.location.read_json(path))]
    reason = next((str(record["reason"]) for record in records if record.get("reason")), None)
    return sum(len(record.get("patches", [])) for record in records), reason


def _row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA), **values}
