"""Pseudo-spots: cells or small bins with too few counts each to learn from, added up over squares.

Used only where most spots have fewer counts than the minimum, and a spot is far smaller than a step of the grid.
"""

from dataclasses import replace

import numpy as np
from scipy import sparse

from histosge.data.genes import MIN_COUNTS, library_size
from histosge.data.sections import Spots


def needs_pooling(spots: Spots, stride_um: float, min_counts: int = MIN_COUNTS) -> bool:
    """Tell whether most spots hold fewer counts than the minimum, and several fit into one step of the grid."""
    # Half a step: four spots or more in a square. Larger ones are left as they are, since pooling would blur them.
    return spots.diameter_um <= stride_um / 2 and float(np.median(library_size(spots))) < min_counts


def pool_spots(spots: Spots, side_um: float) -> Spots:
    """Add up the spots whose centres lie in one square of a lattice from the slide's corner.

    Parameters
    ----------
    side_um
        Of a square: the side of the pseudo-spots that come out.

    Returns
    -------
    Spots
        Square, one per square that holds a spot, row by row; barcodes are ``<row>x<col>`` of the lattice.
    """
    # From the slide's corner, not from the spots: two sections, or two runs, get the same squares.
    place = np.floor(spots.xy_um[:, ::-1] / side_um).astype(np.int64)
    squares, index = np.unique(place, axis=0, return_inverse=True)
    ones = np.ones(len(spots), np.float32)
    gather = sparse.csr_matrix(
        (ones, (index.ravel(), np.arange(len(spots)))), shape=(len(squares), len(spots))
    )
    return replace(
        spots,
        barcodes=np.array([f"{row}x{col}" for row, col in squares.tolist()], dtype=np.str_),
        xy_um=(squares[:, ::-1].astype(np.float64) + 0.5) * side_um,
        diameter_um=side_um,
        counts=sparse.csr_matrix(gather @ spots.counts),
        shape="square",
    )
