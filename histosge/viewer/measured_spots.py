"""The measured spots of a slide, gene by gene, as the models are trained on them: log1p of counts per 10,000."""

import threading
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.genes import log_cp10k
from histosge.data.sections import Spots

MAX_BARCODES = 50_000
"""Spots whose barcodes are sent. Those of more, such as the bins of Visium HD, would be 10 MB."""


class MeasuredSpots:
    """One section's spots, read when they are first needed.

    Parameters
    ----------
    sample
        A row of a sample sheet that names expression.
    mpp, size_px
        Of the slide at level 0: microns per pixel, and ``(width, height)``.
    """

    def __init__(self, sample: Sample, mpp: float, size_px: tuple[int, int] | None = None) -> None:
        self._sample = sample
        self._frame = SlideFrame(sample.slide_id, sample.donor, mpp, size_px)
        self._lock = threading.Lock()

    @property
    def spots(self) -> Spots:
        """The spots, with raw counts."""
        # Reading takes seconds to minutes, and the page sends several requests at once.
        with self._lock:
            return self._spots

    @cached_property
    def _spots(self) -> Spots:
        return find_expression(str(self._sample.expression), self._frame).spots

    @property
    def log_values(self) -> sparse.csr_matrix:
        """log1p of counts per 10,000, ``(n_spots, n_genes)``."""
        with self._lock:
            return self._log_values

    @cached_property
    def _log_values(self) -> sparse.csr_matrix:
        return log_cp10k(self._spots).tocsr()

    @cached_property
    def _columns(self) -> sparse.csc_matrix:
        # By columns: the page takes one gene after the other.
        return self.log_values.tocsc()

    @cached_property
    def column(self) -> dict[str, int]:
        """Gene -> its number."""
        return {str(gene): number for number, gene in enumerate(self.spots.genes)}

    def describe(self, genes: list[str] | None = None) -> dict[str, Any]:
        """Return places, diameter, names and genes.

        Parameters
        ----------
        genes
            Only these, in this order; all if None.
        """
        spots = self.spots
        return {
            "xy_um": np.round(spots.xy_um, 2).tolist(),
            "diameter_um": spots.diameter_um,
            "barcodes": spots.barcodes.tolist() if len(spots) <= MAX_BARCODES else None,
            "genes": list(spots.genes) if genes is None else genes,
            "unit": "log1p of counts per 10,000",
        }

    def values(self, gene: int) -> NDArray[np.float16]:
        """Return a gene in every spot.

        Raises
        ------
        LookupError
            If there is no such gene.
        """
        if not 0 <= gene < len(self.spots.genes):
            raise LookupError(f"there is no measured gene {gene}")
        return self._columns[:, [gene]].toarray().ravel().astype(np.float16)
