"""How well a prediction fits held-out spots, gene by gene: arithmetic only.

It splits nothing and chooses nothing: whoever calls it has kept the test spots apart.

Every correlation is taken *within* sections: each section's own mean is removed from truth and
prediction first. Otherwise a model that only knows which section a spot lies on would score.

Terms
    truth, predicted   log1p(CP10k), shape (n_spots, n_genes)
    depth              a spot's total counts (its library size)
    NaN gene           a gene whose correlation is not defined, since truth or prediction is
                       constant: it counts as 0, and is counted
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from histosge.heldout.spatial_metrics import SpotLattice

Floats = NDArray[np.float64]

CONSTANT = 1e-6
"""A spread below this share of a gene's largest value is rounding, not a map: float32 leaves about 6e-8."""

TOP = 50
"""Genes behind `pearson_top50`."""


@dataclass(frozen=True)
class GeneScores:
    """One prediction's scores, each of shape ``(n_genes,)``.

    Parameters
    ----------
    pearson, pearson_depth_adjusted, spearman
        Correlation over spots, within sections; 0 where it is not defined.
    mse, mae
        Over spots, in log1p(CP10k).
    r2
        1 - squared error / squared deviation from each section's own mean; 0 where truth is constant.
    undefined
        True where `pearson` is not defined and was set to 0.
    ssim, moran_measured, moran_predicted
        Structural similarity of the map, and Moran's I of truth and prediction; NaN without a lattice.
    """

    pearson: Floats
    pearson_depth_adjusted: Floats
    spearman: Floats
    mse: Floats
    mae: Floats
    r2: Floats
    undefined: NDArray[np.bool_]
    ssim: Floats
    moran_measured: Floats
    moran_predicted: Floats

    def summary(self, top: NDArray[np.bool_]) -> dict[str, float]:
        """Return the scores of a whole prediction, by metric.

        Parameters
        ----------
        top
            True for the genes behind `pearson_top50`, shape ``(n_genes,)``. They must have been picked
            on the training part: picking the best on the test spots gives noise 0.10.
        """
        space = {
            "ssim": self.ssim,
            "moran_measured": self.moran_measured,
            "moran_predicted": self.moran_predicted,
        }
        return {
            "pearson_mean": float(self.pearson.mean()),
            "pearson_median": float(np.median(self.pearson)),
            "pearson_top50": float(self.pearson[top].mean()),
            "pearson_depth_adjusted": float(self.pearson_depth_adjusted.mean()),
            "spearman_mean": float(self.spearman.mean()),
            "mse": float(self.mse.mean()),
            "mae": float(self.mae.mean()),
            "r2": float(self.r2.mean()),
            "n_genes": float(len(self.pearson)),
            "n_nan_genes": float(self.undefined.sum()),
            "n_constant": float(self.undefined.sum()),
            **{name: float(v.mean()) for name, v in space.items() if not np.isnan(v).any()},
        }


def score_genes(
    truth: NDArray[np.floating],
    predicted: NDArray[np.floating],
    depth: NDArray[np.number],
    section: NDArray[np.generic],
    lattice: SpotLattice | None = None,
) -> GeneScores:
    """Score a prediction of held-out spots.

    Parameters
    ----------
    truth, predicted
        log1p(CP10k), shape ``(n_spots, n_genes)``.
    depth
        Total counts of every spot, positive, shape ``(n_spots,)``.
    section
        Label of the section that each spot lies on, shape ``(n_spots,)``.
    lattice
        Of these spots, in this order; without it nothing is said of the pattern in space.

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than 2 spots, or a value is not finite.
    """
    true, guess = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    _check(true, guess, depth, section)
    log_depth, nowhere = np.log(np.asarray(depth, np.float64)), np.full(true.shape[1], np.nan)
    error = guess - true
    deviation = (within_sections(true, section) ** 2).sum(axis=0)
    squared = (error**2).sum(axis=0)
    pearson, undefined = correlate(true, guess, section)
    adjusted, _ = correlate(true, guess, section, log_depth)
    ranked, _ = correlate(rank_within(true, section), rank_within(guess, section), section)
    return GeneScores(
        pearson=pearson,
        pearson_depth_adjusted=adjusted,
        spearman=np.where(undefined, 0.0, ranked),
        mse=(error**2).mean(axis=0),
        mae=np.abs(error).mean(axis=0),
        r2=1 - np.divide(squared, deviation, out=np.ones_like(squared), where=_varies(deviation, true)),
        undefined=undefined,
        ssim=nowhere if lattice is None else lattice.ssim(true, guess),
        moran_measured=nowhere if lattice is None else lattice.moran(true),
        moran_predicted=nowhere if lattice is None else lattice.moran(guess),
    )


