"""Units that a file counts in, pooled to squares of one side on their own lattice, also where that lies askew."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from histosge.data.expression.pseudo_spots import pool_spots
from histosge.data.sections import Spots
from histosge.errors import ExpressionError, HistosgeError

Floats = NDArray[np.float64]

SIDES_UM = (1.0, 500.0)
"""Least and most of a bin's side. Visium HD resolves 2 µm; squares of 500 µm hold several spots."""
WIDEST_CELL_UM = 30.0
"""Discs up to this wide are cells or beads, which lie side by side; wider ones are spots of an array, with gaps between
them (Visium 55 of 100 µm, ST 100 of 200 µm)."""
OFF_LATTICE = 0.3
"""A unit farther than this share of a step from its place on the lattice is on none."""


def check_side(side_um: float) -> None:
    """Refuse a side that no measurement has.

    Raises
    ------
    HistosgeError
        With the bounds.
    """
    if not SIDES_UM[0] <= side_um <= SIDES_UM[1]:  # NaN is refused, too
        raise HistosgeError(
            f"bins of {side_um:g} µm cannot be scored: give --at a side of {SIDES_UM[0]:g} to {SIDES_UM[1]:g} µm, such as 8"
        )


def pool_units(units: Spots, side_um: float) -> tuple[Spots, NDArray[np.int64], float]:
    """Pool what a file counts in to squares of one side.

    Units that are squares are pooled on their own lattice, k x k to a bin, from its first row and column; cells on a
    lattice from the slide's corner. Bins with less than half of their k x k units are left out.

    Returns
    -------
    bins, bin_of_unit, turned
        The bins; the bin of each unit, ``(n_units,)``, -1 for none; and degrees by which the bins lie askew.

    Raises
    ------
    ExpressionError
        If the units are wider than the side, do not divide it, or leave gaps.
    """
    unit_um = units.diameter_um
    what = "bins" if units.shape == "square" else "cells" if unit_um <= WIDEST_CELL_UM else "spots"
    gaps = units.shape != "square" and unit_um > WIDEST_CELL_UM
    if gaps and side_um >= unit_um:
        raise ExpressionError(
            f"its spots of {unit_um:g} µm leave gaps between them, so they do not measure squares of {side_um:g} µm; "
            "leave out --at: the scores at the spots are those of such a section"
        )
    if side_um < unit_um * 0.999:
        finer = "use Visium HD or Xenium as truth" if gaps else f"give --at {np.ceil(unit_um):g} or more"
        if what == "cells":
            finer += ", or put the Xenium run's transcripts.parquet into its folder"
        raise ExpressionError(
            f"{side_um:g} µm is finer than what was measured, {what} of {unit_um:.4g} µm; {finer}"
        )
    if units.shape != "square":
        pooled = pool_spots(units, side_um)
        place = np.floor(units.xy_um[:, ::-1] / side_um).astype(np.int64)
        _, index = np.unique(place, axis=0, return_inverse=True)
        return pooled, index.ravel().astype(np.int64), 0.0
    k = round(side_um / unit_um)
    if abs(k * unit_um - side_um) > 0.01 * unit_um:
        below = max(1, int(side_um // unit_um))
        raise ExpressionError(
            f"{side_um:g} µm is no whole number of its bins of {unit_um:g} µm; give --at {below * unit_um:g} or "
            f"{(below + 1) * unit_um:g}"
        )
    lattice = _SquareLattice.fit(units.xy_um)
    groups, index, n = np.unique(lattice.place // k, axis=0, return_inverse=True, return_counts=True)
    index = index.ravel()
    enough = n * 2 >= k * k
    renumber = np.where(enough, np.cumsum(enough) - 1, -1)
    bin_of_unit = renumber[index]
    kept = groups[enough]
    inside = np.flatnonzero(bin_of_unit >= 0)
    gather = sparse.csr_matrix(
        (np.ones(len(inside), np.float32), (bin_of_unit[inside], inside)), shape=(len(kept), len(units))
    )
    bins = replace(
        units,
        barcodes=np.array([f"{row}x{col}" for row, col in kept.tolist()], dtype=np.str_),
        xy_um=lattice.at(kept * k + (k - 1) / 2),
        diameter_um=side_um,
        counts=sparse.csr_matrix(gather @ units.counts),
    )
    return bins, bin_of_unit.astype(np.int64), lattice.turned_degrees


@dataclass(frozen=True)
class _SquareLattice:
    """Squares side by side, also turned against the slide.

    Parameters
    ----------
    place
        ``(row, col)`` of each unit, from 0, ``(n, 2)``.
    affine
        ``(1, row, col)`` -> ``(x, y)`` in microns, ``(3, 2)``.
    """

    place: NDArray[np.int64]
    affine: Floats

    @classmethod
    def fit(cls, xy_um: Floats) -> Self:
        """Find rows and columns from positions alone: files name them in many ways, or not at all."""
        # The nearest of all is the unit itself.
        near, index = (np.asarray(a) for a in cKDTree(xy_um).query(xy_um, k=[2, 3, 4, 5]))
        index = np.minimum(index, len(xy_um) - 1)
        # A diagonal neighbour is 1.41 steps away.
        is_step = near < 1.2 * float(np.median(near[:, 0]))
        if not is_step.any():
            raise ExpressionError(f"its {len(xy_um)} bins do not lie side by side")
        steps = (xy_um[index] - xy_um[:, None])[is_step]
        # Four times the angle: the four directions of a square fall on one.
        angle = float(np.angle(np.exp(4j * np.arctan2(steps[:, 1], steps[:, 0])).mean())) / 4
        pitch = float(np.hypot(*steps.T).mean())
        # Columns along (cos, sin), rows a quarter turn further: (x, y) = b + col * u + row * v.
        along = np.array([[-np.sin(angle), np.cos(angle)], [np.cos(angle), np.sin(angle)]]) * pitch
        middle = np.median(xy_um, axis=0)
        first = xy_um[np.argmin(((xy_um - middle) ** 2).sum(axis=1))]
        affine = np.vstack([first, along])
        place = np.zeros((len(xy_um), 2), np.int64)
        # From the middle outwards: positions rounded to pixels would be off by whole steps at the far end of a first fit.
        for reach in (50, 400, np.inf):
            place = np.rint((xy_um - affine[0]) @ np.linalg.inv(affine[1:])).astype(np.int64)
            some = np.abs(place).max(axis=1) <= reach
            if np.ptp(place[some], axis=0).min(initial=1) > 0:
                known = np.column_stack([np.ones(int(some.sum())), place[some]])
                affine = np.linalg.lstsq(known, xy_um[some], rcond=None)[0]
        place = np.rint((xy_um - affine[0]) @ np.linalg.inv(affine[1:])).astype(np.int64)
        off = np.abs((xy_um - affine[0]) @ np.linalg.inv(affine[1:]) - place).max()
        if off > OFF_LATTICE or len(np.unique(place, axis=0)) < len(place):
            raise ExpressionError(f"its bins lie on no square lattice: one is {off:.2f} of a step off")
        low = place.min(axis=0)
        affine = np.vstack([affine[0] + low @ affine[1:], affine[1:]])
        return cls(place - low, affine)

    def at(self, place: NDArray[np.floating]) -> Floats:
        """Return ``(x, y)`` in microns of rows and columns, ``(n, 2)``."""
        return np.asarray(self.affine[0] + place @ self.affine[1:])

    @property
    def turned_degrees(self) -> float:
        col = self.affine[2]
        return float(abs(np.degrees(np.arctan2(col[1], col[0]))))
