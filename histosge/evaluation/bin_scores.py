"""How well a map fits measured bins that are finer than the spots of training: arithmetic on one fold.

The map is what a user gets: the patches' values, as rates, averaged over the area of each bin. Truth is log1p(CP10k) of
the bin's own counts. A fold's bins hold no count of a training spot.

Terms
    within spots   after the mean of each square as wide as a spot is taken from truth and prediction: what a map shows
                   that no measurement of spots shows. A map that is constant within spots scores 0
    attainable     correlation that the true rates would reach with counts as few as these, see `attainable`
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.genes import SCALE, gene_columns, library_size, select_target
from histosge.data.sections import Section, Spots
from histosge.data.spot_overlap import square_overlap
from histosge.evaluation.fine_bins import FineBins, spot_squares
from histosge.evaluation.methods import BinModel
from histosge.evaluation.tasks import Task
from histosge.heldout.metrics import correlate, rank_within, varies

Floats = NDArray[np.float64]
MIN_BINS = 20
"""Bins that a fold needs, as many as a section needs spots."""


@dataclass(frozen=True)
class BinScores:
    """Scores of one prediction at the bins of a fold.

    Parameters
    ----------
    values
        Metric, with the bin's size in its name -> value: rows of scores.csv.
    pearson, within_spots
        Per gene, ``(n_genes,)``; 0 where it is not defined.
    """

    values: dict[str, float]
    pearson: Floats
    within_spots: Floats


@dataclass(frozen=True)
class HeldOutBins:
    """The bins of one fold with what is true of them: the same for every method.

    Parameters
    ----------
    side_um
        Of a bin.
    parts
        For each section with bins: its number among the task's, the patches that held-out spots may see (None: all), and
        the bins with their overlap on these.
    truth
        log1p(CP10k), ``(n_bins, n_genes)``.
    depth, section, square
        Total counts, section and square as wide as a spot of each bin, ``(n_bins,)``.
    attainable
        See `attainable`.
    gene_counts
        Counts of a gene in a bin: the mean over bins, of the median gene.
    """

    side_um: float
    parts: tuple[tuple[int, NDArray[np.bool_] | None, Spots, sparse.csr_matrix], ...]
    truth: Floats
    depth: Floats
    section: NDArray[np.int64]
    square: NDArray[np.int64]
    attainable: float
    gene_counts: float

    @classmethod
    def from_task(cls, bins: FineBins, task: Task) -> Self | None:
        """Take the bins without a count of a training spot; None where a fold has too few."""
        parts, truth, counts = [], [], []
        for number, section in enumerate(task.sections):
            if section.slide_id not in bins.sections or not task.fold.test[section.slide_id].any():
                continue
            own = bins.sections[section.slide_id]
            keep = np.flatnonzero(own.held_out(task.fold.test[section.slide_id]))
            split = task.patch_splits.get(section.slide_id)
            seen = None if split is None or split.test.all() else split.test
            overlap = square_overlap(own.spots.xy_um[keep], bins.side_um, section.patches)
            if seen is not None:
                # As for spots: a bin that lost part of its patches would be scored by another mean than its own.
                whole = np.asarray(overlap[:, seen].sum(axis=1)).ravel() > 1 - 1e-6
                keep, overlap = keep[whole], overlap[whole][:, seen]
            if not len(keep):
                continue
            spots = replace(
                own.spots,
                barcodes=own.spots.barcodes[keep],
                xy_um=own.spots.xy_um[keep],
                counts=own.spots.counts[keep],
            )
            parts.append((number, seen, spots, sparse.csr_matrix(overlap)))
            truth.append(select_target(spots, task.genes).astype(np.float64))
            counts.append(spots.counts[:, gene_columns(spots, task.genes)].toarray().astype(np.float64))
        if sum(len(part[2]) for part in parts) < MIN_BINS:
            return None
        label = np.concatenate([np.full(len(part[2]), number) for number, part in enumerate(parts)])
        squares = [spot_squares(part[2].xy_um, bins.spot_um) for part in parts]
        first = np.cumsum([0, *(int(square.max()) + 1 for square in squares)])
        depth = np.concatenate([library_size(part[2]) for part in parts])
        all_counts = np.concatenate(counts)
        return cls(
            bins.side_um,
            tuple(parts),
            np.concatenate(truth),
            depth,
            label,
            np.concatenate([square + start for square, start in zip(squares, first, strict=False)]),
            attainable(all_counts, depth, label),
            float(np.median(all_counts.mean(axis=0))),
        )

    def score_method(self, task: Task, fitted: object) -> BinScores | None:
        """Predict and score; None if the method predicts no map."""
        predicted = self.predict(task, fitted)
        return None if predicted is None else self.score(predicted)

    def predict(self, task: Task, fitted: object) -> Floats | None:
        """Return log1p(CP10k) of the bins by a fitted method, ``(n_bins, n_genes)``; None if it predicts no map.

        Parameters
        ----------
        task
            This fold, with the embeddings that the method was fitted on.
        """
        if not isinstance(fitted, BinModel):
            return None
        sections = [
            _with_bins(task.sections[number], seen, spots, overlap)
            for number, seen, spots, overlap in self.parts
        ]
        return np.concatenate([fitted.predict_bins(section) for section in sections]).astype(np.float64)

    def score(self, predicted: Floats) -> BinScores:
        """Score log1p(CP10k) of the bins, ``(n_bins, n_genes)``."""
        at = bin_suffix(self.side_um)
        pearson, undefined = correlate(self.truth, predicted, self.section)
        adjusted, _ = correlate(self.truth, predicted, self.section, np.log(self.depth))
        ranks = (rank_within(self.truth, self.section), rank_within(predicted, self.section))
        spearman, _ = correlate(ranks[0], ranks[1], self.section)
        values = {
            f"pearson_mean_{at}": float(pearson.mean()),
            f"pearson_median_{at}": float(np.median(pearson)),
            f"pearson_depth_adjusted_{at}": float(adjusted.mean()),
            f"spearman_mean_{at}": float(spearman.mean()),
            f"mse_{at}": float(((self.truth - predicted) ** 2).mean()),
            f"n_nan_genes_{at}": float(undefined.sum()),
            f"attainable_{at}": self.attainable,
            f"n_bins_{at}": float(len(self.truth)),
            f"median_counts_{at}": float(np.median(self.depth)),
            f"gene_counts_{at}": self.gene_counts,
        }
        within = np.zeros(self.truth.shape[1])
        # Where a bin is as wide as a spot there is nothing within one.
        if len(np.unique(self.square)) * 2 <= len(self.square):
            within = within_squares(self.truth, predicted, self.square)
            values[f"pearson_within_spots_{at}"] = float(within.mean())
        return BinScores(values, pearson, within)


def bin_suffix(side_um: float) -> str:
    """Return what ends the names of metrics at bins: ``at_8um``."""
    return f"at_{side_um:g}um"


def within_squares(truth: Floats, predicted: Floats, square: NDArray[np.int64]) -> Floats:
    """Correlate gene by gene after each square's mean is removed from both, ``(n_genes,)``; 0 where undefined."""
    n = np.bincount(square)
    gather = sparse.csr_matrix((np.ones(len(square)), (square, np.arange(len(square)))))
    left, right = (
        values - (np.asarray(gather @ values) / np.maximum(n, 1)[:, None])[square]
        for values in (truth, predicted)
    )
    left_sq, right_sq = (left**2).sum(axis=0), (right**2).sum(axis=0)
    defined = varies(left_sq, truth) & varies(right_sq, predicted)
    scale = np.sqrt(left_sq * right_sq)
    return np.asarray(np.divide((left * right).sum(axis=0), scale, out=np.zeros_like(scale), where=defined))


