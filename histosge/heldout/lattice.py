"""Which lattice spots lie on, from their positions alone: arithmetic, no array rows and columns of a file.

Files give array positions in many ways, or not at all; positions in microns are always there. Arrays may be rotated
and warped, so steps are followed from neighbour to neighbour and not counted from one corner.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]
NEIGHBOUR = 1.3
"""Neighbours lie within this many spot distances: the diagonal of a square is 1.41 away, a hexagon's next ring 1.73."""
MIN_ALIGNED = 0.5
"""Length of the mean direction of all neighbours, on the circle of the lattice's symmetry; random points have about 0."""
MAX_CONFLICTS = 0.05
"""Share of neighbours, at most, whose step contradicts the steps that lead around them."""
SQUARE, HEXAGONAL = 4, 6
"""Directions in which a spot has a neighbour."""


def lattice_parity(xy_um: Floats) -> NDArray[np.bool_] | None:
    """Mark every second spot of a square or hexagonal lattice.

    On a hexagonal lattice no two colours keep all neighbours apart: lines of spots in one of its three directions
    alternate, so four of six neighbours are of the other colour.

    Parameters
    ----------
    xy_um
        Spot centres, ``(n_spots, 2)``.

    Returns
    -------
    numpy.ndarray or None
        ``(n_spots,)``; in each connected part the first spot is not marked. None where there is no lattice.
    """
    tree = cKDTree(xy_um)
    pitch = float(np.median(tree.query(xy_um, k=[2])[0]))
    pairs = tree.query_pairs(NEIGHBOUR * pitch, output_type="ndarray")
    if pitch == 0 or len(pairs) == 0:
        return None
    step = xy_um[pairs[:, 1]] - xy_um[pairs[:, 0]]
    basis = _basis(step)
    if basis is None:
        return None
    # Row and column steps between two neighbours, rounded pair by pair: nothing adds up over a warped array.
    whole = np.rint(step @ np.linalg.inv(basis)).astype(np.int64)
    flips = whole.sum(axis=1) % 2 != 0
    parity = _follow(pairs, flips, len(xy_um))
    conflicts = (parity[pairs[:, 0]] ^ parity[pairs[:, 1]]) != flips
    return parity if conflicts.mean() <= MAX_CONFLICTS else None


def _basis(step: Floats) -> Floats | None:
    """Return two neighbouring lattice vectors as rows, from the steps between neighbours; None if they point anywhere."""
    angle = np.arctan2(step[:, 1], step[:, 0])
    # Angles times the symmetry: all directions of the lattice fall on one, and those of the other lattice cancel out.
    means = {fold: np.exp(1j * fold * angle).mean() for fold in (SQUARE, HEXAGONAL)}
    fold = max(means, key=lambda n: abs(means[n]))
    if abs(means[fold]) < MIN_ALIGNED:
        return None
    first = np.angle(means[fold]) / fold
    length = np.median(np.hypot(*step.T))
    directions = first + np.array([0, 2 * np.pi / fold])
    return np.asarray(length * np.stack([np.cos(directions), np.sin(directions)], axis=1))


def _follow(pairs: NDArray[np.int64], flips: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """Carry parity along a spanning tree of each connected part."""
    # Values 1 and 2, since a sparse matrix keeps no zeros.
    graph = sparse.csr_matrix((1 + flips.astype(np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    graph = graph + graph.T
    parity = np.zeros(n, dtype=bool)
    _, label = connected_components(graph, directed=False)
    for start in np.unique(label, return_index=True)[1]:
        order, before = breadth_first_order(graph, start, directed=False)
        children = order[1:]
        crossed = np.asarray(graph[children, before[children]]).ravel() == 2
        for child, flip in zip(children, crossed, strict=True):
            parity[child] = parity[before[child]] ^ flip
    return parity
