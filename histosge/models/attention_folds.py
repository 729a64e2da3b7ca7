"""Out-of-fold predictions of `dense`, whole donors or sections at a time: what `AttentionModel` learns to add to."""

from collections.abc import Callable, Sequence

import numpy as np

from histosge.models.block_training import PatchPredictions
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Indices

MAX_FOLDS = 5
"""Fits of `dense` that leave out a share of the groups each, for out-of-fold predictions."""


def donor_groups(donors: Sequence[str]) -> Indices:
    """Number sections by donor; each on its own where donors are not named for all."""
    names = [donor or f"section {number}" for number, donor in enumerate(donors)]
    return np.asarray(np.unique(names, return_inverse=True)[1].ravel(), np.int64)


def out_of_fold(
    groups: Indices,
    fit_dense: Callable[[Indices], DenseModel],
    hold_out: Callable[[DenseModel, int], PatchPredictions],
) -> list[PatchPredictions]:
    """Predict the patches under each section's spots by a `dense` that was fitted without the section's group.

    Parameters
    ----------
    hold_out
        `dense` and the number of a section -> its predictions.
    """
    fold = np.unique(groups, return_inverse=True)[1].ravel() % MAX_FOLDS
    found: dict[int, PatchPredictions] = {}
    for label in np.unique(fold):
        dense = fit_dense(np.flatnonzero(fold != label))
        for number in np.flatnonzero(fold == label).tolist():
            found[number] = hold_out(dense, number)
    return [found[number] for number in range(len(groups))]
