"""Gaussians over a grid of patches: means and spreads of what lies around each, at several scales at once.

Positions may be missing (background): what is missing gets no weight, and the rest is normalised over what is
there. A Gaussian on a grid is a product of two banded matrices, one along columns and one along rows; both are
multiplied in float32, so spreads are taken of deviations from a centre that is given.

Terms
    moment   ``mean`` or ``sd``: of an embedding, weighted by a Gaussian of the distance
    view     a scale and a moment: sigma in microns and a name
    lattice  the bounding rectangle of the patches, 0 where there is none
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.sections import Patches

TRUNCATE = 3.0
"""Sigmas after which a Gaussian is cut off: how far a pooled patch looks."""
MOMENTS = ("mean", "sd")
_LATTICE_BYTES = 64 << 20
"""Working memory of the features that are pooled together, about."""
_FEATURES = 128
"""Features pooled together, at most: more do not fit the processor's cache."""
_TILE = 32
"""Rows or columns that one product of matrices pools at once."""
_ROUNDING = np.float32(1e-6)
"""A variance less than this share of the mean square is what rounding leaves of a constant."""

Values = NDArray[np.float32]
Indices = NDArray[np.int64]
View = tuple[float, str]


def gaussian_pool(
    patches: Patches, sigma_um: float, moments: Sequence[str] = MOMENTS, of: Indices | None = None
) -> Values:
    """Pool the embeddings around each patch by a Gaussian: mean, spread or both.

    Only patches that exist have weight, so background neither dilutes nor leaks in. A patch's result
    depends on nothing further than ``TRUNCATE * sigma_um`` along either axis.

    Parameters
    ----------
    patches
        Of one slide, no position twice.
    sigma_um
        Standard deviation of the Gaussian, positive.
    moments
        From `MOMENTS`, in the order wanted.
    of
        Patches to pool around; all if None.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_patches or len(of), dim * len(moments))``, moment after moment. Costs patches x dim x
        window side, as products of matrices; working memory beyond the result is bounded.

    Raises
    ------
    ValueError
        If sigma is not positive, or a moment unknown.
    """
    dim = patches.embedding.shape[1]
    views = [(sigma_um, name) for name in moments]
    pooled = np.empty((len(patches) if of is None else len(of), dim * len(views)), np.float32)
    for view, features, values in pool_views(patches, views, of):
        start = views.index(view) * dim
        pooled[:, start + features.start : start + features.stop] = values
    return pooled


