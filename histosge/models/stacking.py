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
from histosge.models.linear_algebra import Affine, Floats, Indices, RidgePath, Standardiser, choose_penalties
from histosge.models.multiscale import VIEWS, view_columns
from histosge.models.stain_invariance import steady

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
    moved
        Covariance of what features do that says nothing of expression, ``(n_features, n_features)``: weights
        along it are penalised, see `stain_penalty`.
    """

    affine: Affine
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    kernels: tuple[Kernel, ...] | None
    moved: Floats | None = None


def fit_members(
    spots: Measured,
    Y: Floats,
    groups: Indices,
    like: Mixture | None = None,
    *,
    moved: Floats | None = None,
) -> Mixture:
    """Fit every member to ``(n_spots, n_patterns)`` patterns, and mix them.

    Parameters
    ----------
    groups
        Label of each spot: spots of one label are left out together.
    like
        Whose kernels, weights and `moved` to take, instead of choosing them here; with one group its penalties, too.
    moved
        See `Mixture`.
    """
    moved = like.moved if like else moved
    kernels = like.kernels if like else _kernels(spots, Y, moved)
    if like and len(np.unique(groups)) < 2:
        # Nothing to choose penalties on; shrunken more than the whole, a part would leave more over.
        penalties = [np.array(some) for some in like.penalties]
    else:
        penalties = [
            choose_penalties(_Frame.of(spots, _columns(spots, views), moved).inputs, Y, groups)
            for views in VIEWS_OF_RIDGES
        ]
    members = _fit(spots, Y, penalties, kernels, moved)
    weights = np.array(like.weights) if like else _weigh(spots, Y, groups, penalties, kernels, moved)
    affine = Affine(
        np.tensordot(weights, [member.weight for member in members], axes=1),
        np.tensordot(weights, [member.offset for member in members], axes=1),
    )
    return Mixture(
        affine, tuple(tuple(p.tolist()) for p in penalties), tuple(weights.tolist()), kernels, moved
    )


def fit_ridge(spots: Measured, Y: Floats, groups: Indices, moved: Floats | None = None) -> Affine:
    """Fit one ridge on all views, with a penalty per output chosen on groups left out."""
    frame = _Frame.of(spots, np.arange(spots.features.shape[1]), moved)
    return frame.back(RidgePath.of(frame.inputs, Y).at(choose_penalties(frame.inputs, Y, groups)))


@dataclass(frozen=True)
class _Frame:
    """Some features as inputs of a linear fit, and the way back.

    Parameters
    ----------
    columns
        Which features.
    standardiser, turn
        What brings them to mean 0 and spread 1, and what makes the penalty along `Mixture.moved` larger.
    n_features
        In all.
    inputs
        ``(n_spots, len(columns))``.
    """

    columns: Indices
    standardiser: Standardiser
    turn: Floats | None
    n_features: int
    inputs: Floats

    @classmethod
    def of(cls, spots: Measured, columns: Indices, moved: Floats | None, *, spread: float = 0.0) -> "_Frame":
        """Measure; with a `spread`, turned inputs are brought back to it on average."""
        X = spots.features[:, columns]
        standardiser = Standardiser.of(X)
        inputs = standardiser.apply(X)
        turn = steady(None if moved is None else moved[np.ix_(columns, columns)], standardiser)
        if turn is not None:
            turned = inputs @ turn
            size = turned.std(axis=0).mean()
            scale = spread / size if spread and size > 0 else 1.0
            turn, inputs = turn * scale, turned * scale
        return cls(columns, standardiser, turn, spots.features.shape[1], inputs)

    def back(self, affine: Affine) -> Affine:
        """Return a map of the inputs as one of all features."""
        if self.turn is not None:
            affine = Affine(self.turn @ affine.weight, affine.offset)
        affine = affine.after(self.standardiser)
        weight = np.zeros((self.n_features, affine.weight.shape[1]))
        weight[self.columns] = affine.weight
        return Affine(weight, affine.offset)


def _columns(spots: Measured, views: Sequence[tuple[float, str]]) -> Indices:
    return view_columns(views, spots.features.shape[1] // len(VIEWS))


def _beside_a_field(spots: Measured, moved: Floats | None) -> tuple[_Frame, Measured]:
    """Return the frame of all views, of spread 1 as the kernel takes them, and the spots in it."""
    frame = _Frame.of(spots, np.arange(spots.features.shape[1]), moved, spread=1.0)
    return frame, Measured(spots.slide, spots.xy_um, frame.inputs)


def _kernels(spots: Measured, Y: Floats, moved: Floats | None) -> tuple[Kernel, ...] | None:
    if len(spots) > KRIGED:
        return None
    return tuple(choose_kernels(_beside_a_field(spots, moved)[1], Y - Y.mean(axis=0)))


def _fit(
    spots: Measured,
    Y: Floats,
    penalties: Sequence[Floats],
    kernels: Sequence[Kernel] | None,
    moved: Floats | None,
) -> list[Affine]:
    """Fit the members for penalties and kernels that are given.

    Beside a smooth field of each section, all views are fitted and only what they give is kept: what varies
    slowly over a section for reasons that the picture does not show goes to the field, so the views are not bent
    to explain it.
    """
    members = []
    if kernels is not None:
        mean = Y.mean(axis=0)
        frame, inputs = _beside_a_field(spots, moved)
        views = frame.back(Kriging.fit(inputs, Y - mean, kernels).affine())
        members.append(Affine(views.weight, views.offset + mean))
    for some, penalty in zip(VIEWS_OF_RIDGES, penalties, strict=True):
        frame = _Frame.of(spots, _columns(spots, some), moved)
        members.append(frame.back(RidgePath.of(frame.inputs, Y).at(penalty)))
    return members


def _weigh(
    spots: Measured,
    Y: Floats,
    groups: Indices,
    penalties: Sequence[Floats],
    kernels: Sequence[Kernel] | None,
    moved: Floats | None,
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
        members = _fit(spots.take(kept), Y[kept], penalties, kernels, moved)
        unseen[:, gone] = [member(spots.features[gone]) for member in members]
    size = np.linalg.norm(Y)
    near_equal = np.sqrt(EQUAL) * size
    # The last row, far heavier than the others, has the weights add up to 1.
    rows = [unseen.reshape(n, -1).T, near_equal * np.eye(n), 1e3 * size * np.ones((1, n))]
    wanted = np.concatenate([Y.ravel(), np.full(n, near_equal / n), [1e3 * size]])
    weights = nnls(np.vstack(rows), wanted)[0] if size > 0 else np.ones(n)
    return np.asarray(weights / weights.sum())
