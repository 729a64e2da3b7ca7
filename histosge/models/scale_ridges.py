"""Ridge regressions on embeddings pooled by a Gaussian around each spot: one for each scale and one of all, averaged.

Each scale sees other tissue: the disc itself, its neighbourhood, a whole structure. None is selected, since choosing
one on a few sections costs more than it gains. One more ridge sees the differences between them (`scale_differences`).
They are averaged with weights between equal ones and those that predict
held-out groups best. A mean over neighbours commutes with a linear map, so prediction
projects each patch on the outputs of all scales first and pools those few numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from histosge.data.embedded_slide import Reduce
from histosge.data.gaussian_pooling import TRUNCATE, Moment, Values, pool_moments, sum_pooled
from histosge.data.sections import Patches, TrainingSection
from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser, symmetric_eigen
from histosge.models.nested_state import read_config, take
from histosge.models.prediction_device import project
from histosge.models.protocol import State
from histosge.models.ridge_sums import RidgeSolver, RidgeSums, choose_penalties, leave_out, total
from histosge.models.scale_differences import ScaleDifferences, fold_weights, sample_patches
from histosge.models.stain_invariance import relative_stain_covariance, stain_covariance

SIGMAS_UM = (0.0, 40.0, 80.0, 160.0, 320.0)
"""Standard deviations of the Gaussians, microns; 0 is the patches under the disc alone."""
WITH_DIFFERENCES = True
"""Whether there is a ridge on the differences of the scales; `benchmarks/ideas.py` measures what it gives."""
EQUAL_PULL = 0.05
"""Strength of the pull of the ridges' weights to equal ones, as a share of the outputs' sum of squares: 0.02 and 0.1 differ
by 0.002 on the public sections."""
MAX_GROUPS = 8
"""Groups of spots that are left out in turn for the penalty, at most: each costs a decomposition per scale."""
# A slide has more patches than one product should hold a float32 copy of.
_PATCHES_AT_ONCE = 4096


@dataclass(frozen=True)
class ScaleRidges:
    """``offset + sum over scales of the pooled (embedding @ weight of the scale)``.

    Parameters
    ----------
    weight
        Of all scales side by side, ``(dim, len(sigmas_um) * n_outputs)``; None where embeddings are projected already.
    offset
        ``(n_outputs,)``.
    sigmas_um
        Of the Gaussians.
    penalties, weights
        As chosen per ridge, one for each scale and then that of the differences, which models of earlier versions do not
        have: penalties of the stacked outputs and of each further one; the ridge's share in the mean, which `weight` and
        `offset` hold already.
    """

    weight: Floats | None
    offset: Floats
    sigmas_um: tuple[float, ...]
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return TRUNCATE * max(self.sigmas_um)

    def reduce(self, embedding: NDArray[np.floating]) -> Values:
        """Project embeddings, ``(n, dim)``, on the outputs of all scales, ``(n, len(sigmas_um) * n_outputs)``."""
        assert self.weight is not None
        # Single precision: embeddings are stored in half, and double took 2.9 times as long in prediction.
        weight = self.weight.astype(np.float32)
        parts = np.array_split(embedding, max(1, len(embedding) // _PATCHES_AT_ONCE))
        return np.concatenate([project(part.astype(np.float32, copy=False), weight) for part in parts])

    def project(self, patches: Patches, of: Indices | None = None) -> Floats:
        """Return the outputs at all patches, or at some, ``(n, n_outputs)``."""
        if self.weight is not None:
            patches = patches.with_embedding(self.reduce(patches.embedding))
        return sum_pooled(patches, self.sigmas_um, of) + self.offset

    def split(self) -> tuple[Reduce | None, Self]:
        """Return the projection of embeddings, and what takes projected ones."""
        return (None, self) if self.weight is None else (self.reduce, replace(self, weight=None))

    def config(self) -> dict[str, Any]:
        """Return the scales, and the penalties and weights that were chosen."""
        return {
            "sigmas_um": list(self.sigmas_um),
            "penalties": [list(of_scale) for of_scale in self.penalties],
            "weights": list(self.weights),
        }

    def state(self) -> State:
        """Return the arrays."""
        assert self.weight is not None
        return {"scales.weight": self.weight, "scales.offset": self.offset}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State, n_outputs: int) -> Self:
        """Rebuild, after the arrays' shapes were compared."""
        chosen = read_config(config, _Config)
        n_scales = len(chosen.sigmas_um)
        return cls(
            take(state, "scales.weight", None, n_scales * n_outputs),
            take(state, "scales.offset", n_outputs),
            chosen.sigmas_um,
            chosen.penalties,
            chosen.weights,
        )


