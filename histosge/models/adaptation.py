"""Adapt a fitted `dense` or `ridge` to further sections: shrink towards its weights instead of towards 0.

The earlier model predicts the new sections. The solvers of a new training are fitted to what these predictions lack, and
the result is added to the earlier weights: the penalty of a ridge then bounds how far the weights move. Its strength is
chosen on sections left out in turn (stripes of a lone section), up to `KEEP`, where the earlier weights stay. Means and
spreads of the genes are always those of the new sections, as a ridge does not shrink its intercept.

For `dense`, in units of each gene's spread within a section:

    z - A (p - mean p)  =  U q + rest        A, p   genes' loadings and patterns of the earlier model
                                             U      principal axes of the left side, over the new sections
                                             q      fitted by `fit_scale_ridges`
    gene                =  mean + sd * (A p + U q)

Terms
    earlier  the model that is adapted; it has not seen the new sections
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import spot_embeddings
from histosge.errors import ModelError
from histosge.models import linear_algebra, ridge_sums
from histosge.models.dense import N_PATTERNS, DenseModel, log_depth
from histosge.models.linear_algebra import (
    Affine,
    Floats,
    Indices,
    RidgePath,
    Standardiser,
    choose_penalty,
    principal_axes,
    spatial_groups,
)
from histosge.models.low_rank_targets import LowRankTargets, pattern_axes, standardise
from histosge.models.presets.ridge import MAX_DIM, RidgeModel
from histosge.models.protocol import Model
from histosge.models.scale_ridges import (
    MAX_GROUPS,
    SIGMAS_UM,
    Outputs,
    ScaleRidges,
    fit_scale_ridges,
    pool_spots,
)

KEEP = 1e12
"""As good as infinite: weights move by a millionth of a millionth of what an ordinary penalty of 1 lets them move. A finite
number, since the JSON of a model's config has no infinity."""
# Two more than a new training has: between its largest penalty and keeping the weights lie small corrections.
DENSE_PENALTIES = (*ridge_sums.PENALTIES, 1e4, KEEP)
RIDGE_PENALTIES = (*linear_algebra.PENALTIES, KEEP)


def why_not_adapted(model: Model) -> str:
    """Return why a fitted model cannot be adapted, in a few words; empty if it can."""
    if isinstance(model, RidgeModel):
        return ""
    if not isinstance(model, DenseModel):
        return "dense and ridge of one encoder can be adapted"
    if not isinstance(model.linear, ScaleRidges):
        return "it is a dense of an earlier version"
    if model.count_head is not None:
        return "it was trained with --loss poisson or nb, and only squared errors are adapted"
    return "" if model.linear.sigmas_um == SIGMAS_UM else "its Gaussians have other widths"


