"""Adapt a fitted `dense`, `ridge` or `attention` to further sections: shrink towards its weights instead of towards 0.

The earlier model predicts the new sections. The solvers of a new training are fitted to what these predictions lack, and
the result is added to the earlier weights: the penalty of a ridge then bounds how far the weights move. Its strength is
chosen on sections left out in turn, or on stripes of a lone section. Means and spreads of the genes are always those of the
new sections, as a ridge does not shrink its intercept.

For `dense`, in units of each gene's spread within a section:

    z  =  B (p - mean p)  +  U q  +  rest       A, p   genes' loadings and patterns of the earlier model
                                                B      loadings anew: a ridge of z on p, shrunk towards c A; c one slope
                                                U      principal axes of z - B (p - mean p), over the new sections
                                                q      fitted by `fit_scale_ridges`, see `CAUTION`
    gene  =  mean + sd * (B p + U q)

Ten patterns are few: a section shows how its genes follow them long before it shows what else its tissue has.

Terms
    earlier  the model that is adapted; it has not seen the new sections
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import spot_embeddings
from histosge.errors import ModelError
from histosge.models import linear_algebra
from histosge.models.checkpoint import Checkpoint
from histosge.models.dense import N_PATTERNS, DenseModel, LinearFit, log_depth
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
from histosge.models.ridge_sums import RidgeSolver, RidgeSums, choose_penalties, total
from histosge.models.scale_ridges import (
    MAX_GROUPS,
    SIGMAS_UM,
    Outputs,
    ScaleRidges,
    fit_scale_ridges,
    pool_spots,
)

if TYPE_CHECKING:
    from histosge.models.block_attention import AttentionModel

KEEP = 1e12
"""As good as infinite: weights move by a millionth of a millionth of what an ordinary penalty of 1 lets them move. A finite
number, since the JSON of a model's config has no infinity."""
# Patterns are ten numbers where embeddings are hundreds: the penalties begin lower.
LOADING_PENALTIES = (*(float(p) for p in 10.0 ** np.arange(-4, 2.01, 0.5)), KEEP)
RIDGE_PENALTIES = (*linear_algebra.PENALTIES, KEEP)
CAUTION = float(np.sqrt(10))
"""Penalties on what is fitted to the residuals, as a multiple of those of a training anew on the same sections, which hold
as much noise and more signal. Chosen on the residuals themselves, with keeping the weights among the choices, they were
noisier: 0.003 less on synthetic donors, and on some of these less than a training anew."""


def _is_attention(model: Model) -> "TypeGuard[AttentionModel]":
    """Tell whether a fitted model is of the preset `attention`."""
    # By its name first, so that adapting something else does not import torch.
    if getattr(model, "name", "") != "attention":
        return False
    from histosge.models.block_attention import AttentionModel

    return isinstance(model, AttentionModel)


