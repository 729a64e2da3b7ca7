"""What a store holds: one row per slide, grid and encoder, as a polars frame.

What is done is counted from one listing of each array; failures are quoted, never decided upon.
"""

from collections.abc import Iterator
from typing import Any

import polars as pl

from featurestore.store import Store, StoredGrid

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


def catalogue(url: str) -> pl.DataFrame:
    """List a store.

    Returns
    -------
    polars.DataFrame
        Columns as in `SCHEMA`. `state` is ``done``, ``partial`` or ``failed``; `done` and `planned`
        count blocks; `patches` tissue patches; `unreadable` patches that could not be read; `modified`
        is when the last block was written (UTC).

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no store at `url`.
    """
    return pl.DataFrame(list(_rows(Store.open(url))), schema=SCHEMA)


def _rows(store: Store) -> Iterator[dict[str, Any]]:
    failures = store.slide_failures()
    for slide_id in sorted(set(store.slide_ids()) | set(failures)):
        rows = list(_slide_rows(store, slide_id)) if slide_id in store.slide_ids() else []
        if slide_id in failures:
            yield _row(slide=slide_id, state="failed", reason=failures[slide_id])
        yield from rows
        if not rows and slide_id not in failures:
            yield _row(slide=slide_id, state="partial", source=store.slide(slide_id).source)


def _slide_rows(store: Store, slide_id: str) -> Iterator[dict[str, Any]]:
    record = store.slide(slide_id)
    unreadable: dict[tuple[str, str], int] = {}
    for name, failure in store.block_failures(slide_id):
        grid_key, encoder_slug, _ = name.split("/")
        key = (grid_key, encoder_slug)
        unreadable[key] = unreadable.get(key, 0) + len(failure.get("patches", []))
    for grid_key in store.grid_keys(slide_id):
        stored: StoredGrid = store.grid(slide_id, grid_key)
        for encoder_slug in store.encoder_slugs(slide_id, grid_key):
            array = store.embedding(slide_id, grid_key, encoder_slug)
            identity = store.identity(slide_id, grid_key, encoder_slug)
            objects = array.entries()
            planned = {block.index for block in stored.planned(array.block_shape)}
            done = len(planned & {(row, col) for row, col, _ in objects})
            yield _row(
                slide=slide_id,
                grid=grid_key,
                encoder=identity.key,
                state="done" if done == len(planned) else "partial",
                done=done,
                planned=len(planned),
                patches=int(stored.is_tissue.sum()),
                bytes=sum(entry.size for entry in objects.values()),
                unreadable=unreadable.get((grid_key, encoder_slug), 0),
                fingerprint=identity.fingerprint,
                source=record.source,
                modified=max((e.modified for e in objects.values() if e.modified), default=None),
            )


def _row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA), **values}
