"""Patches and their values as every export reads them, from an expression store or a feature store.

Terms
    table   one row per patch that has values, in row-major order of the grid; one column per gene or feature
    band    the rows of patches of one row of stored blocks: what is in memory at a time
    kept    patches with values: tissue that could be read
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.grid import PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.wording import counted
from histosge.prediction.stored_map import is_rim


@dataclass(frozen=True)
class PatchTable:
    """One slide's patches with their values, read on demand.

    Parameters
    ----------
    slide_id, grid
        Whose, and the lattice.
    rgb
        Mean colour of each patch, ``(n_rows, n_cols, 3)``.
    array
        ``(y, x, column)``; NaN where a patch has no values.
    planned
        Blocks with tissue.
    names, columns
        Of the chosen columns, and their places along the array's last dim.
    kind
        ``expression`` or ``embedding``.
    made_by
        Model or encoder, with fingerprints, JSON-ready.
    per_patch
        Further values of each patch, ``(n_rows, n_cols)``, by name.
    per_column
        Further values of each chosen column, by name.
    tissue
        Share of each patch that is tissue, 0..255, ``(n_rows, n_cols)``; None where it is not known.
    """

    slide_id: str
    grid: PatchGrid
    rgb: NDArray[np.uint8]
    array: BlockArray
    planned: tuple[Block, ...]
    names: tuple[str, ...]
    columns: tuple[int, ...]
    kind: str
    made_by: dict[str, str]
    per_patch: dict[str, NDArray[Any]]
    per_column: dict[str, NDArray[Any]]
    tissue: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Which patches have values, ``(n_rows, n_cols)``: one pass over the first group of columns."""
        # A patch has all of its values or none, so one group of columns is enough.
        kept = np.zeros(self.grid.shape, dtype=bool)
        for block in self.planned:
            kept[block.slices] = np.isfinite(self.array.read_block(block, group=0)).any(axis=2)
        return kept

    @property
    def at_rim(self) -> NDArray[np.bool_]:
        """Which kept patches are less than half tissue, ``(n,)``; none where that is not known."""
        if self.tissue is None:
            return np.zeros(len(self), dtype=bool)
        return is_rim(self.tissue)[self.kept]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Grid row of each kept patch."""
        return np.nonzero(self.kept)[0]

    @cached_property
    def cols(self) -> NDArray[np.int64]:
        """Grid column of each kept patch."""
        return np.nonzero(self.kept)[1]

    @property
    def xy_um(self) -> NDArray[np.float64]:
        """Centres ``(x, y)`` in microns from the slide's top-left, ``(n, 2)``."""
        return np.stack([self.grid.x_um[self.cols], self.grid.y_um[self.rows]], axis=1)

    @property
    def ids(self) -> list[str]:
        """A name for each row of the table."""
        return [
            f"{self.slide_id}_{r}_{c}" for r, c in zip(self.rows.tolist(), self.cols.tolist(), strict=True)
        ]

    @property
    def size_in_words(self) -> str:
        """Its rows and columns, such as ``391 patches x 5 genes``."""
        column = "gene" if self.kind == "expression" else "feature"
        return f"{counted(len(self), 'patch')} x {counted(len(self.names), column)}"

    def bands(self) -> list[tuple[int, int]]:
        """Half-open ranges of grid rows that hold kept patches, from top to bottom."""
        step = self.array.block_shape[0]
        ranges = [(row, min(row + step, self.grid.n_rows)) for row in range(0, self.grid.n_rows, step)]
        return [band for band in ranges if self.kept[slice(*band)].any()]

    def read_grid_rows(self, rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the chosen columns of some grid rows, ``(rows, n_cols, n_columns)``; NaN without values."""
        values = np.full((rows[1] - rows[0], self.grid.n_cols, len(self.columns)), np.nan, np.float32)
        for block in self.planned:
            top, bottom = max(rows[0], block.rows[0]), min(rows[1], block.rows[1])
            if top >= bottom:
                continue
            inside = values[top - rows[0] : bottom - rows[0], slice(*block.cols)]
            inside[:] = self.read_block(block, slice(top - block.rows[0], bottom - block.rows[0]))
        return values

    def read_block(self, block: Block, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Return the chosen columns of a block, ``(rows, cols, n_columns)``; NaN without values.

        Parameters
        ----------
        rows
            Of the block, counted from its first.
        """
        # Genes are stored in groups, each an object of its own: only groups that hold chosen columns are read.
        groups, places = np.divmod(np.asarray(self.columns), self.array.object_shape[2])
        n_rows = len(range(*rows.indices(block.shape[0])))
        values = np.empty((n_rows, block.shape[1], len(self.columns)), np.float32)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            values[..., chosen] = self.array.read_block(block, group=group)[rows, :, places[chosen]]
        return values

    def read_band(self, band: tuple[int, int]) -> NDArray[np.float32]:
        """Return the rows of the table that lie in a band, ``(n, n_columns)``."""
        return self.read_grid_rows(band)[self.kept[slice(*band)]]

    def n_rows_in(self, band: tuple[int, int]) -> int:
        """Rows of the table in a band."""
        return int(self.kept[slice(*band)].sum())

    def chunks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the table from top to bottom: which of its rows, and their values."""
        start = 0
        for band in self.bands():
            values = self.read_band(band)
            yield slice(start, start + len(values)), values
            start += len(values)

    def to_dask(self) -> Any:
        """Return the whole table as a dask array, one chunk per band."""
        import dask
        import dask.array

        # A chunk is a band, so that a writer that takes chunk by chunk never holds more.
        parts = [
            dask.array.from_delayed(
                dask.delayed(self.read_band)(band),
                shape=(self.n_rows_in(band), len(self.names)),
                dtype=np.float32,
            )
            for band in self.bands()
        ]
        return dask.array.concatenate(parts, axis=0)