# 2 mm: far above what training makes; a wider Gaussian would make prediction read a slide for each block.
_Sigma = Annotated[float, msgspec.Meta(ge=0, le=2000)]


class _Config(msgspec.Struct):
    """What `ScaleRidges.config` wrote."""

    sigmas_um: Annotated[tuple[_Sigma, ...], msgspec.Meta(min_length=1, max_length=64)]
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class ScaleFit:
    """The ridges, and what they predict at spots that they were fitted without.

    Parameters
    ----------
    ridges
        Fitted to all spots.
    out_of_fold
        ``(n_spots, n_outputs)``; None if no folds were given.
    left_out
        Stacked outputs of each group by the fit without it, ``(n_spots, n_stacked)``; None if there is one group.
    """

    ridges: ScaleRidges
    out_of_fold: Floats | None
    left_out: Floats | None


@dataclass(frozen=True)
class Outputs:
    """What the ridges are fitted to.

    Parameters
    ----------
    values
        Of the spots of all sections, one section after another, ``(n_spots, n_outputs)``.
    groups
        Label of each spot: spots of one label are left out together when penalties and weights are chosen.
    n_stacked
        The first outputs, which decide the weights of the ridges and have one penalty together. The others follow, each
        with its own penalty.
    """

    values: Floats
    groups: Indices
    n_stacked: int


def fit_scale_ridges(
    sections: Sequence[TrainingSection],
    outputs: Outputs,
    folds: Indices | None = None,
    given: Sequence[Sequence[float]] | None = None,
) -> ScaleFit:
    """Fit a ridge for each scale and one for their differences to the outputs of all spots, and average them.

    Parameters
    ----------
    folds
        Label of each spot: its prediction in `ScaleFit.out_of_fold` is by a fit without the spots of its fold, with the
        penalties and weights of the whole fit.
    given
        Penalties of each ridge, in the order of `ScaleRidges.penalties`; None means to choose them on groups left out.
    """
    differences = fit_differences(sections)
    fits, means = _Fits(outputs, folds, given), list[Floats]()
    every = np.empty((len(outputs.values), 0 if differences is None else differences.n_inputs))
    for i, sigma_um in enumerate(SIGMAS_UM):
        # One scale at a time: `every` is the largest array of a training, and no second one of its size is made.
        X = np.concatenate([pool_spots(section, sigma_um) for section in sections])
        if differences is not None:
            differences.add_scale(every, i, X)
        inputs = _Inputs.standardise(X, stain_covariance(sections, own=sigma_um == 0))
        means.append(inputs.standardiser.mean)
        fits.add(inputs)
    if differences is not None:
        own, around = relative_stain_covariance(sections), stain_covariance(sections, own=False)
        stain = None if own is None or around is None else differences.stain_covariance(own, around)
        fits.add(_Inputs.standardise(every, stain, partial(differences.standardiser, means=means)))
    weights = fits.weights()
    return ScaleFit(
        average_scales(fits.ridges, weights, fits.penalties, differences),
        None if folds is None else np.tensordot(weights, np.stack(fits.out_of_fold), axes=1),
        np.tensordot(weights, np.stack(fits.held_out), axes=1) if fits.held_out else None,
    )


def fit_differences(sections: Sequence[TrainingSection]) -> ScaleDifferences | None:
    """Return the inputs of the ridge on the differences of `SIGMAS_UM`; None if there is no such ridge."""
    samples = (
        sample_patches(section.patches.embedding, section.overlap.indices.astype(np.int64))
        for section in sections
    )
    return differences_of(sections[0].patches.embedding.shape[1], samples)


