"""The patches of a cohort that are most similar to a given one, found in one pass.

The search is exact. Memory holds the best patches so far and a few blocks, however large the cohort is.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.analysis.patch_stream import PatchBlock, PatchStream
from featurestore.analysis.slide_source import SlideArray
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Query:
    """A patch to compare all others with.

    Parameters
    ----------
    slide_id, row, col
        The slide, and the patch's position in its grid.
    vector
        Its embedding, ``(dim,)``.
    """

    slide_id: str
    row: int
    col: int
    vector: NDArray[np.float64]


def patch_at_um(stream: PatchStream, slide_id: str, x_um: float, y_um: float) -> Query:
    """Return the patch whose centre is nearest to a position in microns from the slide's top-left.

    Raises
    ------
    StoreError
        If the position is outside the grid, or the patch has no embedding.
    """
    grid = stream.slide(slide_id).grid
    width, height = ((n - 1) * grid.stride_um + grid.patch_um for n in (grid.n_cols, grid.n_rows))
    left, top = grid.origin_um
    if not (left <= x_um <= left + width and top <= y_um <= top + height):
        raise StoreError(
            f"({x_um:g}, {y_um:g}) um is outside the patches of slide {slide_id!r}, which cover "
            f"x {left:g} to {left + width:g} um and y {top:g} to {top + height:g} um"
        )
    row, col = np.abs(grid.y_um - y_um).argmin(), np.abs(grid.x_um - x_um).argmin()
    return patch_at(stream, slide_id, int(row), int(col))


def patch_at(stream: PatchStream, slide_id: str, row: int, col: int) -> Query:
    """Return a patch by its position in the grid; it reads the block that holds the patch.

    Raises
    ------
    StoreError
        If the patch is outside the grid, is background, or could not be read.
    """
    slide = stream.slide(slide_id)
    n_rows, n_cols = slide.grid.shape
    if not (0 <= row < n_rows and 0 <= col < n_cols):
        raise StoreError(
            f"slide {slide_id!r} has no patch ({row}, {col}): rows are 0 to {n_rows - 1}, cols 0 to {n_cols - 1}"
        )
    vector = slide.array.read((row, row + 1), (col, col + 1))[0, 0].astype(np.float64)
    if not np.isfinite(vector).all():
        raise StoreError(_why_no_embedding(slide, row, col))
    return Query(slide_id, row, col, vector)


def _why_no_embedding(slide: SlideArray, row: int, col: int) -> str:
    is_tissue = slide.read_tissue()
    if is_tissue[row, col] and slide.columns is not None:
        return f"patch ({row}, {col}) of slide {slide.slide_id!r} has no prediction; run the same histosge predict again"
    if is_tissue[row, col]:
        return (
            f"patch ({row}, {col}) of slide {slide.slide_id!r} has no embedding: unreadable, or not embedded yet; "
            "see: histosge ls"
        )
    rows, cols = np.nonzero(is_tissue)
    hint = "the slide holds no tissue"
    if len(rows):
        nearest = ((rows - row) ** 2 + (cols - col) ** 2).argmin()
        hint = f"the nearest tissue is patch ({rows[nearest]}, {cols[nearest]})"
    return f"patch ({row}, {col}) of slide {slide.slide_id!r} is background; {hint}"


def as_metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises
    ------
    StoreError
        If there is no metric of that name.
    """
    for metric in METRICS:
        if metric == name:
            return metric
    raise StoreError(f"there is no metric {name!r}; take one of: {', '.join(METRICS)}")


