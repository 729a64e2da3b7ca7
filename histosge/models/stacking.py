"""The linear part of `dense`: stacked regression of several linear models on multiscale features.

A base model is a ridge on some of the moments, or the linear part of a Gaussian process on all of them with a smooth
field of each section beside it. None is selected: choosing one on so few spots costs more than it gains. They are
averaged by weights that lie between equal ones and those that predict held-out spots best (Breiman, 1996), so a
base model that fails on some kind of tissue gets no weight there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from histosge.data.gaussian_pooling import Moment
from histosge.models.kriging import Kernel, Kriging, SpotFeatures, choose_kernels
from histosge.models.linear_algebra import Affine, Floats, Indices, RidgePath, Standardiser, choose_penalties
from histosge.models.multiscale import MOMENTS, moment_columns
from histosge.models.stain_invariance import penalty_transform

MAX_KRIGING_SPOTS = 10_000
"""Spots up to which the Gaussian process is one of the base models: with more it costs minutes and adds little."""
RIDGE_MOMENTS = (
    (Moment(0.0, "mean"),),
    (Moment(80.0, "mean"), Moment(80.0, "sd")),
    (Moment(80.0, "mean"), Moment(160.0, "mean"), Moment(160.0, "sd")),
)
"""Moments that each ridge is fitted on."""
# At most four fits for the weights; more sections are left out several at a time.
MAX_FOLDS = 4
MAX_WEIGHT_SPOTS = 6000
"""Spots that weights are fitted on, about: beyond, every second, third ... spot is taken."""
EQUAL_PULL = 0.02
"""Strength of the pull of the weights towards equal ones, as a share of the patterns' sum of squares."""


@dataclass(frozen=True)
class StackedFit:
    """All base models in one linear map, and what was chosen.

    Parameters
    ----------
    affine
        Features -> patterns.
    penalties
        Of the ridges, per pattern.
    weights
        Of the base models, summing to 1: the Gaussian process first, where there is one, then the ridges.
    kernels
        Of the Gaussian process, one per pattern; None without it.
    nuisance
        Covariance of changes of the features that have nothing to do with expression, ``(n_features, n_features)``:
        weights along it are penalised, see `stain_invariance`.
    """

    affine: Affine
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    kernels: tuple[Kernel, ...] | None
    nuisance: Floats | None = None


def fit_stack(
    spots: SpotFeatures,
    Y: Floats,
    groups: Indices,
    reuse: StackedFit | None = None,
    *,
    nuisance: Floats | None = None,
) -> StackedFit:
    """Fit every base model to ``(n_spots, n_patterns)`` patterns, and stack them.

    Parameters
    ----------
    groups
        Label of each spot: spots of one label are left out together.
    reuse
        A fit whose kernels, weights and `nuisance` are taken instead of choosing them here; if there is only one
        group, its penalties as well.
    nuisance
        See `StackedFit`.
    """
    nuisance = reuse.nuisance if reuse else nuisance
    kernels = reuse.kernels if reuse else _choose_kernels(spots, Y, nuisance)
    if reuse and len(np.unique(groups)) < 2:
        # Nothing to choose penalties on. The middle one, chosen instead, would shrink more than the whole fit did,
        # and the residuals of these spots would be too large.
        penalties = [np.array(per_pattern) for per_pattern in reuse.penalties]
    else:
        penalties = [
            choose_penalties(_Inputs.from_spots(spots, _columns(spots, moments), nuisance).values, Y, groups)
            for moments in RIDGE_MOMENTS
        ]
    models = _fit_base_models(spots, Y, penalties, kernels, nuisance)
    weights = (
        np.array(reuse.weights)
        if reuse
        else _stacking_weights(spots, Y, groups, penalties, kernels, nuisance)
    )
    # A mean of linear maps is one linear map: prediction costs the same whatever the number of base models.
    affine = Affine(
        np.tensordot(weights, [model.weight for model in models], axes=1),
        np.tensordot(weights, [model.offset for model in models], axes=1),
    )
    return StackedFit(
        affine, tuple(tuple(p.tolist()) for p in penalties), tuple(weights.tolist()), kernels, nuisance
    )


def fit_ridge(spots: SpotFeatures, Y: Floats, groups: Indices, nuisance: Floats | None = None) -> Affine:
    """Fit one ridge on all features, with a penalty per output chosen on groups left out."""
    inputs = _Inputs.from_spots(spots, np.arange(spots.features.shape[1]), nuisance)
    return inputs.to_features(
        RidgePath.fit(inputs.values, Y).solve(choose_penalties(inputs.values, Y, groups))
    )