def differences_of(dim: int, samples: Iterable[NDArray[np.floating]]) -> ScaleDifferences | None:
    """Return what `fit_differences` does from `sample_patches` of each section."""
    if not WITH_DIFFERENCES or len(SIGMAS_UM) < 2:
        return None
    return ScaleDifferences.fit(len(SIGMAS_UM), dim, samples)


@dataclass
class _Fits:
    """Ridges that are fitted to the same outputs, one after another, and their predictions of groups left out.

    Parameters
    ----------
    outputs, folds, given
        As in `fit_scale_ridges`.
    """

    outputs: Outputs
    folds: Indices | None
    given: Sequence[Sequence[float]] | None
    ridges: list[Affine] = field(default_factory=list)
    penalties: list[tuple[float, ...]] = field(default_factory=list)
    held_out: list[Floats] = field(default_factory=list)
    out_of_fold: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        labels, groups = np.unique(self.outputs.groups, return_inverse=True)
        self._groups, self._n_groups = groups % MAX_GROUPS, min(len(labels), MAX_GROUPS)

    def add(self, inputs: "_Inputs") -> None:
        """Fit one more ridge."""
        Y, stacked = self.outputs.values, slice(0, self.outputs.n_stacked)
        shared = [stacked, *(slice(i, i + 1) for i in range(stacked.stop, Y.shape[1]))]
        sums = [inputs.sums(Y, self._groups == g) for g in range(self._n_groups)]
        whole = total(sums)
        if self.given is None:
            chosen = choose_penalties(sums, shared, whole=whole)
        else:
            sizes = [part.stop - part.start for part in shared]
            chosen = leave_out(sums, np.repeat(self.given[len(self.ridges)], sizes))
        self.penalties.append(tuple(float(chosen.penalties[part.start]) for part in shared))
        self.ridges.append(inputs.to_embedding(RidgeSolver.from_sums(whole).solve(chosen.penalties)))
        if chosen.without:
            self.held_out.append(_predict_by_group(chosen.without, inputs.values, self._groups)[:, stacked])
        if self.folds is not None:
            names, numbers = np.unique(self.folds, return_inverse=True)
            parts = [whole - inputs.sums(Y, self.folds == name) for name in names]
            fits = [RidgeSolver.from_sums(part).solve(chosen.penalties) for part in parts]
            self.out_of_fold.append(_predict_by_group(fits, inputs.values, numbers))

    def weights(self) -> Floats:
        """Return one weight per ridge, none negative, summing to 1: least squares on predictions of held-out groups.

        Breiman (1996), with a pull to equal weights. Where nothing was held out they are equal.
        """
        Y = self.outputs.values[:, : self.outputs.n_stacked]
        size = float(np.linalg.norm(Y))
        if not self.held_out or size == 0:
            return np.full(len(self.ridges), 1 / len(self.ridges))
        # Within groups, as penalties are chosen.
        columns = np.stack([_centre(values, self._groups).ravel() for values in self.held_out], axis=1)
        return stack(columns, _centre(Y, self._groups).ravel(), size)


def average_scales(
    ridges: Sequence[Affine],
    weights: Floats,
    penalties: Sequence[tuple[float, ...]],
    differences: ScaleDifferences | None,
) -> ScaleRidges:
    """Return the weighted mean of one ridge for each of `SIGMAS_UM` and, with `differences`, one more on those."""
    return ScaleRidges(
        np.hstack(fold_weights(ridges, weights, differences)),
        np.sum([weight * ridge.offset for weight, ridge in zip(weights, ridges, strict=True)], axis=0),
        SIGMAS_UM,
        tuple(penalties),
        tuple(weights.tolist()),
    )


def _predict_by_group(fits: Sequence[Affine], X: Floats, groups: Indices) -> Floats:
    """Predict the rows of each group by its own fit, ``(n, n_outputs)``."""
    predicted = np.empty((len(X), len(fits[0].offset)))
    for g, fit in enumerate(fits):
        predicted[groups == g] = fit(X[groups == g])
    return predicted