def similar(
    stream: PatchStream,
    query: Query,
    n: int = 20,
    metric: Metric = "cosine",
    exclude_um: float | None = None,
) -> pl.DataFrame:
    """Find the patches nearest to a query over all slides, in one pass.

    Parameters
    ----------
    n
        How many at most.
    metric
        ``cosine`` (1 - cosine of the angle) or ``euclidean``.
    exclude_um
        Leave out patches of the query's own slide whose centre is within this distance of it, in microns. The query
        itself is always left out. None means one patch side: nearer patches overlap the query.

    Returns
    -------
    polars.DataFrame
        `slide`, `row`, `col`, `x_um`, `y_um`, `distance`; nearest first, ties in the order of reading.

    Raises
    ------
    StoreError
        If `n` or the metric is not usable, or the query is the zero vector, which has no cosine.
    """
    if metric not in METRICS or n < 1:
        raise StoreError(
            f"similar needs n of at least 1 and a metric of {', '.join(METRICS)}, not {n}, {metric}"
        )
    if metric == "cosine" and not query.vector.any():
        raise StoreError(
            f"patch ({query.row}, {query.col}) of slide {query.slide_id!r} is the zero vector, which has no direction; "
            "use the metric euclidean"
        )
    grid = stream.slide(query.slide_id).grid
    # Slightly less than a side: patches that only touch the query stay, whatever rounding does.
    radius_um = grid.receptive_um * (1 - 1e-9) if exclude_um is None else exclude_um
    best = stream.fold(partial(_Nearest, query, n, metric, grid, radius_um))
    grids = {slide_id: stream.slide(slide_id).grid for slide_id in set(best.slide_ids)}
    placed = list(zip(best.slide_ids, best.rows, best.cols, strict=True))
    return pl.DataFrame(
        {
            "slide": pl.Series(best.slide_ids, dtype=pl.String),
            "row": best.rows.astype(np.int32),
            "col": best.cols.astype(np.int32),
            "x_um": pl.Series([grids[slide_id].x_um[col] for slide_id, _, col in placed], dtype=pl.Float64),
            "y_um": pl.Series([grids[slide_id].y_um[row] for slide_id, row, _ in placed], dtype=pl.Float64),
            "distance": best.distances,
        }
    )


class _Nearest:
    """The patches nearest to a query among those added so far, nearest first, ties in the order of reading."""

    def __init__(self, query: Query, n: int, metric: Metric, grid: PatchGrid, radius_um: float) -> None:
        self._query, self._n, self._metric = query, n, metric
        self._grid, self._radius_um = grid, radius_um
        self.slide_ids: list[str] = []
        self.rows = np.empty(0, np.int64)
        self.cols = np.empty(0, np.int64)
        self.distances = np.empty(0)

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        distances = _distances(patches.values, self._query.vector, self._metric)
        if patches.slide_id == self._query.slide_id:
            distances[_excluded(patches, self._query, self._grid, self._radius_um)] = np.inf
        # Most blocks hold nothing that is better than what was found, and cost no sorting.
        worst = self.distances[-1] if len(self.distances) >= self._n else np.inf
        near = np.flatnonzero(distances < worst)
        if len(near):
            near = near[np.argsort(distances[near], kind="stable")[: self._n]]
            self._keep(
                [patches.slide_id] * len(near), patches.rows[near], patches.cols[near], distances[near]
            )

    def merge(self, other: Self) -> None:
        """Add the patches that another has kept."""
        self._keep(other.slide_ids, other.rows, other.cols, other.distances)

    def _keep(
        self,
        slide_ids: list[str],
        rows: NDArray[np.int64],
        cols: NDArray[np.int64],
        distances: NDArray[np.float64],
    ) -> None:
        distances = np.concatenate([self.distances, distances])
        order = np.argsort(distances, kind="stable")[: self._n]
        both = [*self.slide_ids, *slide_ids]
        self.slide_ids = [both[i] for i in order]
        self.rows = np.concatenate([self.rows, rows])[order]
        self.cols = np.concatenate([self.cols, cols])[order]
        self.distances = distances[order]


def _distances(
    values: NDArray[np.float32], vector: NDArray[np.float64], metric: Metric
) -> NDArray[np.float64]:
    rows = values.astype(np.float64)
    if metric == "euclidean":
        rows -= vector
        lengths: NDArray[np.float64] = np.linalg.norm(rows, axis=1)
        return lengths
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    # A zero vector has no direction: its distance counts as that of a right angle, 1.
    cosine: NDArray[np.float64] = np.zeros(len(rows))
    np.divide(rows @ vector, lengths, out=cosine, where=lengths > 0)
    return 1 - cosine


def _excluded(patches: PatchBlock, query: Query, grid: PatchGrid, radius_um: float) -> NDArray[np.bool_]:
    steps = np.hypot(patches.rows - query.row, patches.cols - query.col)
    excluded: NDArray[np.bool_] = (steps * grid.stride_um <= radius_um) | (steps == 0)
    return excluded
