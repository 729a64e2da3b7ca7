"""Gaussians over a grid of patches: means and spreads of what lies around each, at several scales at once.

Positions may be missing (background): what is missing gets no weight, and the rest is normalised over what is
there. A Gaussian on a grid is a product of two banded matrices, one along columns and one along rows; both are
multiplied in float32, so spreads are taken of deviations from a centre that is given.

Terms
    moment   ``mean`` or ``sd``: of an embedding, weighted by a Gaussian of the distance
    view     a scale and a moment: sigma in microns and a name
    lattice  the rectangle of places around the wanted patches, 0 where there is no patch
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Self

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from histosge.data.sections import Patches

TRUNCATE = 3.0
"""Sigmas after which a Gaussian is cut off: how far a pooled patch looks."""
MOMENTS = ("mean", "sd")
_LATTICE_BYTES = 64 << 20
"""Working memory of the features that are pooled together, about."""
_FEATURES = 128
"""Features pooled together, at most: more do not fit the processor's cache."""
_TILE = 8
"""Rows or columns that one product of matrices pools: with fewer, it has fewer zeros to multiply."""
_ALIKE = 20_000
"""Patches of a window, at most, whose lattice is kept for the next one like it."""
_SMALL = 1 << 18
"""Values of memory that is kept whatever is asked for next."""
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

    Values are overwritten when the next ones are made: copy what is to be kept.

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
    lattice = _Lattice.over(patches, tuple(dict.fromkeys(sigma for sigma, _ in views if sigma > 0)), of)
    dim, width = patches.embedding.shape[1], min(_FEATURES, _LATTICE_BYTES // (8 * 4 * lattice.size) + 1)
    for start in range(0, dim, width):
        features = slice(start, min(start + width, dim))
        part = patches.embedding[:, features]
        offset = np.zeros(1, np.float32) if centre is None else centre[features]
        if (0.0, "mean") in views:
            yield (0.0, "mean"), features, _less(part[of], offset)
        for view, values in lattice.pool(part, offset, views):
            yield view, features, values


@dataclass(frozen=True)
class _Lattice:
    """A rectangle of places: all that Gaussians around the wanted patches can see, in whole tiles.

    Parameters
    ----------
    inner
        Rows and columns of the box around the wanted patches, each a multiple of `_TILE`.
    margin
        Places on each side of it, as many as the widest Gaussian reaches.
    chosen
        Patches in the rectangle; None where they are all.
    places
        Of those in the rectangle, row by row; None where they fill it in order.
    box
        Of the wanted patches in the box, row by row; None where they fill it in order.
    bands, scale
        Per sigma: its Gaussian, and 1 / the weight of all existing patches around each wanted one, ``(n, 1)``.
    """

    inner: tuple[int, int]
    margin: int
    chosen: Indices | None
    places: Indices | None
    box: Indices | None
    bands: "dict[float, _Band]"
    scale: dict[float, Values]

    @classmethod
    def over(cls, patches: Patches, sigmas: tuple[float, ...], of: Indices) -> Self:
        """Place patches; within a slide most windows are alike, so the last few lattices are kept."""
        rows, cols = ((at - at[of].min()).astype(np.int64) for at in (patches.rows, patches.cols))
        of = of.astype(np.int64)
        places = tuple(sigma / patches.stride_um for sigma in sigmas)
        if len(rows) > _ALIKE:
            return cls._of(rows, cols, of, sigmas, places)
        return cls._again(rows.tobytes(), cols.tobytes(), of.tobytes(), sigmas, places)

    @classmethod
    @lru_cache(maxsize=8)
    def _again(
        cls, rows: bytes, cols: bytes, of: bytes, sigmas: tuple[float, ...], places: tuple[float, ...]
    ) -> Self:
        at = [np.frombuffer(some, np.int64) for some in (rows, cols, of)]
        return cls._of(at[0], at[1], at[2], sigmas, places)

    @classmethod
    def _of(
        cls,
        rows: Indices,
        cols: Indices,
        of: Indices,
        sigmas: tuple[float, ...],
        in_places: tuple[float, ...],
    ) -> Self:
        """Lay out patches at rows and columns counted from the first wanted ones."""
        bands = {sigma: _band(places) for sigma, places in zip(sigmas, in_places, strict=True)}
        margin = max((band.reach for band in bands.values()), default=0)
        inner = _whole_tiles(int(rows[of].max()) + 1), _whole_tiles(int(cols[of].max()) + 1)
        shape = inner[0] + 2 * margin, inner[1] + 2 * margin
        box = rows[of] * inner[1] + cols[of]
        rows, cols = rows + margin, cols + margin
        seen = (rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])
        chosen = None if seen.all() else np.flatnonzero(seen)
        places = (rows * shape[1] + cols)[seen]
        lattice = cls(
            inner, margin, chosen, _unless_in_order(places, shape), _unless_in_order(box, inner), bands, {}
        )
        there = lattice.fill(np.ones((len(rows), 1), np.float32), np.zeros(1, np.float32))[None]
        scale = {sigma: np.float32(1) / lattice.sum(sigma, there)[0] for sigma in bands}
        return replace(lattice, scale=scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def fill(self, values: NDArray[np.floating], offset: Values, out: Values | None = None) -> Values:
        """Lay out ``(n_patches, n)`` values less an offset, ``(*shape, n)``; 0 where no patch is."""
        n = values.shape[1]
        filled = np.empty((self.size, n), np.float32) if out is None else out.reshape(self.size, n)
        values = values if self.chosen is None else values[self.chosen]
        if self.places is None:
            _less(values, offset, filled)
        else:
            filled[:] = 0
            filled[self.places] = _less(values, offset)
        return filled.reshape(*self.shape, n)

    def pool(
        self, values: NDArray[np.floating], offset: Values, views: Sequence[View]
    ) -> Iterator[tuple[View, Values]]:
        """Yield the views of ``(n_patches, n)`` values that have a sigma."""
        squared = any(moment == "sd" for _, moment in views)
        filled = _memory("filled", (1 + squared, *self.shape, values.shape[1]))
        self.fill(values, offset, filled[0])
        if squared:
            np.multiply(filled[0], filled[0], out=filled[1])
        for sigma in self.bands:
            moments = [moment for other, moment in views if other == sigma]
            summed = self.sum(sigma, filled if "sd" in moments else filled[:1])
            summed *= self.scale[sigma]
            for moment in moments:
                yield (sigma, moment), summed[0] if moment == "mean" else _spread(summed[1], summed[0])

    def sum(self, sigma: float, filled: Values) -> Values:
        """Return the weighted sum around each wanted patch, ``(n_planes, n_wanted, n)`` of as many planes."""
        band, (planes, _, _, n) = self.bands[sigma], filled.shape
        rows, cols = self.inner
        beyond = self.margin - band.reach
        seen = filled[:, beyond : filled.shape[1] - beyond, beyond : filled.shape[2] - beyond]
        half = _memory("half", (planes, rows, cols + 2 * band.reach, n))
        band.apply(seen, half)
        summed = _memory("summed", (planes * rows, cols, n))
        band.apply(half.reshape(planes * rows, -1, n), summed)
        every = summed.reshape(planes, rows * cols, n)
        return every if self.box is None else every[:, self.box]


@dataclass(frozen=True)
class _Band:
    """A Gaussian along one axis, for the places of one tile: every tile has the same.

    Parameters
    ----------
    weight
        Of all that a tile sees, ``(_TILE, _TILE + 2 * reach)``.
    reach
        Places to each side.
    """

    weight: Values
    reach: int

    def apply(self, values: Values, out: Values) -> None:
        """Pool ``(m, n_out + 2 * reach, ...)`` along the second axis, into ``(m, n_out, ...)``, which is contiguous.

        In one call for all tiles: threads that call often wait for each other.
        """
        m, n_out, n = *out.shape[:2], math.prod(out.shape[2:])
        tiles = as_strided(
            values,
            (m, n_out // _TILE, self.weight.shape[1], n),
            (values.strides[0], _TILE * values.strides[1], values.strides[1], values.strides[-1]),
            writeable=False,
        )
        np.matmul(self.weight, tiles, out=out.reshape(m, n_out // _TILE, _TILE, n))


@cache
def _band(sigma: float) -> _Band:
    """Weigh places by their distance, cut off at `TRUNCATE` sigmas; sigma is in places."""
    # The tolerance lets 3 x 56 / 56 be 3 whatever the rounding of the stride.
    reach = int(np.floor(TRUNCATE * sigma + 1e-6))
    step = np.arange(-reach, _TILE + reach) - np.arange(_TILE)[:, None]
    weight = np.where(abs(step) <= reach, np.exp(-((step / sigma) ** 2) / 2), 0.0)
    return _Band(weight.astype(np.float32), reach)


def _whole_tiles(n: int) -> int:
    return -(-n // _TILE) * _TILE


def _unless_in_order(places: Indices, shape: tuple[int, int]) -> Indices | None:
    """Return places of a rectangle, row by row; None where they are all of them, in order."""
    whole = len(places) == math.prod(shape) and bool((np.diff(places) == 1).all())
    return None if whole else places


_thread = threading.local()


def _memory(name: str, shape: tuple[int, ...]) -> Values:
    """Return an array of this thread's, the same one for the same name: new memory costs as much as a product."""
    held: dict[str, Values] = _thread.__dict__
    size = math.prod(shape)
    if name not in held or not size <= held[name].size <= 4 * size + _SMALL:
        held[name] = np.empty(size, np.float32)
    return held[name][:size].reshape(shape)


def _less(values: NDArray[np.floating], offset: Values, out: Values | None = None) -> Values:
    less: Values = np.subtract(values, offset, out=out, dtype=np.float32, casting="same_kind")
    return less


def _spread(mean_square: Values, mean: Values) -> Values:
    variance = np.multiply(mean, mean, out=_memory("spread", mean.shape))
    np.subtract(mean_square, variance, out=variance)
    # What rounding leaves of a constant is no spread: standardised, it would rule every prediction.
    variance[variance <= _ROUNDING * mean_square] = 0
    return np.sqrt(variance, out=variance)
