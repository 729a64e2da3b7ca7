"""Patches and their values as every export reads them, from an expression store or a feature store.

Terms
    table   one row per patch that has values, in row-major order of the grid; one column per gene or feature
    band    the rows of patches of one row of stored blocks: what is in memory at a time
    kept    patches with values: tissue that could be read
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from featurestore.block_array import BlockArray
from featurestore.blocks import Block
from featurestore.documents import read_attrs
from featurestore.errors import StoreError, StoreNotFoundError
from featurestore.grid import PatchGrid
from featurestore.layout import SPEC_NAME as FEATURE_SPEC
from featurestore.location import Location
from featurestore.store import Store
from histosge.errors import HistosgeError
from histosge.maps import GENE_GROUP, ExpressionStore, StoredMap


class ExportError(HistosgeError, ValueError):
    """Something that cannot be exported as asked."""


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
    what
        ``expression`` or ``embedding``.
    facts
        Who made it, JSON-ready.
    per_patch
        Further values of each patch, ``(n_rows, n_cols)``, by name.
    per_column
        Further values of each chosen column, by name.
    """

    slide_id: str
    grid: PatchGrid
    rgb: NDArray[np.uint8]
    array: BlockArray
    planned: tuple[Block, ...]
    names: tuple[str, ...]
    columns: tuple[int, ...]
    what: str
    facts: dict[str, str]
    per_patch: dict[str, NDArray[Any]]
    per_column: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Which patches have values, ``(n_rows, n_cols)``: one pass over the first group of columns."""
        kept = np.zeros(self.grid.shape, dtype=bool)
        first = slice(0, self._group)
        for block in self.planned:
            kept[block.slices] = np.isfinite(self.array.read(block.rows, block.cols, first)).any(axis=2)
        return kept

    @property
    def _group(self) -> int:
        """Columns in one stored object."""
        return self.array.shape[2] if self.array.n_groups == 1 else GENE_GROUP

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

    def bands(self) -> list[tuple[int, int]]:
        """Half-open ranges of grid rows that hold kept patches, from top to bottom."""
        step = self.array.block_shape[0]
        ranges = [(row, min(row + step, self.grid.n_rows)) for row in range(0, self.grid.n_rows, step)]
        return [band for band in ranges if self.kept[slice(*band)].any()]

    def lattice(self, rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the chosen columns of some grid rows, ``(rows, n_cols, n_columns)``; NaN without values."""
        wide = (0, self.grid.n_cols)
        values = np.empty((rows[1] - rows[0], self.grid.n_cols, len(self.columns)), np.float32)
        columns = np.asarray(self.columns)
        for group in np.unique(columns // self._group):
            here = np.flatnonzero(columns // self._group == group)
            low, high = int(columns[here].min()), int(columns[here].max())
            values[..., here] = self.array.read(rows, wide, slice(low, high + 1))[..., columns[here] - low]
        return values

    def read(self, band: tuple[int, int]) -> NDArray[np.float32]:
        """Return the rows of the table that lie in a band, ``(n, n_columns)``."""
        return self.lattice(band)[self.kept[slice(*band)]]

    def size_of(self, band: tuple[int, int]) -> int:
        """Rows of the table in a band."""
        return int(self.kept[slice(*band)].sum())

    def chunks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the table from top to bottom: which of its rows, and their values."""
        start = 0
        for band in self.bands():
            values = self.read(band)
            yield slice(start, start + len(values)), values
            start += len(values)

    def lazy(self) -> Any:
        """Return the whole table as a dask array, one chunk per band."""
        import dask
        import dask.array

        parts = [
            dask.array.from_delayed(
                dask.delayed(self.read)(band), shape=(self.size_of(band), len(self.names)), dtype=np.float32
            )
            for band in self.bands()
        ]
        return dask.array.concatenate(parts, axis=0)


@dataclass(frozen=True)
class Choice:
    """What of a store to export; empty or None means all, or the only one.

    Parameters
    ----------
    slide_ids, genes
        Which slides, and which columns by name.
    grid, encoder
        Needed where the store holds several.
    """

    slide_ids: Sequence[str] = ()
    genes: Sequence[str] = ()
    grid: str | None = None
    encoder: str | None = None


def is_feature_store(url: str) -> bool:
    """Tell a feature store from an expression store.

    Raises
    ------
    StoreNotFoundError
        If there is nothing.
    """
    location = Location(url)
    if not location.exists():
        raise StoreNotFoundError(
            f"there is no store at {location.label}; give a feature store or an expression store"
        )
    return read_attrs(location, "").get("spec") == FEATURE_SPEC


def open_tables(url: str, choice: Choice) -> list[PatchTable]:
    """Open what is to be exported, one table per slide.

    Raises
    ------
    ExportError, StoreError
        If a slide, grid or gene is not there, or a map is not whole.
    """
    tables = _embeddings(url, choice) if is_feature_store(url) else _maps(url, choice)
    for table in tables:
        missing = table.array.missing(table.planned)
        if missing:
            raise ExportError(
                f"slide {table.slide_id!r} has {len(table.planned) - len(missing)} of {len(table.planned)} blocks; "
                f"finish it first: run the same histosge {'embed' if table.what == 'embedding' else 'predict'} again"
            )
        if not len(table):
            raise ExportError(f"slide {table.slide_id!r} has no patch with values; nothing to export")
    return tables


def _maps(url: str, choice: Choice) -> list[PatchTable]:
    store = ExpressionStore.open(url)
    there = list(store.maps())
    known = dict.fromkeys(slide_id for slide_id, _ in there)
    tables = []
    for slide_id in choice.slide_ids or known:
        grids = [grid for slide, grid in there if slide == slide_id and choice.grid in (None, grid)]
        if not grids:
            raise ExportError(
                f"{store.location.label} holds no map of slide {slide_id!r}"
                f"{f' on grid {choice.grid}' if choice.grid else ''}; it has: {', '.join(known) or 'none'}"
            )
        if len(grids) > 1:
            raise ExportError(
                f"slide {slide_id!r} has several maps; name one with --grid: {', '.join(grids)}"
            )
        stored = store.map(slide_id, grids[0])
        further = _further_arrays(store.location, f"{slide_id}/{grids[0]}")
        tables.append(table_of_map(stored, choice.genes, further))
    if not tables:
        raise ExportError(f"{store.location.label} holds no map; make one with: histosge predict")
    return tables


Further = Mapping[str, tuple[tuple[str, ...], NDArray[Any]]]
"""Name -> dims and values of what a map holds beside its expression."""


def table_of_map(stored: StoredMap, genes: Sequence[str] = (), further: Further | None = None) -> PatchTable:
    """Return an opened map as a table; all genes if none is named."""
    columns = _columns(stored.genes, genes, stored.slide_id)
    extras = further or {}
    made_by = stored.array.attrs.get("made_by", {})
    return PatchTable(
        stored.slide_id,
        stored.grid,
        stored.rgb,
        stored.array,
        tuple(stored.planned()),
        tuple(stored.genes[i] for i in columns),
        columns,
        "expression",
        {key: str(value) for key, value in made_by.items()},
        {name: values for name, (dims, values) in extras.items() if dims == ("y", "x")},
        {name: values[list(columns)] for name, (dims, values) in extras.items() if dims == ("gene",)},
    )


def _further_arrays(location: Location, path: str) -> Further:
    """Read what else a map says of each patch or of each gene."""
    found: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}
    for name in location.folders(path):
        document = location.read_json(f"{path}/{name}/zarr.json") or {}
        dims = tuple(document.get("dimension_names") or ())
        if name not in ("tissue", "gene") and dims in (("y", "x"), ("gene",)):
            array = zarr.open_array(
                location.zarr(read_only=True), path=f"{path}/{name}", mode="r", zarr_format=3
            )
            found[name] = (dims, np.asarray(array[...]))
    return found


def _columns(names: Sequence[str], wanted: Sequence[str], slide_id: str) -> tuple[int, ...]:
    known = {name: i for i, name in enumerate(names)}
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, such as {names[0]!r}"
            )
            raise ExportError(f"the map of {slide_id!r} has no gene {name!r}: {hint}")
    return tuple(known[name] for name in dict.fromkeys(wanted)) or tuple(range(len(names)))


def _embeddings(url: str, choice: Choice) -> list[PatchTable]:
    if choice.genes:
        raise ExportError(
            "--genes chooses from an expression store; a feature store holds embeddings, not genes"
        )
    store = Store.open(url)
    tables = []
    for slide_id in choice.slide_ids or store.slide_ids():
        grid_key, slug = store.select(choice.grid, choice.encoder, slide_id)
        stored, array = store.grid(slide_id, grid_key), store.embedding(slide_id, grid_key, slug)
        identity = store.identity(slide_id, grid_key, slug)
        dim = array.shape[2]
        tables.append(
            PatchTable(
                slide_id,
                stored.grid,
                stored.rgb,
                array,
                tuple(stored.planned(array.block_shape)),
                tuple(f"{identity.key}_{i}" for i in range(dim)),
                tuple(range(dim)),
                "embedding",
                {"encoder": identity.key, "fingerprint": identity.fingerprint},
                {},
                {},
            )
        )
    if not tables:
        raise StoreError(f"{store.location.label} holds no slide; fill it with: histosge embed")
    return tables
