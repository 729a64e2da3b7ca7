"""Means of genes in drawn regions of one slide, and how they differ from the rest of its tissue.

The map is read by blocks. Sums over the whole map are added up once, so a region costs the blocks that it touches.

Terms
    region    polygons in microns from the slide's top-left, each a list of rings: the outline, then its holes
    effect    Cohen's d: the difference of two means over their pooled standard deviation
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import sparse

from featurestore.blocks import Block
from featurestore.grid import PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.float16 import nan_rows
from histosge.errors import ViewError

MAX_CORNERS = 200_000
"""Corners of one region; a pathologist's outline of a whole slide has about 10,000."""
READERS = 4
# Blocks in flight at most: of 1,024 patches and 1,000 genes each is 4 MB as float32.
_AHEAD = 8

# Half a step of float16, relative to the value.
_ROUNDING = 2.0**-12

Mask = NDArray[np.bool_]
Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, sums and sums of squares of genes over some patches or spots.

    Parameters
    ----------
    n
        Patches or spots.
    total, squares
        ``(n_genes,)``.
    """

    n: int
    total: Sums
    squares: Sums

    @classmethod
    def zero(cls, n_genes: int) -> Self:
        """Return those of nothing."""
        return cls(0, np.zeros(n_genes), np.zeros(n_genes))

    def __add__(self, other: "Moments") -> "Moments":
        """Return those of both together."""
        return Moments(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def __sub__(self, other: "Moments") -> "Moments":
        """Return those of the rest, where `other` is a part."""
        return Moments(self.n - other.n, self.total - other.total, self.squares - other.squares)

    @property
    def mean(self) -> Sums:
        """``(n_genes,)``; NaN of nothing."""
        return self.total / self.n if self.n else np.full_like(self.total, np.nan)

    @property
    def variance(self) -> Sums:
        """With n - 1, ``(n_genes,)``; NaN of fewer than two."""
        if self.n < 2:
            return np.full_like(self.total, np.nan)
        # Rounding may leave a small negative number where all values are equal.
        return np.maximum(self.squares - self.total**2 / self.n, 0) / (self.n - 1)


def parse_region(found: object) -> shapely.Geometry:
    """Return the polygons of a request as one geometry, in microns.

    Raises
    ------
    ViewError
        If they are no polygons, or have more than `MAX_CORNERS` corners.
    """
    if not isinstance(found, list) or not found:
        raise ViewError("a region is a list of polygons, each a list of rings of [x, y] in microns")
    polygons, corners = [], 0
    for rings in found:
        if not isinstance(rings, list) or not rings:
            raise ViewError("a polygon is a list of rings: its outline, then its holes")
        parsed = [_parse_ring(ring) for ring in rings]
        corners += sum(len(ring) for ring in parsed)
        if corners > MAX_CORNERS:
            raise ViewError(f"a region has more than {MAX_CORNERS} corners; simplify its outline")
        polygons.append(shapely.Polygon(parsed[0], parsed[1:]))
    # A lasso may cross itself. What lies inside by the even-odd rule counts, as the page fills it.
    return shapely.union_all([shapely.make_valid(polygon) for polygon in polygons])


def _parse_ring(found: object) -> Sums:
    try:
        ring = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ViewError("a ring of a region is a list of [x, y] in microns") from error
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ViewError("a ring of a region needs at least three corners [x, y], finite numbers in microns")
    return ring


def patches_inside(region: shapely.Geometry, grid: PatchGrid) -> Mask:
    """Return which patches have their centre in a region, ``(n_rows, n_cols)``."""
    inside = np.zeros(grid.shape, dtype=bool)
    if region.is_empty:
        return inside
    left, top, right, bottom = region.bounds
    # Only within its bounds: a small region on a large slide has few patches to test.
    rows = np.flatnonzero((grid.y_um >= top) & (grid.y_um <= bottom))
    cols = np.flatnonzero((grid.x_um >= left) & (grid.x_um <= right))
    if len(rows) and len(cols):
        shapely.prepare(region)
        x, y = np.meshgrid(grid.x_um[cols], grid.y_um[rows])
        inside[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = shapely.contains_xy(region, x, y)
    return inside


def map_moments(array: BlockArray, blocks: Iterable[Block], *masks: Mask) -> list[Moments]:
    """Add up the genes of a map over the patches of each mask; patches without a prediction are left out.

    A block is read once for all masks.

    Parameters
    ----------
    array
        ``(y, x, gene)``.
    blocks
        Those that hold predictions; blocks without a patch of a mask are not read.
    masks
        Each ``(n_rows, n_cols)``.
    """
    touched = [block for block in blocks if any(mask[block.slices].any() for mask in masks)]
    found = [Moments.zero(array.shape[2]) for _ in masks]
    with ThreadPoolExecutor(READERS) as pool:
        for part in _in_parts(touched):
            for block, values in zip(part, pool.map(array.read_block, part), strict=True):
                for i, mask in enumerate(masks):
                    wanted = mask[block.slices]
                    # Most blocks lie in the rest as a whole: picking their rows would copy them.
                    found[i] += _block_moments(
                        values.reshape(-1, values.shape[-1]) if wanted.all() else values[wanted]
                    )
    return found


def _in_parts(blocks: Sequence[Block]) -> Iterator[Sequence[Block]]:
    for first in range(0, len(blocks), _AHEAD):
        yield blocks[first : first + _AHEAD]


def _block_moments(values: NDArray[Any]) -> Moments:
    absent = nan_rows(values)
    kept = (values[~absent] if absent.any() else values).astype(np.float32)
    # Float32 within a block of about a thousand patches, float64 over blocks: exact to six digits, and twice as fast.
    squares = np.einsum("ij,ij->j", kept, kept)
    return Moments(len(kept), kept.sum(axis=0).astype(np.float64), squares.astype(np.float64))


def spot_moments(values: sparse.csr_matrix, wanted: Mask) -> Moments:
    """Add up measured genes, ``(n_spots, n_genes)``, over the wanted spots."""
    kept = values[np.flatnonzero(wanted)].astype(np.float64)
    total, squares = (
        np.asarray(values.sum(axis=0), dtype=np.float64).ravel() for values in (kept, kept.multiply(kept))
    )
    return Moments(int(kept.shape[0]), total, squares)


def compare(inside: Moments, others: Moments) -> dict[str, Any]:
    """Return counts, means, difference and effect per gene, JSON-ready; None where a number is not defined.

    Neighbouring patches are not independent, so there is no test here: neither standard errors nor p-values.
    """
    difference = inside.mean - others.mean
    degrees = inside.n + others.n - 2
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = np.sqrt(
            ((inside.n - 1) * inside.variance + (others.n - 1) * others.variance) / max(degrees, 1)
        )
        # A spread below the steps of float16 is rounding: the gene is constant.
        least = _ROUNDING * np.maximum(np.abs(inside.mean), np.abs(others.mean))
        effect = np.where(pooled > least, difference / pooled, np.nan)
    return {
        "n": inside.n,
        "n_rest": others.n,
        "mean": _rounded(inside.mean),
        "rest": _rounded(others.mean),
        "difference": _rounded(difference),
        "effect": _rounded(effect),
    }


def _rounded(values: Sums) -> list[float | None]:
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]
