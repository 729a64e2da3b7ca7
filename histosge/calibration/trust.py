"""Which genes to trust: a lower confidence limit of the correlation at spots that a model was fitted without.

Genes that have nothing to do with the picture but are smooth in space must not pass. Three things see to that: the limit
counts effective spots (`effective_spots`); in a lone section the correlation must also remain after what neighbouring
training spots tell (`neighbour_prediction`); and with several donors a gene that fails in more than one of ten has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.calibration.depth_strata import gene_parts
from histosge.calibration.effective_spots import pearson_lower_limit
from histosge.calibration.neighbour_prediction import remove_explained
from histosge.calibration.values_on_disk import ValuesOnDisk
from histosge.heldout.metrics import correlate
from histosge.threads import prefetch

Values = NDArray[np.float32]

FAILING_DONORS = 0.1
"""Share of held-out donors in which a trusted gene may correlate at or below zero."""


@dataclass(frozen=True)
class OutOfFold:
    """Held-out spots of all folds, predicted by the fits without them.

    Parameters
    ----------
    truth, predicted
        log1p(CP10k), ``(n_spots, n_genes)``; on disk where they are many.
    xy_um
        ``(n_spots, 2)`` microns.
    label
        Section within a fold, ``(n_spots,)``: correlations are taken within it.
    fold, donor
        Which fold held a spot out, and its donor's number, ``(n_spots,)``.
    depth
        Predicted, ``(n_spots,)``; None where the model predicts none.
    from_neighbours
        What the training spots beside held-out ones tell about them, ``(n_spots, n_genes)`` each; empty where nothing of a
        held-out section is trained on.
    """

    truth: Values | ValuesOnDisk
    predicted: Values | ValuesOnDisk
    xy_um: NDArray[np.float64]
    label: NDArray[np.int64]
    fold: NDArray[np.int64]
    donor: NDArray[np.int64]
    depth: NDArray[np.float64] | None = None
    from_neighbours: Sequence[NDArray[np.float64]] = ()


def measure_trust(spots: OutOfFold, *, threads: int = 1) -> Values:
    """Return each gene's trust, 0 to 1, ``(n_genes,)``; `threads` work on genes side by side."""
    trust = pearson_lower_limit(spots.truth, spots.predicted, spots.xy_um, spots.label, threads=threads)
    if spots.from_neighbours:
        truth, predicted = (
            remove_explained(values[:, :], spots.from_neighbours, spots.label)
            for values in (spots.truth, spots.predicted)
        )
        # Both limits: the regression on what neighbours tell takes degrees of freedom that it does not account for.
        limit = pearson_lower_limit(truth, predicted, spots.xy_um, spots.label, threads=threads)
        trust = np.minimum(trust, limit)
    donors = np.unique(spots.donor)
    if len(donors) > 1:
        failing = _share_of_failing_donors(spots, donors, threads)
        trust = np.where(failing > FAILING_DONORS, np.float32(0), trust)
    return trust


def _share_of_failing_donors(
    spots: OutOfFold, donors: NDArray[np.int64], threads: int
) -> NDArray[np.float64]:
    """Return the share of donors on which each gene correlates at or below zero, ``(n_genes,)``."""

    # Genes outside, donors inside: values of all spots may lie on disk, and are read once.
    def of_genes(some: NDArray[np.int64]) -> NDArray[np.float64]:
        truth, predicted = spots.truth[:, some], spots.predicted[:, some]
        failing = np.zeros(len(some))
        for donor in donors:
            here = spots.donor == donor
            pearson, _ = correlate(
                truth[here].astype(np.float64), predicted[here].astype(np.float64), spots.label[here]
            )
            failing += pearson <= 0
        return failing / len(donors)

    parts = gene_parts(np.arange(spots.truth.shape[1]), len(spots.truth))
    return np.concatenate(list(prefetch(of_genes, parts, threads)))
