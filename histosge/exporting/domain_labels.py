"""A domain for every patch: from a table, from the map, or else by k-means on principal components of its values."""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

from featurestore.errors import first_line
from featurestore.grid import PatchGrid
from histosge.errors import ExportError
from histosge.exporting.patch_table import PatchTable

STORED = "domain"
"""Array of a map that holds its domains already."""
COLUMNS = ("domain", "cluster")
"""Columns of a table that may hold labels; the first that is there is taken."""
# Patches that components and centres are computed from: 80 MB of 1,000 genes, however large the map is.
SAMPLE = 20_000
COMPONENTS = 20
MAX_LABEL = int(np.iinfo(np.int16).max)
MAX_DOMAINS = 1000
"""Far beyond what is told apart by eye; k-means takes time and memory in proportion to it."""


def domain_name(label: int) -> str:
    """Name a domain as viewer, exports and tables do: by its label, which counts from 0."""
    return f"domain {label}"


# Paul Tol's "muted" scheme, as the viewer has it (static/colours.js): told apart with any colour vision.
DOMAIN_COLOURS = ("332288", "ddcc77", "117733", "cc6677", "88ccee", "882255", "44aa99", "999933", "aa4499")


def domain_colour(label: int) -> list[int]:
    """Return the colour of a domain as red, green and blue, 0..255; after nine they come again, darker."""
    rgb = bytes.fromhex(DOMAIN_COLOURS[label % len(DOMAIN_COLOURS)])
    fade = 1 + 0.5 * (label // len(DOMAIN_COLOURS))
    # Halves up, as JavaScript rounds: the viewer's colours to the last unit.
    return [int(value / fade + 0.5) for value in rgb]


def domain_labels(table: PatchTable, n_domains: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a label per patch of the grid, ``(n_rows, n_cols)``; -1 where a patch has no values or lies at the rim.

    Patches at the rim of the tissue are half background: k-means would make a domain of what they have in common.
    Components and centres come from a sample of patches; all are then assigned band by band. Label 0 is the
    largest domain. A map that holds domains gives its own.

    Raises
    ------
    ExportError
        If `n_domains` is not in 1 .. `MAX_DOMAINS`.
    """
    if not 1 <= n_domains <= MAX_DOMAINS:
        raise ExportError(f"cannot cut a map into {n_domains} domains: give a number from 1 to {MAX_DOMAINS}")
    labels = np.full(table.grid.shape, -1, dtype=np.int64)
    if STORED in table.per_patch:
        stored = np.asarray(table.per_patch[STORED], dtype=np.float64)
        given = table.kept & np.isfinite(stored) & (stored >= 0)
        labels[given] = stored[given]
        return labels
    rng = np.random.default_rng(seed)
    inner = ~table.at_rim
    # A map of nothing but rim, such as of a needle biopsy on a coarse grid, is cut as a whole.
    inner = inner if inner.any() else np.ones(len(table), dtype=bool)
    # Each patch by itself with this probability: the sample then comes out of one pass over bands of any size.
    share = min(1.0, SAMPLE / len(table))
    parts = [values[inner[rows] & (rng.random(len(values)) < share)] for rows, values in table.chunks()]
    sample = np.nan_to_num(np.concatenate(parts))
    mean, spread = sample.mean(axis=0, dtype=np.float64), sample.std(axis=0, dtype=np.float64)
    # A gene that is constant here has no spread to divide by, so it gets weight 0.
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    sample = (sample - mean.astype(np.float32)) * scale.astype(np.float32)
    _, axes = np.linalg.eigh((sample.T @ sample).astype(np.float64))
    # eigh returns the smallest eigenvalue first.
    components = axes[:, ::-1][:, :COMPONENTS]
    projection = components * scale[:, None]
    scores = (sample @ components).astype(np.float64)
    # With fewer distinct patches than domains k-means would leave empty ones.
    n = min(n_domains, len(np.unique(scores, axis=0)))
    centres, _ = kmeans2(scores, n, minit="++", seed=rng)
    flat = np.empty(len(table), dtype=np.int64)
    for rows, values in table.chunks():
        flat[rows], _ = vq((np.nan_to_num(values.astype(np.float64)) - mean) @ projection, centres)
    # Numbered by size, so that the same domains get the same numbers and colours whatever centres k-means started from.
    order = np.argsort(-np.bincount(flat[inner], minlength=n), kind="stable")
    labels[table.kept] = np.where(inner, np.argsort(order)[flat], -1)
    return labels


def read_labels(table: PatchTable, folder: Path) -> NDArray[np.int64]:
    """Return the labels in ``<folder>/<slide id>.parquet``, as ``histosge analyse ... --labels`` writes them.

    Raises
    ------
    ExportError
        If there is no such table, or `read_label_table` refuses it.
    """
    file = folder / f"{table.slide_id}.parquet"
    if not file.is_file():
        raise ExportError(f"there is no {file}; give a number of domains, or a folder with a table per slide")
    return read_label_table(file, table.grid)


def read_label_table(file: Path, grid: PatchGrid) -> NDArray[np.int64]:
    """Return the labels of a table with one row per patch as ``(n_rows, n_cols)``; -1 where a patch has none.

    Raises
    ------
    ExportError
        If it is no table with whole numbers in `row`, `col` and one of `COLUMNS`, or is of another grid.
    """
    try:
        frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExportError(f"{file} cannot be read as parquet: {first_line(error)}") from error
    name = next((name for name in COLUMNS if name in frame.columns), None)
    if name is None or not {"row", "col"} <= set(frame.columns):
        held = ", ".join(frame.columns)
        raise ExportError(f"{file} needs columns row, col and one of {', '.join(COLUMNS)}; it has {held}")
    for column in ("row", "col", name):
        if not frame[column].dtype.is_integer():
            raise ExportError(
                f"column {column} of {file} holds {frame[column].dtype}; give whole numbers, domains from 0 on"
            )
    if frame["row"].null_count() or frame["col"].null_count():
        raise ExportError(f"{file} has a row without a place: fill in its columns row and col")
    rows, cols = (frame[axis].to_numpy().astype(np.int64) for axis in ("row", "col"))
    inside = all(
        not len(axis) or (axis.min() >= 0 and axis.max() < n)
        for axis, n in ((rows, grid.n_rows), (cols, grid.n_cols))
    )
    if not inside or not _same_places(frame, grid):
        raise ExportError(f"{file} is of another grid than {grid.spec.key}; make it on that grid")
    found = frame[name].cast(pl.Int64).fill_null(-1).to_numpy()
    # Viewer and files of other tools hold labels in 16 bits.
    if len(found) and found.max() > MAX_LABEL:
        raise ExportError(f"{file} has the label {found.max()}; labels go from 0 to {MAX_LABEL}, -1 is none")
    labels = np.full(grid.shape, -1, dtype=np.int64)
    labels[rows, cols] = np.maximum(found, -1)
    return labels


def _same_places(frame: pl.DataFrame, grid: PatchGrid) -> bool:
    """Compare positions in microns, where a table has them: a coarser grid has the same first rows and columns."""
    if not {"x_um", "y_um"} <= set(frame.columns):
        return True
    x, y = frame["x_um"].to_numpy(), frame["y_um"].to_numpy()
    expected = grid.x_um[frame["col"].to_numpy()], grid.y_um[frame["row"].to_numpy()]
    return bool(np.allclose(x, expected[0], atol=0.5) and np.allclose(y, expected[1], atol=0.5))