def correlate(
    a: Floats, b: Floats, section: NDArray[np.generic], log_depth: Floats | None = None
) -> tuple[Floats, NDArray[np.bool_]]:
    """Correlate two ``(n_spots, n_genes)`` matrices gene by gene, within sections.

    With `log_depth`, it and its square are regressed out of both first.

    Returns
    -------
    correlation, undefined
        Shape ``(n_genes,)`` each; the correlation is 0 where it is not defined.
    """
    left, right = within_sections(a, section, log_depth), within_sections(b, section, log_depth)
    left_sq, right_sq = (left**2).sum(axis=0), (right**2).sum(axis=0)
    defined = _varies(left_sq, a) & _varies(right_sq, b)
    scale = np.sqrt(left_sq * right_sq)
    r = np.divide((left * right).sum(axis=0), scale, out=np.zeros_like(scale), where=defined)
    return np.clip(r, -1, 1), ~defined


def within_sections(values: Floats, section: NDArray[np.generic], log_depth: Floats | None = None) -> Floats:
    """Remove from each column every section's mean, or what depth explains in that section.

    With `log_depth` the intercept, log depth and its square are regressed out, section by section.
    """
    residual = np.empty_like(values)
    for label in np.unique(section):
        here = section == label
        part = values[here]
        part = part - part.mean(axis=0)
        if log_depth is not None:
            basis = _depth_basis(log_depth[here])
            part -= basis @ (basis.T @ part)
        residual[here] = part
    return residual


def rank_within(values: Floats, section: NDArray[np.generic]) -> Floats:
    """Replace each column's values by their ranks within each section; ties share their mean rank."""
    ranks = np.empty_like(values)
    for label in np.unique(section):
        here = section == label
        ranks[here] = rankdata(values[here], axis=0)
    return ranks


def top_by_variance(target: NDArray[np.floating], n: int = TOP) -> NDArray[np.bool_]:
    """Mark the `n` genes that vary most over the training spots: the rule behind `pearson_top50`.

    The rule sees no model and no test spot, so it is the same for every preset.

    Parameters
    ----------
    target
        log1p(CP10k) of the training spots, shape ``(n_spots, n_genes)``.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_genes,)``; all True where there are no more than `n` genes.
    """
    variance = np.asarray(target, np.float64).var(axis=0)
    marked = np.zeros(len(variance), dtype=bool)
    marked[np.argsort(-variance, kind="stable")[:n]] = True
    return marked


def pearson_all_spots(
    truth: NDArray[np.floating], predicted: NDArray[np.floating], section: NDArray[np.generic]
) -> float:
    """Return the published code's figure: mean Pearson over *all* spots, undefined genes dropped.

    Half of these spots are training spots, so a model that only memorises scores high: on pure noise
    this gives about 0.55. It is here to be compared with the paper, never to be trusted.
    """
    r, undefined = correlate(np.asarray(truth, np.float64), np.asarray(predicted, np.float64), section)
    return float(r[~undefined].mean()) if not undefined.all() else 0.0


def _depth_basis(log_depth: Floats) -> Floats:
    """Return orthonormal columns spanning centred log depth and its square, shape ``(n_spots, 0..2)``."""
    centred = log_depth - log_depth.mean()
    curve = centred**2
    columns = np.stack([centred, curve - curve.mean()], axis=1)
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left[:, singular > 1e-9 * max(1.0, float(np.abs(log_depth).max()))])


def _varies(sum_of_squares: Floats, values: Floats) -> NDArray[np.bool_]:
    """Return which columns spread by more than rounding."""
    spread: Floats = np.sqrt(sum_of_squares / len(values))
    return np.asarray(spread > CONSTANT * np.abs(values).max(axis=0))


def _check(truth: Floats, predicted: Floats, depth: NDArray[np.number], section: NDArray[np.generic]) -> None:
    n_spots = len(truth)
    if truth.shape != predicted.shape or depth.shape != (n_spots,) or section.shape != (n_spots,):
        raise ValueError(
            f"truth {truth.shape}, predicted {predicted.shape}, depth {depth.shape} and section"
            f" {section.shape} do not fit: give (n_spots, n_genes) twice and (n_spots,) twice"
        )
    if n_spots < 2:
        raise ValueError(f"cannot score {n_spots} spots: a correlation needs at least 2")
    bad = int((~np.isfinite(predicted)).sum() + (~np.isfinite(truth)).sum())
    if bad or not (np.asarray(depth) > 0).all():
        raise ValueError(
            f"cannot score: {bad} values are not finite, or a spot has no counts; mend the model"
        )
