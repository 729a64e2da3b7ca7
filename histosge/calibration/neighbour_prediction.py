"""What the training spots beside held-out ones tell about them, without the picture.

Where parts of a lone section are held out, the rest of it lies beside them. A gene that is smooth in space continues
across the border, and a model whose inputs vary smoothly predicts that without any help of the picture. For a gene that
has nothing to do with the picture, what kriging from the training spots leaves unexplained is independent of everything
that the model saw. Trust is therefore also taken of that residual. Arithmetic only.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from histosge.heldout.metrics import within_sections
from histosge.heldout.smooth_fields import spot_pitch_um

Floats = NDArray[np.float64]

LENGTHS = (1.0, 3.0)
"""Of the covariances, in spot pitches; a regression combines what both predict. A dozen lengths and nuggets took out no more
of smooth fields, but cost so many degrees of freedom that five times as many were trusted."""
NUGGET = 0.1
"""Variance of what a spot does not share with its neighbours, relative to what it shares. Counting noise is often ten times
that; the regression scales the prediction down."""
MAX_TRAINING_SPOTS = 2000
"""Those nearest to held-out spots are used, at most: kriging costs the cube of their number, and others tell little."""


def predict_from_neighbours(
    training_xy_um: NDArray[np.floating], training: NDArray[np.floating], xy_um: NDArray[np.floating]
) -> list[Floats]:
    """Return what positions alone tell: a kriging prediction for each of `LENGTHS`, ``(n_spots, n_genes)`` each.

    Parameters
    ----------
    training_xy_um, training
        Positions ``(n, 2)`` microns of the training spots, and their values ``(n, n_genes)``.
    xy_um
        Positions of the held-out spots.
    """
    pitch = max(spot_pitch_um(training_xy_um), 1e-6)
    nearest = np.argsort(np.asarray(cKDTree(xy_um).query(training_xy_um)[0]), kind="stable")[
        :MAX_TRAINING_SPOTS
    ]
    training_xy_um, training = training_xy_um[nearest], training[nearest]
    among, across = cdist(training_xy_um, training_xy_um) / pitch, cdist(xy_um, training_xy_um) / pitch
    mean = training.mean(axis=0, dtype=np.float64)
    centred = training.astype(np.float64) - mean
    found = []
    for length in LENGTHS:
        # Squared exponential: the smoothest there is, so the one that continues furthest.
        covariance, reach = (np.exp(-(distance**2) / (2 * length**2)) for distance in (among, across))
        weights = np.linalg.solve(covariance + NUGGET * np.eye(len(covariance)), centred)
        found.append(np.asarray(mean + reach @ weights))
    return found


def remove_explained(
    values: NDArray[np.floating], explained_by: Sequence[Floats], labels: NDArray[np.generic]
) -> Floats:
    """Return the residuals of a regression, gene by gene, on other values of the gene, within labels.

    Parameters
    ----------
    values, explained_by
        ``(n_spots, n_genes)`` each.
    labels
        ``(n_spots,)``: each label's mean is removed first.
    """
    residual = within_sections(values.astype(np.float64), labels)
    # One after another, each freed of those before it (Gram-Schmidt): there are two, and all genes go at once.
    basis: list[Floats] = []
    for part in explained_by:
        column = within_sections(part, labels)
        size = np.linalg.norm(column, axis=0)
        for earlier in basis:
            column = column - earlier * (earlier * column).sum(axis=0)
        rest = np.linalg.norm(column, axis=0)
        # What is left of a column that repeats the ones before it is rounding.
        column = np.divide(column, rest, out=np.zeros_like(column), where=rest > 1e-6 * size)
        basis.append(column)
        residual = residual - column * (column * residual).sum(axis=0)
    return residual
