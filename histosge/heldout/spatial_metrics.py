"""Spatial metrics of a map at held-out spots: SSIM and Moran's I. Arithmetic only.

Both are per gene over held-out spots, within sections: no neighbour lies on another section.

Terms
    pitch      median distance from a held-out spot to the nearest other one
    ssim       structural similarity (Wang et al., 2004): Gaussian window of 1.5 pitches, cut at 3.5 sigma,
               constants 0.01 and 0.03 of the measured range. Summed over spots rather than pixels: on a square
               lattice this is the SSIM of the rasterised map with positions without a spot masked, and on a
               hexagonal one no raster is needed
    Moran's I  over the 6 nearest spots, weights 1/6 each: how much neighbours agree, about 0 for noise
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

SIGMA_PITCHES, CUT_SIGMAS = 1.5, 3.5
# Of a spot on the hexagonal lattice of Visium; on a square one it is four neighbours and two diagonal ones.
NEIGHBOURS = 6
RANGE_SHARE = (0.01, 0.03)
# Of one section: the sparse matrices of as many take 10 MB.
_MAX_KEPT_SPOTS = 10_000


@dataclass(frozen=True)
class SpotLattice:
    """Which held-out spots are near which: made once, used for every prediction of a fold.

    Parameters
    ----------
    window
        Gaussian weights, rows sum to 1, sparse ``(n_spots, n_spots)``.
    neighbours
        1 / number of neighbours for each of a spot's nearest, sparse ``(n_spots, n_spots)``; no row for a
        spot that is alone.
    section
        Number of the section of each spot, ``(n_spots,)``.
    """

    window: sparse.csr_matrix
    neighbours: sparse.csr_matrix
    section: NDArray[np.int64]

    @classmethod
    def from_spots(cls, xy_um: Floats, section: NDArray[np.generic]) -> Self:
        """Measure spots.

        Parameters
        ----------
        xy_um
            Centres, ``(n_spots, 2)``, each in its own section's frame.
        section
            Label of each spot's section, ``(n_spots,)``.
        """
        _, number = np.unique(section, return_inverse=True)
        spots_of = [np.flatnonzero(number == i) for i in range(int(number.max(initial=-1)) + 1)]
        windows, neighbours = zip(*(_near_kept(xy_um[spots]) for spots in spots_of), strict=True)
        # Blocks were built section by section: bring rows and columns back into the order of the spots.
        order = np.argsort(np.concatenate(spots_of))
        return cls(
            sparse.csr_matrix(sparse.block_diag(windows, format="csr")[order][:, order]),
            sparse.csr_matrix(sparse.block_diag(neighbours, format="csr")[order][:, order]),
            np.asarray(number, dtype=np.int64).ravel(),
        )

    def ssim(self, truth: Floats, predicted: Floats) -> Floats:
        """Return each gene's structural similarity, mean over spots, ``(n_genes,)``.

        A gene that does not vary in a section is left out there; one that varies in none gets 0.
        """
        # Of the measured values alone: a range that included the prediction would reward a wild one.
        span = self._span(truth)[self.section]
        c1, c2 = ((share * span) ** 2 for share in RANGE_SHARE)
        w = self.window
        mean_t, mean_p = w @ truth, w @ predicted
        # E[x²] - E[x]² may fall below 0 by rounding where a window is flat.
        var_t = np.maximum(w @ truth**2 - mean_t**2, 0)
        var_p = np.maximum(w @ predicted**2 - mean_p**2, 0)
        both = w @ (truth * predicted) - mean_t * mean_p
        above = (2 * mean_t * mean_p + c1) * (2 * both + c2)
        below = (mean_t**2 + mean_p**2 + c1) * (var_t + var_p + c2)
        varies = span > 0
        values = np.divide(above, below, out=np.zeros_like(above), where=varies & (below > 0))
        return np.asarray(values.sum(axis=0) / np.maximum(varies.sum(axis=0), 1))

    def moran(self, values: Floats) -> Floats:
        """Return each gene's Moran's I, ``(n_genes,)``; 0 for a gene that does not vary."""
        centred = values - self._mean(values)[self.section]
        # Residuals of a constant are rounding errors; they are set to 0, so that they make no pattern.
        centred[np.abs(centred) <= 1e-6 * np.abs(values).max(axis=0, initial=0.0)] = 0.0
        spread, n = (centred**2).sum(axis=0), len(values)
        total = self.neighbours.sum()
        if total == 0:
            return np.zeros(values.shape[1])
        together = (centred * (self.neighbours @ centred)).sum(axis=0)
        return np.asarray(
            np.divide(n * together, total * spread, out=np.zeros_like(spread), where=spread > 0)
        )

    def _mean(self, values: Floats) -> Floats:
        return np.stack([values[self.section == i].mean(axis=0) for i in range(int(self.section.max()) + 1)])

    def _span(self, values: Floats) -> Floats:
        return np.stack(
            [np.ptp(values[self.section == i], axis=0) for i in range(int(self.section.max()) + 1)]
        )


_Near = tuple[sparse.csr_matrix, sparse.csr_matrix]


def _near_kept(xy_um: Floats) -> _Near:
    """Return `_near` of a section's spots: kept, as all methods and controls of a fold are scored at the same spots."""
    if len(xy_um) > _MAX_KEPT_SPOTS:
        return _near(xy_um)
    return _near_of_bytes(np.ascontiguousarray(xy_um, np.float64).tobytes())


@lru_cache(maxsize=8)
def _near_of_bytes(xy_um: bytes) -> _Near:
    # An array cannot be the key of a cache: its bytes can.
    return _near(np.frombuffer(xy_um, np.float64).reshape(-1, 2))


def _near(xy_um: Floats) -> _Near:
    """Return the window and the neighbours of one section's spots."""
    n = len(xy_um)
    if n < 2:
        return sparse.csr_matrix(np.eye(n)), sparse.csr_matrix((n, n))
    tree, k = cKDTree(xy_um), min(NEIGHBOURS, n - 1)
    found = tree.query(xy_um, k=list(range(1, k + 2)))
    distance, nearest = np.asarray(found[0]), np.asarray(found[1])
    # At least a little: spots may share a position, and a width of 0 would divide by it.
    sigma = SIGMA_PITCHES * max(float(np.median(distance[:, 1])), 1e-9)
    i, j = tree.query_pairs(CUT_SIGMAS * sigma, output_type="ndarray").T
    weight = np.exp(-((np.linalg.norm(xy_um[i] - xy_um[j], axis=1) / sigma) ** 2) / 2)
    alone = np.arange(n)
    rows, cols = np.concatenate([i, j, alone]), np.concatenate([j, i, alone])
    window = sparse.csr_matrix((np.concatenate([weight, weight, np.ones(n)]), (rows, cols)), shape=(n, n))
    window = sparse.csr_matrix(sparse.diags(1 / np.asarray(window.sum(axis=1)).ravel()) @ window)
    # A spot is usually its own nearest, but not where another has the same position: leave it out by its number.
    others = np.array([[b for b in row if b != a][:k] for a, row in enumerate(nearest)]).ravel()
    neighbours = sparse.csr_matrix((np.full(n * k, 1 / k), (np.repeat(alone, k), others)), shape=(n, n))
    return window, neighbours
