"""What an expression store holds: one row per slide and grid, as a polars frame.

Done blocks are counted from one listing of each array, as for a feature store.
"""

from collections.abc import Iterator
from typing import Any

import polars as pl

from featurestore.documents import DocumentError
from featurestore.location import PathOrUrl, as_url
from histosge.prediction.expression_store import ExpressionStore

SCHEMA: dict[str, Any] = {
    "slide": pl.String,
    "grid": pl.String,
    "genes": pl.Int64,
    "state": pl.String,
    "done": pl.Int64,
    "planned": pl.Int64,
    "patches": pl.Int64,
    "bytes": pl.Int64,
    "model": pl.String,
    "reason": pl.String,
    "modified": pl.Datetime("us", "UTC"),
}


def expression_catalogue(url: PathOrUrl) -> pl.DataFrame:
    """List an expression store.

    Parameters
    ----------
    url
        Folder or URL.

    Returns
    -------
    polars.DataFrame
        Columns as in `SCHEMA`. `state` is ``done``, ``partial``, or ``failed`` where what describes the map is damaged
        (see `reason`); `done` and `planned` count blocks, `patches` those with tissue; `model` is the fingerprint of the
        model that predicted it; `modified` is when the last block was written (UTC).

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no expression store at `url`.
    """
    return pl.DataFrame(list(_rows(ExpressionStore.open(as_url(url)))), schema=SCHEMA)


def _rows(store: ExpressionStore) -> Iterator[dict[str, Any]]:
    for slide_id, grid_key in store.maps():
        row: dict[str, Any] = {**dict.fromkeys(SCHEMA), "slide": slide_id, "grid": grid_key}
        try:
            stored = store.map(slide_id, grid_key)
        except DocumentError as error:
            # One damaged map must not hide the others; `validate` says more of it.
            yield row | {"state": "failed", "reason": str(error)}
            continue
        planned = {block.index for block in stored.planned()}
        entries = stored.array.entries()
        done = len(planned & stored.array.done())
        yield row | {
            "genes": len(stored.genes),
            "state": "done" if done == len(planned) else "partial",
            "done": done,
            "planned": len(planned),
            "patches": int(stored.is_tissue.sum()),
            "bytes": sum(entry.size for entry in entries.values()),
            "model": str(stored.array.attrs.get("made_by", {}).get("model", "")),
            "modified": max((e.modified for e in entries.values() if e.modified), default=None),
        }
