"""The linear part of `dense`: several members on the same views, mixed by what spots left out say.

A member is a ridge on some of the views, or what all views give beside a smooth field of each section. None is
selected: choosing one on so few spots costs more than it gains. They are averaged by weights that lie between
equal ones and those that predict spots left out best, so a member that fails on some kind of tissue does not count
there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from histosge.models.kriging import Kernel, Kriging, Measured, choose_kernels
from histosge.models.linear import Affine, Floats, Indices, RidgePath, Standardiser, choose_penalties
from histosge.models.surroundings import VIEWS, view_columns

KRIGED = 10_000
"""Spots up to which the member beside a smooth field is fitted: with more, it costs minutes and adds little."""
VIEWS_OF_RIDGES = (
    ((0.0, "mean"),),
    ((80.0, "mean"), (80.0, "sd")),
    ((80.0, "mean"), (160.0, "mean"), (160.0, "sd")),
)
PARTS = 4
"""Parts that are left out to weigh the members, at most; sections are left out several at a time."""
WEIGHED = 6000
"""Spots that weights are found on, about: beyond, every second, third ... spot is taken."""
EQUAL = 0.02
"""How strongly weights are drawn to equal ones, as a share of the patterns' sum of squares."""


@dataclass(frozen=True)
class Mixture:
    """All members in one map.

    Parameters
    ----------
    affine
        Views -> patterns.
    penalties
        Of the ridges, per pattern.
    weights
        Of the members: that beside a smooth field first, where there is one, then the ridges; they add up to 1.
    kernels
        Of the member beside a smooth field, one per pattern; None without it.
    """

    affine: Affine
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    kernels: tuple[Kernel, ...] | None


def fit_members(spots: Measured, Y: Floats, groups: Indices, like: Mixture | None = None) -> Mixture:
    """Fit every member to ``(n_spots, n_patterns)`` patterns, and mix them.

    Parameters
    ----------
    groups
        Label of each spot: spots of one label are left out together.
    like
        Whose kernels and weights to take, instead of choosing them here.
    """
    kernels = like.kernels if like else _kernels(spots, Y)
    inputs = [_inputs(spots, views) for views in VIEWS_OF_RIDGES]
    penalties = [choose_penalties(standardiser.apply(X), Y, groups) for _, standardiser, X in inputs]
    members = _fit(spots, Y, penalties, kernels)
    weights = np.array(like.weights) if like else _weigh(spots, Y, groups, penalties, kernels)
    affine = Affine(
        np.tensordot(weights, [member.weight for member in members], axes=1),
        np.tensordot(weights, [member.offset for member in members], axes=1),
    )
    return Mixture(affine, tuple(tuple(p.tolist()) for p in penalties), tuple(weights.tolist()), kernels)


def _kernels(spots: Measured, Y: Floats) -> tuple[Kernel, ...] | None:
    return tuple(choose_kernels(_standardised(spots), Y - Y.mean(axis=0))) if len(spots) <= KRIGED else None


def _fit(
    spots: Measured, Y: Floats, penalties: Sequence[Floats], kernels: Sequence[Kernel] | None
) -> list[Affine]:
    """Fit the members for penalties and kernels that are given."""
    members = [] if kernels is None else [_beside_a_field(spots, Y, kernels)]
    for views, penalty in zip(VIEWS_OF_RIDGES, penalties, strict=True):
        columns, standardiser, X = _inputs(spots, views)
        ridge = RidgePath.of(standardiser.apply(X), Y).at(penalty).after(standardiser)
        weight = np.zeros((spots.features.shape[1], Y.shape[1]))
        weight[columns] = ridge.weight
        members.append(Affine(weight, ridge.offset))
    return members


def _inputs(spots: Measured, views: Sequence[tuple[float, str]]) -> tuple[Indices, Standardiser, Floats]:
    """Return the columns of some views, and their values with what standardises them."""
    columns = view_columns(views, spots.features.shape[1] // len(VIEWS))
    X = spots.features[:, columns]
    return columns, Standardiser.of(X), X


def _beside_a_field(spots: Measured, Y: Floats, kernels: Sequence[Kernel]) -> Affine:
    """Fit all views beside a smooth field of each section, and keep what the views give.

    What varies slowly over a section for reasons that the picture does not show goes to the field, so the
    views are not bent to explain it.
    """
    mean = Y.mean(axis=0)
    process = Kriging.fit(_standardised(spots), Y - mean, kernels)
    affine = process.affine().after(Standardiser.of(spots.features))
    return Affine(affine.weight, affine.offset + mean)


def _standardised(spots: Measured) -> Measured:
    features = Standardiser.of(spots.features).apply(spots.features)
    return Measured(spots.slide, spots.xy_um, features)


def _weigh(
    spots: Measured,
    Y: Floats,
    groups: Indices,
    penalties: Sequence[Floats],
    kernels: Sequence[Kernel] | None,
) -> Floats:
    """Return the members' weights, none negative, 1 in sum: by least squares on groups left out in turn."""
    n = len(penalties) + (kernels is not None)
    some = np.arange(0, len(spots), -(-len(spots) // WEIGHED))
    spots, Y = spots.take(some), Y[some]
    labels, part = np.unique(groups[some], return_inverse=True)
    if len(labels) < 2:
        return np.full(n, 1 / n)
    unseen = np.zeros((n, *Y.shape))
    for k in range(min(PARTS, len(labels))):
        gone = part % PARTS == k
        kept = np.flatnonzero(~gone)
        members = _fit(spots.take(kept), Y[kept], penalties, kernels)
        unseen[:, gone] = [member(spots.features[gone]) for member in members]
    size = np.linalg.norm(Y)
    near_equal = np.sqrt(EQUAL) * size
    # The last row, far heavier than the others, has the weights add up to 1.
    rows = [unseen.reshape(n, -1).T, near_equal * np.eye(n), 1e3 * size * np.ones((1, n))]
    wanted = np.concatenate([Y.ravel(), np.full(n, near_equal / n), [1e3 * size]])
    weights = nnls(np.vstack(rows), wanted)[0] if size > 0 else np.ones(n)
    return np.asarray(weights / weights.sum())