@dataclass(frozen=True)
class _Inputs:
    """Some features as inputs of a linear fit, and the way back to all features.

    Parameters
    ----------
    columns
        Which features.
    standardiser, transform
        Mean 0 and standard deviation 1 first, then what makes the penalty along `StackedFit.nuisance` larger.
    n_features
        In all.
    values
        ``(n_spots, len(columns))``.
    """

    columns: Indices
    standardiser: Standardiser
    transform: Floats | None
    n_features: int
    values: Floats

    @classmethod
    def from_spots(
        cls, spots: SpotFeatures, columns: Indices, nuisance: Floats | None, *, unit_spread: bool = False
    ) -> "_Inputs":
        """Standardise and transform; with `unit_spread`, to a standard deviation of 1 on average."""
        X = spots.features[:, columns]
        standardiser = Standardiser.fit(X)
        values = standardiser.apply(X)
        own = None if nuisance is None else nuisance[np.ix_(columns, columns)]
        transform = penalty_transform(own, standardiser)
        if transform is not None:
            transformed = values @ transform
            spread = transformed.std(axis=0).mean()
            scale = 1.0 / spread if unit_spread and spread > 0 else 1.0
            transform, values = transform * scale, transformed * scale
        return cls(columns, standardiser, transform, spots.features.shape[1], values)

    def to_features(self, affine: Affine) -> Affine:
        """Return a map of these inputs as one of all features; those that are no inputs get weight 0."""
        if self.transform is not None:
            affine = Affine(self.transform @ affine.weight, affine.offset)
        affine = affine.after(self.standardiser)
        weight = np.zeros((self.n_features, affine.weight.shape[1]))
        weight[self.columns] = affine.weight
        return Affine(weight, affine.offset)


def _columns(spots: SpotFeatures, moments: Sequence[Moment]) -> Indices:
    return moment_columns(moments, spots.features.shape[1] // len(MOMENTS))


def _kriging_inputs(spots: SpotFeatures, nuisance: Floats | None) -> tuple[_Inputs, SpotFeatures]:
    """Return all features as inputs of the Gaussian process, and the spots with them."""
    inputs = _Inputs.from_spots(spots, np.arange(spots.features.shape[1]), nuisance, unit_spread=True)
    return inputs, SpotFeatures(spots.slide, spots.xy_um, inputs.values)


def _choose_kernels(spots: SpotFeatures, Y: Floats, nuisance: Floats | None) -> tuple[Kernel, ...] | None:
    if len(spots) > MAX_KRIGING_SPOTS:
        return None
    return tuple(choose_kernels(_kriging_inputs(spots, nuisance)[1], Y - Y.mean(axis=0)))


def _fit_base_models(
    spots: SpotFeatures,
    Y: Floats,
    penalties: Sequence[Floats],
    kernels: Sequence[Kernel] | None,
    nuisance: Floats | None,
) -> list[Affine]:
    """Fit the base models for penalties and kernels that are given."""
    models = []
    if kernels is not None:
        mean = Y.mean(axis=0)
        inputs, kriging_spots = _kriging_inputs(spots, nuisance)
        # Only the linear part is kept. What varies slowly over a section for reasons that embeddings do not show is
        # taken up by the field, and so does not bias the weights of the features.
        process = Kriging.fit(kriging_spots, Y - mean, kernels)
        linear = inputs.to_features(process.feature_part())
        models.append(Affine(linear.weight, linear.offset + mean))
    for moments, penalty in zip(RIDGE_MOMENTS, penalties, strict=True):
        inputs = _Inputs.from_spots(spots, _columns(spots, moments), nuisance)
        models.append(inputs.to_features(RidgePath.fit(inputs.values, Y).solve(penalty)))
    return models


def _stacking_weights(
    spots: SpotFeatures,
    Y: Floats,
    groups: Indices,
    penalties: Sequence[Floats],
    kernels: Sequence[Kernel] | None,
    nuisance: Floats | None,
) -> Floats:
    """Return the base models' weights, none negative, summing to 1: least squares on out-of-fold predictions."""
    n = len(penalties) + (kernels is not None)
    subset = np.arange(0, len(spots), -(-len(spots) // MAX_WEIGHT_SPOTS))
    spots, Y = spots.take(subset), Y[subset]
    labels, group = np.unique(groups[subset], return_inverse=True)
    if len(labels) < 2:
        return np.full(n, 1 / n)
    out_of_fold = np.zeros((n, *Y.shape))
    for k in range(min(MAX_FOLDS, len(labels))):
        # Weights fitted on predictions of a model's own training spots would go to the one that overfits most.
        held_out = group % MAX_FOLDS == k
        training = np.flatnonzero(~held_out)
        models = _fit_base_models(spots.take(training), Y[training], penalties, kernels, nuisance)
        out_of_fold[:, held_out] = [model(spots.features[held_out]) for model in models]
    size = np.linalg.norm(Y)
    pull = np.sqrt(EQUAL_PULL) * size
    # Rows below the data: the pull to equal weights, and one far heavier than all others, which makes them sum to 1.
    rows = [out_of_fold.reshape(n, -1).T, pull * np.eye(n), 1e3 * size * np.ones((1, n))]
    wanted = np.concatenate([Y.ravel(), np.full(n, pull / n), [1e3 * size]])
    weights = nnls(np.vstack(rows), wanted)[0] if size > 0 else np.ones(n)
    return np.asarray(weights / weights.sum())