def why_not_adapted(model: Model) -> str:
    """Return why a fitted model cannot be adapted, in a few words; empty if it can."""
    if isinstance(model, RidgeModel):
        return ""
    if _is_attention(model):
        model = model.dense
    if not isinstance(model, DenseModel):
        return "dense, ridge and attention of one encoder can be adapted"
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

    @property
    def resumable(self) -> bool:
        """Whether it iterates, so that `fit` uses a checkpoint."""
        return _is_attention(self.earlier)

    def fit(
        self,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Model:
        """Adapt to sections; seed, epochs and checkpoint are for the network of `attention`, all else is solved.

        Raises
        ------
        ModelError
            If the model cannot be adapted.
        """
        if why_not := why_not_adapted(self.earlier):
            raise ModelError(f"the model cannot be adapted: {why_not}; train without --from")
        earlier = self.earlier
        if isinstance(earlier, RidgeModel):
            return adapt_ridge(earlier, self.columns, sections)
        if _is_attention(earlier):
            fit_dense = partial(adapt_dense, earlier.dense, self.columns)
            return earlier.adapt(
                sections, fit_dense, self.columns, seed=seed, epochs=epochs, checkpoint=checkpoint
            )
        assert isinstance(earlier, DenseModel)
        return adapt_dense(earlier, self.columns, sections)


def describe_change(adapted: Model) -> str:
    """Return in one line how far held-out sections let the weights of an adapted model move."""
    if isinstance(adapted, RidgeModel):
        penalties = [adapted.penalty]
    else:
        adapted = adapted.dense if _is_attention(adapted) else adapted
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
    predicted, groups = [start.at_spots(section) for section in sections], spatial_groups(sections)
    n_patterns = start.axes.shape[1]
    patterns = [p[:, :n_patterns] - p[:, :n_patterns].mean(axis=0) for p in predicted]
    loadings, _ = adapt_loadings(_pattern_sums(sections, patterns, groups % MAX_GROUPS), start.axes)
    start = replace(start, axes=loadings)
    # About the section's mean on both sides: how it was stained and sequenced is no pattern of its tissue.
    residual = [standardise(s.target) - p @ loadings.T for s, p in zip(sections, patterns, strict=True)]
    axes = pattern_axes(residual, N_PATTERNS, lambda values: values.astype(np.float64))
    values = np.concatenate([part @ axes for part in residual])
    depth = log_depth(sections) if start.has_depth else None
    if depth is not None:
        earlier_depth = np.concatenate([p[:, -1] - p[:, -1].mean() for p in predicted])
        values = np.column_stack([values, depth - earlier_depth])
    outputs = Outputs(values, groups, axes.shape[1])
    n_penalties = 1 if depth is None else 2
    anew = LinearFit.fit(sections).ridges.penalties
    given = [tuple(CAUTION * penalty for penalty in of_scale[:n_penalties]) for of_scale in anew]
    change = fit_scale_ridges(sections, outputs, given=given).ridges
    mean = np.average([p.mean(axis=0) for p in predicted], axis=0, weights=[len(p) for p in predicted])
    linear, axes = start.plus(change, axes, mean, has_depth=depth is not None)
    targets = LowRankTargets.with_axes(sections, axes)
    assert targets.highest is not None
    # What was measured anywhere is no overshoot.
    if earlier.targets.highest is not None:
        highest = np.maximum(targets.highest, earlier.targets.highest[columns])
        targets = replace(targets, highest=highest)
    return DenseModel(linear, targets, depth is not None)


def adapt_loadings(groups: Sequence[RidgeSums], axes: Floats) -> tuple[Floats, float]:
    """Fit loadings of the genes on an earlier model's patterns, shrunk towards its own loadings times one slope.

    A gene's spread within a section is that of its tissue and of its counts' noise, whose share differs between
    laboratories: hence the slope, at least 0.

    Parameters
    ----------
    groups
        Sums of what is left out together, of patterns and standardised genes, both about the section's mean.
    axes
        Of the earlier model, ``(n_genes, n_patterns)``.

    Returns
    -------
    numpy.ndarray, float
        Loadings, ``(n_genes, n_patterns)``, and the penalty on their distance from the earlier ones.
    """
    whole = total(groups)
    square = float((axes * (axes @ whole.xx)).sum())
    start = max(float((axes * whole.xy.T).sum()) / square, 0.0) * axes if square > 0 else 0 * axes
    if len(groups) < 2:
        return start, KEEP
    residual = [sums.residual(Affine(start.T, np.zeros(len(start)))) for sums in groups]
    chosen = choose_penalties(residual, [slice(0, len(axes))], LOADING_PENALTIES)
    change = RidgeSolver.from_sums(total(residual)).solve(chosen.penalties)
    return start + change.weight.T, float(chosen.penalties[0])


def _pattern_sums(
    sections: Sequence[TrainingSection], patterns: Sequence[Floats], groups: Indices
) -> list[RidgeSums]:
    """Add up patterns and standardised genes of each group; patterns are about their section's mean."""
    found, start = dict[int, RidgeSums](), 0
    for section, values in zip(sections, patterns, strict=True):
        own, target = groups[start : start + len(values)], standardise(section.target)
        for group in np.unique(own).tolist():
            sums = RidgeSums.from_rows(values[own == group], target[own == group])
            found[group] = found[group] + sums if group in found else sums
        start += len(values)
    return [found[group] for group in sorted(found)]


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