@dataclass(frozen=True)
class Adaptation:
    """What fits a model to sections by adapting another one; an estimator as a model's class is.

    Parameters
    ----------
    earlier
        The model, see `why_not_adapted`.
    columns
        Of its genes those that the sections have, in their order, ``(n_genes,)``.
    """

    earlier: Model
    columns: Indices

    def fit(self, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Model:
        """Solve in closed form; seed and epochs have no effect.

        Raises
        ------
        ModelError
            If the model cannot be adapted.
        """
        if why_not := why_not_adapted(self.earlier):
            raise ModelError(f"the model cannot be adapted: {why_not}; train without --from")
        if isinstance(self.earlier, RidgeModel):
            return adapt_ridge(self.earlier, self.columns, sections)
        assert isinstance(self.earlier, DenseModel)
        return adapt_dense(self.earlier, self.columns, sections)


def describe_change(adapted: Model) -> str:
    """Return in one line how far held-out sections let the weights of an adapted model move."""
    if isinstance(adapted, RidgeModel):
        penalties = [adapted.penalty]
    else:
        assert isinstance(adapted, DenseModel)
        assert isinstance(adapted.linear, ScaleRidges)
        penalties = [of_scale[0] for of_scale in adapted.linear.penalties]
    shown = ", ".join("kept" if penalty == KEEP else f"{penalty:g}" for penalty in penalties)
    what = "weights" if len(penalties) == 1 else f"weights of {len(penalties)} scales"
    return f"penalty on changes of the earlier {what}, chosen on held-out sections: {shown}"


def adapt_ridge(earlier: RidgeModel, columns: Indices, sections: Sequence[TrainingSection]) -> RidgeModel:
    """Fit the preset `ridge` to what an earlier one lacks at the spots of some sections, and add its weights.

    Parameters
    ----------
    columns
        Of the earlier model's genes those of the sections.
    """
    start = Affine(earlier.affine.weight[:, columns], earlier.affine.offset[columns])
    X = np.concatenate([spot_embeddings(s.overlap, s.patches) for s in sections]).astype(np.float64)
    Y = np.concatenate([s.target for s in sections]).astype(np.float64) - start(X)
    standardiser = Standardiser.fit(X)
    X = standardiser.apply(X)
    axes = principal_axes(X, MAX_DIM) if X.shape[1] > MAX_DIM else None
    X = X if axes is None else X @ axes
    penalty = choose_penalty(X, Y, spatial_groups(sections) % MAX_GROUPS, RIDGE_PENALTIES)
    change = RidgePath.fit(X, Y).solve(penalty)
    if axes is not None:
        change = Affine(axes @ change.weight, change.offset)
    change = change.after(standardiser)
    both = Affine(start.weight + change.weight, start.offset + change.offset)
    return RidgeModel(both, penalty, 0 if axes is None else axes.shape[1])


def adapt_dense(earlier: DenseModel, columns: Indices, sections: Sequence[TrainingSection]) -> DenseModel:
    """Fit the preset `dense` to what an earlier one lacks at the spots of some sections, and add its weights.

    Parameters
    ----------
    columns
        Of the earlier model's genes those of the sections.
    """
    assert isinstance(earlier.linear, ScaleRidges)
    start = EarlierDense.take(earlier, columns)
    predicted = [start.at_spots(section) for section in sections]
    start = replace(start, axes=_slope(sections, start.axes, predicted) * start.axes)
    residual = [_residual(s, start.axes, p) for s, p in zip(sections, predicted, strict=True)]
    axes = pattern_axes(residual, N_PATTERNS, lambda values: values.astype(np.float64))
    values = np.concatenate([part @ axes for part in residual])
    depth = log_depth(sections) if start.has_depth else None
    if depth is not None:
        earlier_depth = np.concatenate([p[:, -1] - p[:, -1].mean() for p in predicted])
        values = np.column_stack([values, depth - earlier_depth])
    outputs = Outputs(values, spatial_groups(sections), axes.shape[1])
    change = fit_scale_ridges(sections, outputs, penalties_to_try=DENSE_PENALTIES).ridges
    mean = np.average([p.mean(axis=0) for p in predicted], axis=0, weights=[len(p) for p in predicted])
    linear, axes = start.plus(change, axes, mean, has_depth=depth is not None)
    targets = LowRankTargets.with_axes(sections, axes)
    assert targets.highest is not None
    # What was measured anywhere is no overshoot.
    if earlier.targets.highest is not None:
        highest = np.maximum(targets.highest, earlier.targets.highest[columns])
        targets = replace(targets, highest=highest)
    return DenseModel(linear, targets, depth is not None)


def _slope(sections: Sequence[TrainingSection], axes: Floats, predicted: Sequence[Floats]) -> float:
    """Return the regression slope of the spots' standardised genes on an earlier model's predictions, not below 0.

    A gene's spread within a section is that of its tissue and of its counts' noise, whose share differs between
    laboratories. One number for all genes and spots; ridges, which shrink every direction alike, would have to give up all
    of their pull to the earlier weights to learn it.
    """
    product = square = 0.0
    for section, at_spots in zip(sections, predicted, strict=True):
        patterns = at_spots[:, : axes.shape[1]]
        values = (patterns - patterns.mean(axis=0)) @ axes.T
        product += float((standardise(section.target) * values).sum())
        square += float((values**2).sum())
    return max(product / square, 0.0) if square > 0 else 0.0


def _residual(section: TrainingSection, axes: Floats, predicted: Floats) -> Floats:
    """Return what an earlier model lacks at a section's spots, in units of the genes' spread, ``(n_spots, n_genes)``.

    Both sides are taken about the section's mean: how it was stained and sequenced is no pattern of its tissue.
    """
    patterns = predicted[:, : axes.shape[1]]
    return np.asarray(standardise(section.target) - (patterns - patterns.mean(axis=0)) @ axes.T)


@dataclass(frozen=True)
class EarlierDense:
    """The linear part of a `dense` that is adapted.

    Parameters
    ----------
    ridges
        Embeddings -> patterns and, where `has_depth`, depth.
    axes
        Of the genes of the new sections, ``(n_genes, n_patterns)``.
    """

    ridges: ScaleRidges
    axes: Floats
    has_depth: bool

    @classmethod
    def take(cls, model: DenseModel, columns: Indices) -> "EarlierDense":
        """Take the linear part of a model, and the loadings of some genes."""
        assert isinstance(model.linear, ScaleRidges)
        return cls(model.linear, model.targets.axes[columns], model.has_depth)

    def weights(self) -> list[Floats]:
        """Return the weights of each scale, ``(dim, n_outputs)``."""
        assert self.ridges.weight is not None
        return np.split(self.ridges.weight, len(self.ridges.sigmas_um), axis=1)

    def at_spots(self, section: TrainingSection) -> Floats:
        """Predict a section's spots, ``(n_spots, n_outputs)``, in double precision as a fit pools them."""
        scales = zip(self.ridges.sigmas_um, self.weights(), strict=True)
        parts = [pool_spots(section, sigma_um) @ weight for sigma_um, weight in scales]
        return np.asarray(np.sum(parts, axis=0) + self.ridges.offset)

    def plus(
        self, change: ScaleRidges, axes: Floats, mean: Floats, *, has_depth: bool
    ) -> tuple[ScaleRidges, Floats]:
        """Add what was fitted to the residuals.

        Parameters
        ----------
        change, axes
            Embeddings -> patterns of the residuals (and depth, if the model has it) -> genes.
        mean
            Of this part's own predictions at the new spots, which becomes 0, ``(n_outputs,)``.

        Returns
        -------
        ScaleRidges, numpy.ndarray
            Patterns of both with orthonormal axes, ``(n_genes, at most all patterns)``.
        """
        assert change.weight is not None
        # Axes of the two parts overlap. An orthonormal basis of both keeps `LowRankTargets` what it says.
        basis, to_basis = np.linalg.qr(np.hstack([self.axes, axes]))
        n_earlier, n_new = self.axes.shape[1], axes.shape[1]

        def merge(earlier: Floats, new: Floats) -> Floats:
            patterns: Floats = np.hstack([earlier[..., :n_earlier], new[..., :n_new]]) @ to_basis.T
            if not has_depth:
                return patterns
            depth = earlier[..., n_earlier:] + new[..., n_new:]
            return np.asarray(np.concatenate([patterns, depth], axis=-1))

        news = np.split(change.weight, len(change.sigmas_um), axis=1)
        weights = [merge(earlier, new) for earlier, new in zip(self.weights(), news, strict=True)]
        offset = merge(self.ridges.offset - mean, change.offset)
        return replace(change, weight=np.hstack(weights), offset=offset), basis
