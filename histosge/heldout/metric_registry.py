"""The extension point "metric": how a prediction of held-out spots is scored, gene by gene.

A metric is one module of `histosge.heldout.gene_metrics`, or of another package that offers it as an entry point of
the group ``histosge.metrics``; each declares one `Metric`. An evaluation computes all of them: each is a column of
genes.csv, a row of scores.csv and a column of the report. Pearson is not among them: it decides which genes count as
undefined, and has figures of its own (`histosge.heldout.metrics`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featurestore.extensions import Registry
from histosge.errors import HistosgeError
from histosge.heldout.spatial_metrics import SpotLattice

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredSpots:
    """What a metric may know of the held-out spots beside truth and prediction.

    Parameters
    ----------
    depth
        Total counts of every spot, positive, ``(n_spots,)``.
    section
        Label of the section that each spot lies on, ``(n_spots,)``. Sections differ in batch: take means, ranks and
        neighbours within a section, never across.
    xy_um
        Centres in microns, each in its own section's frame, ``(n_spots, 2)``.
    """

    depth: NDArray[np.number]
    section: NDArray[np.generic]
    xy_um: Floats

    # Made once for all metrics of a prediction, and not at all where none asks for it.
    @cached_property
    def lattice(self) -> SpotLattice:
        """Which spots are near which; made when it is first used."""
        return SpotLattice.from_spots(self.xy_um, self.section)


Score = Callable[[Floats, Floats, ScoredSpots], Floats]
"""``(truth, predicted, spots)`` -> one value per gene, ``(n_genes,)``; truth and prediction are log1p(CP10k),
``(n_spots, n_genes)``. A gene for which it is not defined gets what no skill at all would get, never NaN."""


@dataclass(frozen=True)
class Metric:
    """A score per gene.

    Parameters
    ----------
    name
        Its column in genes.csv.
    help
        One line for documentation.
    score
        See `Score`.
    title
        Heading of its column in the report; empty: the name.
    summary
        Its name in scores.csv, where it is the mean over genes; empty: ``<name>_mean``.
    """

    name: str
    help: str
    score: Score
    title: str = ""
    summary: str = ""

    @property
    def heading(self) -> str:
        """The heading of its column in the report."""
        return self.title or self.name

    @property
    def summary_name(self) -> str:
        """Its name in scores.csv."""
        # Errors and spatial metrics of ours were written under their own name before there was a rule.
        return self.summary or f"{self.name}_mean"

    def __call__(self, truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
        """Score, and check what came of it.

        Raises
        ------
        HistosgeError
            If the values are not one finite number per gene.
        """
        # A metric may be anybody's. A NaN would vanish from one mean and spread through another, so it is refused.
        values = np.asarray(self.score(truth, predicted, spots), np.float64)
        if values.shape != truth.shape[1:] or not np.isfinite(values).all():
            raise HistosgeError(
                f"metric {self.name!r} returned shape {values.shape} with {int((~np.isfinite(values)).sum())} values "
                f"that are not finite for {truth.shape[1]} genes: return one finite value per gene"
            )
        return values


METRICS = Registry("metrics", "histosge.heldout.gene_metrics", Metric, HistosgeError)
