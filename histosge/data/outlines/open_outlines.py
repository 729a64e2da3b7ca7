"""Outlines of any of the known layouts, as batches of polygons in level-0 pixels."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from featurestore.input_file import kind_of, shown
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.outlines.json_outlines import read_json_outlines
from histosge.data.outlines.outline_batch import OutlineBatch, RawOutline, to_batch
from histosge.data.outlines.table_outlines import read_table_outlines
from histosge.errors import ExpressionError

CELLS = 1 << 14
"""Cells in a batch: with 40 corners each some 30 MB of polygons."""
JSON_ENDS = (".geojson", ".json", ".geojson.gz", ".json.gz")
TABLE_ENDS = (".parquet", ".geoparquet", ".pq")


def open_outlines(file: str | Path, frame: SlideFrame) -> tuple[Iterator[OutlineBatch], str]:
    """Return a file's outlines in batches, and a remark on how they were placed.

    Parameters
    ----------
    file
        GeoJSON of QuPath (also of StarDist and Cellpose in QuPath), ``cells.geojson`` or ``cells.json`` of CellViT,
        ``cell_boundaries.parquet`` or ``nucleus_boundaries.parquet`` in a Xenium output folder, or GeoParquet.
    frame
        The slide; Xenium's microns are placed on it by the run's alignment matrix.

    Raises
    ------
    ExpressionError
        If it is none of these; also while batches are read, where the file is damaged.
    """
    path = Path(file)
    if kind_of(path) != "file":
        raise ExpressionError(f"there is no file {shown(path)}; give outlines of cells as GeoJSON or parquet")
    name = path.name.lower()
    if name.endswith(JSON_ENDS):
        return _batches(read_json_outlines(path)), ""
    if name.endswith(TABLE_ENDS):
        cells, note = read_table_outlines(path, frame)
        return _batches(cells), note
    raise ExpressionError(
        f"{shown(path)} ends in none of {', '.join(JSON_ENDS + TABLE_ENDS)}; export outlines of cells as GeoJSON or parquet"
    )


def _batches(cells: Iterator[RawOutline | None]) -> Iterator[OutlineBatch]:
    while some := list(islice(cells, CELLS)):
        outlines = [cell for cell in some if cell is not None]
        yield to_batch(outlines, len(some) - len(outlines))