def attainable(counts: Floats, depth: Floats, section: NDArray[np.int64]) -> float:
    """Estimate the mean correlation over genes that the true rates would have with counts as few as these.

    Each bin's molecules are dealt into two parts by chance. The correlation r of log1p(CP10k) of the parts gives the
    reliability of the whole, 2 r / (1 + r) (Spearman 1910, Brown 1910), and its root is the correlation with the truth.
    On synthetic bins of 10 to 1,000 counts it lay between 0.93 and 1.13 of that correlation: the logarithm is not linear.

    Parameters
    ----------
    counts, depth
        Of the chosen genes, ``(n_bins, n_genes)``, and in all, ``(n_bins,)``.
    """
    rng = np.random.default_rng(0)
    whole = counts.astype(np.int64)
    one = rng.binomial(whole, 0.5)
    rest = np.maximum(depth - counts.sum(axis=1), 0).astype(np.int64)
    size = one.sum(axis=1) + rng.binomial(rest, 0.5)
    parts = [
        np.log1p(values * (SCALE / np.maximum(total, 1))[:, None])
        for values, total in ((one, size), (whole - one, depth - size))
    ]
    # Depth adjusted: both parts share the bin's depth, which the logarithm of few counts follows.
    r, _ = correlate(parts[0], parts[1], section, np.log(depth))
    return float(np.sqrt(np.clip(2 * r / (1 + r), 0, 1)).mean())


def _with_bins(
    section: Section, seen: NDArray[np.bool_] | None, spots: Spots, overlap: sparse.csr_matrix
) -> Section:
    patches = section.patches if seen is None else section.patches.take(seen)
    return replace(section, patches=patches, spots=spots, overlap=overlap)