def pool_views(
    patches: Patches, views: Sequence[View], of: Indices | None = None, centre: Values | None = None
) -> Iterator[tuple[View, slice, Values]]:
    """Yield ``(view, features, values)``, a few features at a time, each view of all features.

    Parameters
    ----------
    patches, of
        As in `gaussian_pool`.
    views
        None twice. Sigma 0 is the patch itself, whose spread is not defined.
    centre
        What is taken from the embeddings first, ``(dim,)``; 0 if None. Means come without it, too.

    Raises
    ------
    ValueError
        If a view is none of these.
    """
    for sigma, moment in views:
        if moment not in MOMENTS or not (sigma > 0 or (sigma == 0 and moment == "mean")):
            raise ValueError(f"cannot pool moment {moment!r} at sigma {sigma} µm: know {MOMENTS}, sigma > 0")
    of = np.arange(len(patches)) if of is None else of
    if len(of) == 0:
        return
    lattice = _Lattice.over(patches, [sigma for sigma, _ in views if sigma > 0], of)
    dim, width = patches.embedding.shape[1], min(_FEATURES, _LATTICE_BYTES // (8 * 4 * lattice.size) + 1)
    for start in range(0, dim, width):
        features = slice(start, min(start + width, dim))
        part = patches.embedding[:, features].astype(np.float32, copy=False)
        if centre is not None:
            part = part - centre[features]
        if (0.0, "mean") in views:
            yield (0.0, "mean"), features, part[of]
        for view, values in lattice.pool(part, views):
            yield view, features, values


@dataclass(frozen=True)
class _Lattice:
    """Where patches lie, where results are wanted, and the Gaussians between the two.

    Parameters
    ----------
    shape, rows, cols
        Of the bounding rectangle, and the patches' positions in it.
    box
        Places in the box around the wanted patches, row by row; None where they are all of it, in order.
    bands
        Per sigma, the weights of the rectangle's rows and columns for those of the box.
    scale
        Per sigma, 1 / the weight of all existing patches around each wanted one, ``(n, 1)``.
    """

    shape: tuple[int, int]
    rows: Indices
    cols: Indices
    box: Indices | None
    bands: "dict[float, tuple[_Band, _Band]]"
    scale: dict[float, Values]

    @classmethod
    def over(cls, patches: Patches, sigmas: Sequence[float], of: Indices) -> Self:
        rows, cols = patches.rows - patches.rows.min(), patches.cols - patches.cols.min()
        shape = (int(rows.max()) + 1, int(cols.max()) + 1)
        out_rows, out_cols = rows[of] - rows[of].min(), cols[of] - cols[of].min()
        box = out_rows * (int(out_cols.max()) + 1) + out_cols
        all_of_it = len(box) == (int(out_rows.max()) + 1) * (int(out_cols.max()) + 1)
        stride = patches.stride_um
        bands = {
            sigma: (
                _Band.of(rows[of], shape[0], sigma / stride),
                _Band.of(cols[of], shape[1], sigma / stride),
            )
            for sigma in sigmas
        }
        keep = None if all_of_it and np.array_equal(box, np.arange(len(box))) else box
        lattice = cls(shape, rows, cols, keep, bands, {})
        there = np.zeros((*shape, 1), np.float32)
        there[rows, cols] = 1
        for sigma in bands:
            lattice.scale[sigma] = np.float32(1) / lattice._sum(sigma, there)
        return lattice

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def pool(self, values: Values, views: Sequence[View]) -> Iterator[tuple[View, Values]]:
        """Yield the views of ``(n_patches, n)`` values that have a sigma."""
        n, names = values.shape[1], {sigma: [m for s, m in views if s == sigma] for sigma in self.bands}
        squared = any("sd" in moments for moments in names.values())
        filled = np.zeros((*self.shape, n * (1 + squared)), np.float32)
        filled[self.rows, self.cols, :n] = values
        if squared:
            np.multiply(filled[:, :, :n], filled[:, :, :n], out=filled[:, :, n:])
        for sigma, moments in names.items():
            summed = self._sum(sigma, filled if "sd" in moments else filled[:, :, :n])
            summed *= self.scale[sigma]
            mean = summed[:, :n]
            for moment in moments:
                yield (sigma, moment), mean if moment == "mean" else _spread(summed[:, n:], mean)

    def _sum(self, sigma: float, filled: Values) -> Values:
        """Return the weighted sum around each wanted patch, ``(n_wanted, n)``."""
        down, along = self.bands[sigma]
        n = filled.shape[2]
        half = down.apply(filled.reshape(1, self.shape[0], -1)).reshape(-1, self.shape[1], n)
        summed = along.apply(half).reshape(-1, n)
        return summed if self.box is None else summed[self.box]


def _spread(mean_square: Values, mean: Values) -> Values:
    variance = mean * mean
    np.subtract(mean_square, variance, out=variance)
    # What rounding leaves of a constant is no spread: standardised, it would rule every prediction.
    variance[variance <= _ROUNDING * mean_square] = 0
    return np.asarray(np.sqrt(variance, out=variance))


@dataclass(frozen=True)
class _Band:
    """One axis of a Gaussian: ``(n_out, n_in)`` weights, 0 further than `reach` from the place `first` + i."""

    weight: Values
    first: int
    reach: int

    @classmethod
    def of(cls, wanted: Indices, n_in: int, sigma: float) -> "_Band":
        first, last = int(wanted.min()), int(wanted.max())
        # The tolerance lets 3 x 56 / 56 be 3 whatever the rounding of the stride.
        reach = int(np.floor(TRUNCATE * sigma + 1e-6))
        step = np.arange(n_in) - np.arange(first, last + 1)[:, None]
        weight = np.where(abs(step) <= reach, np.exp(-((step / sigma) ** 2) / 2), 0.0)
        return cls(weight.astype(np.float32), first, reach)

    def apply(self, values: Values) -> Values:
        """Multiply ``(m, n_in, n)`` values from the left, `_TILE` places at a time: the rest of a row is 0."""
        n_out, n_in = self.weight.shape
        applied = np.empty((len(values), n_out, values.shape[2]), np.float32)
        for start in range(0, n_out, _TILE):
            stop = min(start + _TILE, n_out)
            low = max(0, self.first + start - self.reach)
            high = min(n_in, self.first + stop + self.reach)
            np.matmul(self.weight[start:stop, low:high], values[:, low:high], out=applied[:, start:stop])
        return applied
