"""Which regular lattice the corners of another tool's patches are on. Arithmetic alone.

Terms
    step    from one patch to the next, level-0 px
    origin  corner of the lattice's first patch, at least 0 and less than a step from the slide's corner
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEAR_PX = 1.0
"""How far from its place on the lattice a corner may be: other tools round corners to whole level-0 pixels."""


@dataclass(frozen=True)
class Lattice:
    """Corners on a lattice.

    Parameters
    ----------
    origin_px
        ``(x, y)``.
    rows, cols
        Position of each patch, shape ``(n,)``.
    is_on
        Which patches are on the lattice, shape ``(n,)``.
    """

    origin_px: tuple[float, float]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    is_on: NDArray[np.bool_]


def find_step(corners: NDArray[np.float64]) -> float:
    """Return the step that most neighbours in a row or column are apart; 0 if no two patches share one."""
    gaps = np.concatenate([_gaps(corners[:, 0], corners[:, 1]), _gaps(corners[:, 1], corners[:, 0])])
    if not len(gaps):
        return 0.0
    # The commonest, not the greatest common divisor: that is 1 as soon as two pieces of tissue have lattices of their own.
    values, counts = np.unique(np.rint(gaps), return_counts=True)
    usual = values[counts.argmax()]
    return float(gaps[np.abs(gaps - usual) <= NEAR_PX].mean())


def _gaps(along: NDArray[np.float64], across: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.lexsort((along, across))
    step, same_line = np.diff(along[order]), np.diff(across[order]) == 0
    return np.asarray(step[same_line & (step > NEAR_PX)])


def find_lattice(corners: NDArray[np.float64], step: float) -> Lattice:
    """Place corners on the lattice of a step that most of them are on.

    Parameters
    ----------
    corners
        ``(x, y)`` in level-0 px, shape ``(n, 2)``, not negative.
    """
    x, y = (_origin(axis, step) for axis in corners.T)
    place = (corners - (x, y)) / step
    nearest = np.rint(place).astype(np.int64)
    is_on = (np.abs(place - nearest).max(axis=1) * step <= NEAR_PX) & (nearest >= 0).all(axis=1)
    return Lattice((x, y), nearest[:, 1], nearest[:, 0], is_on)


def _origin(positions: NDArray[np.float64], step: float) -> float:
    """Return the remainder, divided by the step, that most positions share up to `NEAR_PX`."""
    remainders = np.sort(positions % step)
    # 0 before all others: a lattice from the slide's corner is one even where rounding moved all of its corners.
    if (np.minimum(remainders, step - remainders) <= NEAR_PX).all():
        return 0.0
    around = np.concatenate([remainders - step, remainders, remainders + step])
    candidates = np.unique(remainders)
    first = np.searchsorted(around, candidates - NEAR_PX, "left")
    last = np.searchsorted(around, candidates + NEAR_PX, "right")
    best = int((last - first).argmax())
    near = around[first[best] : last[best]]
    return float(np.median(near) % step)