def stack(columns: Floats, values: Floats, size: float) -> Floats:
    """Return the weights of ridges from their predictions of held-out groups and what these should be.

    Any rows with the same products do: those of the data, or a triangle of which the products are known.

    Parameters
    ----------
    columns, values
        ``(n_rows, n_ridges)`` and ``(n_rows,)``.
    size
        Length of the outputs of all spots.
    """
    n, pull = columns.shape[1], np.sqrt(EQUAL_PULL) * size
    # Rows below the data: the pull to equal weights, and one far heavier than all others, which makes them sum to 1.
    rows = [columns, pull * np.eye(n), 1e3 * size * np.ones((1, n))]
    wanted = np.concatenate([values, np.full(n, pull / n), [1e3 * size]])
    # nnls needs the products of the columns alone, and those of millions of rows are six by six.
    q, r = np.linalg.qr(np.vstack(rows))
    weights = nnls(r, q.T @ wanted)[0]
    return np.asarray(weights / weights.sum())


def _centre(values: Floats, groups: Indices) -> Floats:
    """Take each group's mean out of ``(n, n_outputs)`` values."""
    centred = values.copy()
    for g in np.unique(groups):
        centred[groups == g] -= values[groups == g].mean(axis=0)
    return centred


def pool_spots(section: TrainingSection, sigma_um: float) -> Floats:
    """Return the embedding around each spot, ``(n_spots, dim)``: pooled around each patch, then over the disc."""
    if sigma_um == 0:
        return np.asarray(section.overlap @ section.patches.embedding.astype(np.float64))
    under = np.unique(section.overlap.indices).astype(np.int64)
    overlap, moment = section.overlap[:, under], [Moment(sigma_um, "mean")]
    found = np.empty((overlap.shape[0], section.patches.embedding.shape[1]))
    # In double precision: the rounding of single precision is 1e-6 of a pooled embedding, and ten times that of the small
    # differences between two scales.
    for _, features, pooled in pool_moments(section.patches, moment, under, precision="float64"):
        found[:, features] = overlap @ pooled
    return found


@dataclass(frozen=True)
class _Inputs:
    """Pooled embeddings as inputs of a ridge, and the way back.

    Parameters
    ----------
    standardiser
        Mean 0 and standard deviation 1 first.
    rotation
        Then to fewer numbers, ``(dim, n_inputs)``, or None.
    values
        ``(n_spots, n_inputs)``.
    noise
        Covariance of what the stain adds to the values, ``(dim, dim)``, or None.
    """

    standardiser: Standardiser
    rotation: Floats | None
    values: Floats
    noise: Floats | None

    @classmethod
    def standardise(
        cls,
        X: Floats,
        stain: Floats | None,
        adjust: Callable[[Standardiser], Standardiser] = lambda found: found,
    ) -> Self:
        """Standardise in place, and rotate to as many numbers as there are spots where those are fewer.

        Parameters
        ----------
        X
            ``(n_spots, dim)``; overwritten.
        stain
            Covariance of what it adds to the inputs, ``(dim, dim)``, or None.
        adjust
            From mean and standard deviation of the inputs to how they are standardised.
        """
        standardiser = adjust(Standardiser.fit(X))
        values, scale = X, standardiser.scale
        values -= standardiser.mean
        values /= scale
        n, dim = values.shape
        if stain is not None:
            # Not rotated: stains also shift embeddings in directions in which training spots do not differ.
            return cls(standardiser, None, values, stain / scale[:, None] / scale)
        if n >= dim:
            return cls(standardiser, None, values, None)
        # All rows lie in a space of n dimensions. Ridge is the same in any orthonormal basis of it, and decomposing
        # costs the cube of their number.
        square, left = symmetric_eigen(values @ values.T)
        kept = square > 1e-10 * max(square[-1], 1e-300)
        rotation = values.T @ (left[:, kept] / np.sqrt(square[kept]))
        return cls(standardiser, rotation, values @ rotation, None)

    def sums(self, Y: Floats, rows: NDArray[np.bool_]) -> RidgeSums:
        """Add up some rows, with outputs ``(n_spots, n_outputs)`` of all."""
        sums = RidgeSums.from_rows(self.values[rows], Y[rows])
        return sums if self.noise is None else sums.with_input_noise(self.noise)

    def to_embedding(self, ridge: Affine) -> Affine:
        """Return a map of these inputs as one of pooled embeddings."""
        if self.rotation is not None:
            ridge = Affine(self.rotation @ ridge.weight, ridge.offset)
        return ridge.after(self.standardiser)
