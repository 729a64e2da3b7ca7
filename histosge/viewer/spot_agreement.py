"""How well a map agrees with the measured spots of its own slide, gene by gene.

This is no score: where the model was trained on the slide's spots, or conditioned on them, the map agrees by construction.
The page says which it is beside the number.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.sections import Patches, Spots
from histosge.data.spot_overlap import spot_overlap, spots_from_patches
from histosge.prediction.stored_map import StoredMap

LEAST_SPOTS = 3
"""Two points have a correlation of 1 or -1, whatever they are."""


class SpotAgreement:
    """The patches of one map under the spots of its slide.

    Parameters
    ----------
    stored
        The map.
    spots
        Of the same slide.
    known
        Patches that hold a prediction, ``(n_rows, n_cols)``.
    """

    def __init__(self, stored: StoredMap, spots: Spots, known: NDArray[np.bool_]) -> None:
        self._rows, self._cols = np.nonzero(known)
        nothing = np.empty((len(self._rows), 0), np.float32)
        patches = Patches.on_grid(stored.slide_id, stored.grid, self._rows, self._cols, nothing)
        overlap: sparse.csr_matrix = spot_overlap(spots, patches)
        # Spots beside the map have no prediction to compare.
        self._kept = np.flatnonzero(np.diff(overlap.indptr) > 0)
        self._overlap = overlap[self._kept]

    def pearson(self, predicted: NDArray[Any], measured: NDArray[Any]) -> dict[str, Any]:
        """Return ``r``, None where it is not defined, and the number ``n`` of spots.

        Parameters
        ----------
        predicted
            A gene over the grid, ``(n_rows, n_cols)``.
        measured
            The same in every spot, ``(n_spots,)``.
        """
        n = len(self._kept)
        if n < LEAST_SPOTS:
            return {"r": None, "n": n}
        patches = predicted[self._rows, self._cols].astype(np.float64)[:, None]
        at_spots = spots_from_patches(self._overlap, patches)[:, 0].astype(np.float64)
        truth = np.asarray(measured, dtype=np.float64)[self._kept]
        spread = at_spots.std() * truth.std()
        if not np.isfinite(spread) or spread < 1e-9:
            return {"r": None, "n": n}
        r = ((at_spots - at_spots.mean()) * (truth - truth.mean())).mean() / spread
        return {"r": round(float(r), 4), "n": n}
