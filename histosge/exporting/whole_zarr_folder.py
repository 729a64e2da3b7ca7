"""Zarr folders that appear whole or not at all, also where a write was refused while others were under way."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featurestore.whole_file import whole_folder

MAX_WAIT_S = 60
"""A local disk answers a write of one chunk long before."""


@contextmanager
def whole_zarr_folder(path: Path) -> Iterator[Path]:
    """As `featurestore.whole_file.whole_folder`, for a folder that zarr writes.

    If the block raises, the folder is removed only after zarr's other writes have ended.
    """
    with whole_folder(path) as partial:
        try:
            yield partial
        except BaseException:
            _await_writes()
            raise


def _await_writes() -> None:
    # zarr 3.1 starts the writes of a group's documents and of a selection's chunks together, and raises the first
    # error while the others still run: these would make the removed folder again and leave a file in it.
    from zarr.core import sync

    async def rest() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=MAX_WAIT_S)

    sync.sync(rest())
