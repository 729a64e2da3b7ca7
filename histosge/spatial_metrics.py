"""How well a predicted map keeps its shape: structural similarity and spatial autocorrelation, gene by gene.

Arithmetic only. Everything is taken within sections, over the spots that are handed in (the held-out ones),
as products with two sparse matrices, so that a thousand genes take milliseconds.

Terms
    raster      each spot in the lattice cell that it lies in; the step is the median distance to the nearest spot
    box         the spots within `REACH` cells of a spot along either axis: the window of the similarity
    neighbours  the `NEIGHBOURS` nearest spots of the same section (more where some tie), weighted equally
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from histosge.metrics import Floats, within_sections

REACH = 3
"""Cells on either side: a box of 7 x 7, the usual window."""
NEIGHBOURS = 6
C1, C2 = 0.01, 0.03
"""Stabilisers of the similarity, as shares of the measured range (Wang et al. 2004)."""


@dataclass(frozen=True)
class MapScores:
    """Each of shape ``(n_genes,)``; 0 where truth or prediction is constant.

    Parameters
    ----------
    ssim
        Mean structural similarity over the raster of all sections.
    moran_measured, moran_predicted
        Moran's I of truth and of prediction on the same spots.
    """

    ssim: Floats
    moran_measured: Floats
    moran_predicted: Floats

    def summary(self) -> dict[str, float]:
        """Return the means over genes, by metric."""
        return {
            "ssim": float(self.ssim.mean()),
            "moran_measured": float(self.moran_measured.mean()),
            "moran_predicted": float(self.moran_predicted.mean()),
        }


def score_maps(
    truth: NDArray[np.floating],
    predicted: NDArray[np.floating],
    section: NDArray[np.generic],
    xy_um: NDArray[np.float64],
) -> MapScores:
    """Score the shape of a predicted map.

    Parameters
    ----------
    truth, predicted
        log1p(CP10k) of held-out spots, ``(n_spots, n_genes)``.
    section
        Label of each spot's section, ``(n_spots,)``.
    xy_um
        Spot centres ``(x, y)`` in microns, ``(n_spots, 2)``.
    """
    true, guess = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    box, neighbours = _block_diagonal(section, xy_um)
    return MapScores(
        structural_similarity(true, guess, section, box),
        morans_i(true, section, neighbours),
        morans_i(guess, section, neighbours),
    )


def morans_i(values: Floats, section: NDArray[np.generic], neighbours: sparse.csr_matrix) -> Floats:
    """Return Moran's I of each column, centred within sections, ``(n_genes,)``; 0 where it is constant.

    Parameters
    ----------
    neighbours
        ``(n_spots, n_spots)``, rows sum to 1 (or to 0 for a lone spot).
    """
    z = within_sections(values, section)
    square = (z**2).sum(axis=0)
    varies = square > 1e-12 * len(z) * np.maximum(np.abs(values).max(axis=0), 1e-12) ** 2
    shared = (z * (neighbours @ z)).sum(axis=0)
    return np.asarray(np.divide(shared, square, out=np.zeros_like(square), where=varies))


def structural_similarity(
    truth: Floats, predicted: Floats, section: NDArray[np.generic], box: sparse.csr_matrix
) -> Floats:
    """Return the mean structural similarity of each column, ``(n_genes,)``.

    Cells without a held-out spot have no weight. The dynamic range is that of the truth in each section;
    a gene that does not vary there counts as 0.

    Parameters
    ----------
    box
        ``(n_spots, n_spots)``, rows sum to 1.
    """
    span = np.empty_like(truth)
    for label in np.unique(section):
        here = section == label
        span[here] = np.ptp(truth[here], axis=0)
    mean_t, mean_p = box @ truth, box @ predicted
    var_t = np.maximum(box @ truth**2 - mean_t**2, 0)
    var_p = np.maximum(box @ predicted**2 - mean_p**2, 0)
    shared = box @ (truth * predicted) - mean_t * mean_p
    c1, c2 = (C1 * span) ** 2, (C2 * span) ** 2
    above = (2 * mean_t * mean_p + c1) * (2 * shared + c2)
    below = (mean_t**2 + mean_p**2 + c1) * (var_t + var_p + c2)
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=span > 0).mean(axis=0))


def box_weights(xy_um: NDArray[np.float64]) -> sparse.csr_matrix:
    """Weigh the spots of one section that share a box of the raster, ``(n_spots, n_spots)``; rows sum to 1."""
    if len(xy_um) < 2:
        return sparse.eye(len(xy_um), format="csr")
    pitch = float(np.median(cKDTree(xy_um).query(xy_um, k=[2])[0]))
    cells = np.rint((xy_um - xy_um.min(axis=0)) / max(pitch, 1e-9))
    pairs = cKDTree(cells).query_pairs(REACH + 0.5, p=np.inf, output_type="ndarray")
    return _rows_to_one(_symmetric(pairs, len(xy_um)) + sparse.eye(len(xy_um)))


def neighbour_weights(xy_um: NDArray[np.float64]) -> sparse.csr_matrix:
    """Weigh the nearest spots of one section equally, ``(n_spots, n_spots)``; rows sum to 1."""
    n = len(xy_um)
    k = min(NEIGHBOURS, n - 1)
    if k < 1:
        return sparse.csr_matrix((n, n))
    found = cKDTree(xy_um).query(xy_um, k=list(range(2, min(2 * NEIGHBOURS, n - 1) + 2)))
    distance, nearest = (np.asarray(part) for part in found)
    # Ties with the last one count too, or the order of the file would decide between them.
    spot, place = np.nonzero(distance <= distance[:, k - 1 : k] * (1 + 1e-6))
    weights = sparse.csr_matrix((np.ones(len(spot)), (spot, nearest[spot, place])), shape=(n, n))
    return _rows_to_one(weights)


def _block_diagonal(
    section: NDArray[np.generic], xy_um: NDArray[np.float64]
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return box and neighbours over all sections, in the order of the spots."""
    parts = [np.flatnonzero(section == label) for label in np.unique(section)]
    back = np.argsort(np.concatenate(parts), kind="stable")
    whole = []
    for weights in (box_weights, neighbour_weights):
        stacked = sparse.block_diag([weights(xy_um[part]) for part in parts], format="csr")
        whole.append(sparse.csr_matrix(stacked[back][:, back]))
    return whole[0], whole[1]


def _symmetric(pairs: NDArray[np.int64], n: int) -> sparse.csr_matrix:
    i, j = pairs[:, 0], pairs[:, 1]
    ones = np.ones(2 * len(pairs))
    return sparse.csr_matrix((ones, (np.concatenate([i, j]), np.concatenate([j, i]))), shape=(n, n))


def _rows_to_one(weights: sparse.csr_matrix) -> sparse.csr_matrix:
    total = np.asarray(weights.sum(axis=1)).ravel()
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(total, 1e-12)) @ weights)
