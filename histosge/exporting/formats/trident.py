"""TRIDENT's feature files, an ``.h5`` per slide: embeddings for the tools that read those."""

from collections.abc import Sequence
from pathlib import Path

from featurestore.wording import counted
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    from featurestore.exchange.h5 import write_h5
    from featurestore.storage.store import Store

    (item,) = items
    table = item.table
    # Straight from the store: the file takes blocks as they are stored, so a table's values are not needed.
    n = write_h5(Store.open(item.url), table.slide_id, table.grid.spec.key, table.made_by["encoder"], path)
    return counted(n, "patch")


RECORD = ExportFormat(
    "trident",
    "embeddings as the .h5 files of TRIDENT",
    ".h5",
    _write,
    maps=False,
    takes_empty=True,
)
